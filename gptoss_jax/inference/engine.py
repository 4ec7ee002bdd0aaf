"""The engine: prompts are read into a cache in pieces, and continued by a jitted loop.

The prompts but for their last tokens are read into the cache. From there on every step is the same: feed the
latest token, sample the next one. Between two compiled calls the cache stays on the device; all else is a few
numbers that the host holds.
"""

import functools
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from gptoss_jax.config import ModelConfig
from gptoss_jax.data.tokenizer import Tokenizer
from gptoss_jax.inference.detokenizer import StreamingDetokenizer
from gptoss_jax.inference.sampling import sample, sequence_keys, step_keys
from gptoss_jax.inference.sampling_params import Request
from gptoss_jax.model.kv_cache import KVCache, init_cache, resize
from gptoss_jax.model.transformer import bind, compute_dtype
from gptoss_jax.parallel import distributed
from gptoss_jax.parallel.mesh import BATCH, batch_shards, current_axes
from gptoss_jax.parallel.rules import constrain

# Tokens of a sequence in one call that reads a prompt: a prompt is cut into pieces of these sizes.
PIECES = (512, 128, 32)
# Most tokens of all sequences in such a call, unless the smallest pieces are more: their activations and
# scores are what memory it takes.
PIECE_TOKENS = 4096
# Most tokens of a sequence in one call of the decoder.
STEPS = 64
# Room for tokens in the smallest cache; the others are twice as large as the one before.
SMALLEST_CACHE = 256
# The same of a stream in several processes.
SHARED_STEPS = 8
# Seconds between the chunks of a stream, and between two looks for stop strings.
INTERVAL = 0.1

CACHE = P(None, BATCH, "tensor", None, None)


def max_compilations(config: ModelConfig, decoders: int = 1) -> int:
    """The most programs that any prompts of one rounded number compile, with so many choices of settings."""
    lengths = len({_room(config, tokens) for tokens in range(1, config.max_position_embeddings + 1)})
    return lengths * (2 + len(PIECES) + decoders)


def _next_steps(steps: int, seconds: float) -> int:
    """Steps of the next call of a steady stream, from those of the last one and how long it took."""
    if jax.process_count() > 1:
        # Their clocks differ, and all of them must take the same steps.
        return min(2 * steps, SHARED_STEPS)
    if seconds < INTERVAL:
        return min(2 * steps, STEPS)
    return max(steps // 2, 1) if seconds > 2 * INTERVAL else steps


def _bucket(count: int, smallest: int = 1) -> int:
    """The first power of two times `smallest` that is at least `count`."""
    return smallest << max(-(-count // smallest) - 1, 0).bit_length()


def _room(config: ModelConfig, tokens: int) -> int:
    """The length of the smallest cache with room for so many tokens."""
    return min(_bucket(tokens, SMALLEST_CACHE), config.max_position_embeddings)


def _filters(asked: Sequence[Request], batch: int, vocabulary: int) -> dict[str, np.ndarray]:
    """The samplers' settings of every sequence [B], of those alone that anybody asks for."""

    def column(values, neutral, dtype):
        filled = [neutral if value is None else value for value in values]
        return np.array(filled + [neutral] * (batch - len(filled)), dtype)

    if all(one.temperature == 0 for one in asked):
        return {}
    settings = {"temperature": column([one.temperature for one in asked], 0, np.float32)}
    if any(one.top_k is not None for one in asked):
        kept = [None if one.top_k is None else min(one.top_k, vocabulary) for one in asked]
        settings["top_k"] = column(kept, vocabulary, np.int32)
    for name, neutral in (("top_p", 1.0), ("min_p", 0.0)):
        values = [getattr(one, name) for one in asked]
        if any(value is not None for value in values):
            settings[name] = column(values, neutral, np.float32)
    return settings


def chunks(
    config: ModelConfig,
    params: dict,
    requests: Sequence[Request],
    log_probs: bool,
    tokenizer: Tokenizer | None,
    steady: bool,
) -> Iterator[tuple[list[list[int]], list[list[float]]]]:
    """The answers' tokens as they are made, and their log-probabilities where they are asked for.

    `steady`: a first token as soon as it is there, then some about every 0.1 s; else as many at a time as one
    call of the decoder makes.
    """
    distributed.agree_on_kernels(config.kernels)
    count, shards = len(requests), batch_shards(current_axes())
    # Empty sequences, done before they begin, fill the batch up to what the mesh splits evenly.
    batch = _bucket(-(-count // shards)) * shards
    prompts = [one.prompt for one in requests]
    fed_B = np.zeros(batch, np.int32)
    fed_B[:count] = [len(prompt) - 1 for prompt in prompts]
    limits_B = np.zeros(batch, np.int32)
    limits_B[:count] = [one.max_new_tokens for one in requests]
    stops = [one.stop_tokens for one in requests]
    stops_BK = np.full((batch, _bucket(max(map(len, stops)), 8)), -1, np.int32)
    for row, tokens in zip(stops_BK, stops, strict=False):
        row[: len(tokens)] = tokens
    seeds_B = np.zeros(batch, np.uint32)
    seeds_B[:count] = [one.seed for one in requests]
    settings = _filters(requests, batch, config.vocab_size)
    matchers = [
        StreamingDetokenizer(tokenizer.decode_bytes, one.stop_strings) if one.stop_strings else None
        for one in requests
    ]

    most, longest = int(limits_B.max()), int(fed_B.max())
    length = _room(config, longest + min(most, STEPS))
    cache = _empty_cache(config, batch, length)
    for start, size in _pieces(longest, batch):
        tokens_BT = np.zeros((batch, size), np.int32)
        for row, prompt in zip(tokens_BT, prompts, strict=False):
            part = prompt[start : min(start + size, len(prompt) - 1)]
            row[: len(part)] = part
        counts_B = np.clip(fed_B - start, 0, size)
        # One piece in flight (see `parallel/in_flight.py`): a long prompt has hundreds of them. The next one
        # donates the cache, so nothing older could be waited for.
        jax.block_until_ready(cache)
        cache = _prefill(config, params, cache, tokens_BT, counts_B)

    latest_B, done_B = np.zeros(batch, np.int32), np.ones(batch, bool)
    latest_B[:count] = [prompt[-1] for prompt in prompts]
    done_B[:count] = False
    made, steps = 0, 1 if steady else STEPS
    while made < most and not done_B.all():
        steps = min(steps, most - made)
        reach = int(np.max(np.where(done_B, 0, fed_B + np.minimum(made + steps, limits_B))))
        if reach > length:
            length = _room(config, reach)
            cache = _grown(config, cache, length)
        began = time.monotonic()
        cache, tokens_BC, log_probs_BC = _decode(
            config, params, cache, latest_B, done_B, np.int32(made), np.int32(steps), limits_B, stops_BK,
            seeds_B, settings, log_probs,
        )  # fmt: skip
        tokens_BC = np.asarray(tokens_BC)[:, :steps]
        latest_B, done_B = tokens_BC[:, -1], tokens_BC[:, -1] < 0
        parts = [[int(token) for token in row if token >= 0] for row in tokens_BC[:count]]
        for b, matcher in enumerate(matchers):
            if matcher is not None:
                parts[b] = _until_stop(matcher, parts[b], tokenizer.vocab_size)
                done_B[b] |= matcher.stopped
        values = np.asarray(log_probs_BC) if log_probs else None
        scores = [[] if values is None else values[b, : len(part)].tolist() for b, part in enumerate(parts)]
        yield parts, scores
        made += steps
        done_B |= made >= limits_B
        if steady:
            steps = _next_steps(steps, time.monotonic() - began)


def _until_stop(matcher: StreamingDetokenizer, tokens: list[int], known: int) -> list[int]:
    """The tokens up to the one in which a stop string is complete."""
    for i, token in enumerate(tokens):
        if matcher.stopped:
            return tokens[:i]
        # The model's table may have more rows than the tokenizer has tokens.
        matcher.feed([token] if token < known else [])
    return tokens


def _pieces(count: int, batch: int) -> Iterator[tuple[int, int]]:
    """Cuts `count` tokens into (start, size); the last piece may reach past the end, but not by more than
    there is in it: a call reads all weights, so fewer calls are worth some padding."""
    sizes = [size for size in PIECES if size * batch <= PIECE_TOKENS] or PIECES[-1:]
    start = 0
    while start < count:
        left = count - start
        size = next((size for size in sizes if size <= left), sizes[-1])
        size = min((wider for wider in sizes if left <= wider <= 2 * left), default=size)
        yield start, size
        start += size


def _placed(cache: KVCache) -> KVCache:
    """The cache as every program hands it over: another placement would compile the next one again."""
    layers = jax.tree.map(lambda leaf: constrain(leaf, CACHE), cache.layers)
    return KVCache(layers, constrain(cache.lengths, P(BATCH)))


@functools.partial(jax.jit, static_argnames=("config", "batch", "length"))
def _empty_cache(config: ModelConfig, batch: int, length: int) -> KVCache:
    return _placed(init_cache(config, batch, length, compute_dtype(config)))


@functools.partial(jax.jit, static_argnames=("config", "length"))
def _grown(config: ModelConfig, cache: KVCache, length: int) -> KVCache:
    return _placed(resize(config, cache, length))


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def _prefill(config, params, cache, tokens_BT, counts_B) -> KVCache:
    """Reads the first `counts_B` of the tokens of each sequence into the cache."""
    segment_ids_BT = (jnp.arange(tokens_BT.shape[1], dtype=jnp.int32) < counts_B[:, None]).astype(jnp.int32)
    model = bind(config, params)
    return _placed(model.hidden_states(tokens_BT, segment_ids_BT, cache=cache)[1])


@functools.partial(jax.jit, static_argnames=("config", "log_probs"), donate_argnames="cache")
def _decode(
    config, params, cache, latest_B, done_B, made, steps, limits_B, stops_BK, seeds_B, settings, log_probs
):
    """Up to `steps` (traced) tokens for every sequence that is not done.

    `latest_B` has not been read yet; `made` tokens have been sampled before, and `limits_B` may be in all.
    Returns the cache, int32 [B, STEPS], where -1 stands for the end of a sequence and all after it, and
    their log-probabilities, float32 [B, STEPS] or nothing.
    """
    model = bind(config, params)
    keys_B = sequence_keys(seeds_B)

    def going(state):
        step, _, _, done_B, *_ = state
        return (step < steps) & ~jnp.all(done_B)

    def one_step(state):
        step, cache, latest_B, done_B, tokens_BC, scores_BC = state
        hidden_BTD, cache, _ = model.hidden_states(
            latest_B[:, None], (~done_B).astype(jnp.int32)[:, None], cache=cache
        )
        logits_BV = model.logits(hidden_BTD)[:, 0]
        latest_B = sample(logits_BV, step_keys(keys_B, made + step), **settings)
        done_B |= jnp.any(latest_B[:, None] == stops_BK, axis=1)
        tokens_BC = tokens_BC.at[:, step].set(jnp.where(done_B, -1, latest_B))
        if log_probs:
            chosen_B = jnp.take_along_axis(logits_BV, latest_B[:, None], axis=1)[:, 0]
            scores_BC = scores_BC.at[:, step].set(chosen_B - jax.nn.logsumexp(logits_BV, axis=1))
        done_B |= made + step + 1 >= limits_B
        return step + 1, _placed(cache), latest_B, done_B, tokens_BC, scores_BC

    shape = latest_B.shape[0], STEPS
    tokens_BC = jnp.full(shape, -1, jnp.int32)
    scores_BC = jnp.zeros(shape if log_probs else (0,), jnp.float32)
    _, cache, _, _, tokens_BC, scores_BC = jax.lax.while_loop(
        going, one_step, (jnp.int32(0), cache, latest_B, done_B, tokens_BC, scores_BC)
    )
    # Every process of a mesh reads all of the answers.
    return _placed(cache), constrain(tokens_BC, P()), constrain(scores_BC, P())
