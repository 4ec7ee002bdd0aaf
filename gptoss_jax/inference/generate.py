"""Prompts to answers: prefill in pieces, jitted decoding, batches of ragged prompts, streaming.

The prompts but for their last tokens are read into the cache. From there on every step is the same: feed the
latest token, sample the next one. Between two compiled calls the cache stays on the device; all else is a few
numbers that the host holds.
"""

import codecs
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from gptoss_jax.config import ModelConfig, require
from gptoss_jax.inference.sampling import sample, sequence_keys, step_keys
from gptoss_jax.model.kv_cache import LayerCache, make_cache
from gptoss_jax.model.transformer import Transformer, compute_dtype, params_of, with_params
from gptoss_jax.parallel.mesh import BATCH, batch_shards, current_axes
from gptoss_jax.parallel.sharding import constrain

# The smallest piece of a prompt and the smallest cache, in tokens.
SMALLEST = 16
LARGEST_PIECE = 512
# Attention scores of one layer that a piece of a prompt may take: 1 GiB in float32.
PIECE_SCORES = 1 << 28
# Most tokens of a sequence in one call of the decoder.
STEPS = 64
# Seconds between the chunks of a stream.
STREAM_INTERVAL = 0.1

CACHE = P(None, BATCH, None, "tensor", None)
Settings = dict[str, np.number]


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 32,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    stop_tokens: Sequence[int] = (),
    seed: int = 0,
) -> list[list[int]]:
    """Continues each prompt; returns the new tokens only.

    Args:
      model: under `jax.set_mesh` its parameters must lie where the path table places them.
      prompts: token ids, of any lengths. Text that was trained on starts with the tokenizer's bos.
      max_new_tokens: most tokens that a prompt is continued by.
      temperature, top_k, top_p, min_p: see `sampling.sample`. The default is greedy.
      stop_tokens: any of these ends its sequence and is not part of the answer.
      seed: 0 … 2^32 - 1. Token t of prompt b is drawn with fold_in(fold_in(key(seed), b), t), whatever the
        other prompts are.

    Raises:
      ValueError: no prompts, an empty one, an id outside the vocabulary, a setting outside its range, or a
        prompt that leaves too little of `max_position_embeddings`.

    What compiles: a prefill for each (number of prompts, length of a piece, length of the cache), where a
    piece is a power of two from 16 to 512 and the cache one from 16 up to `max_position_embeddings`, itself
    taken for one; and a decoder for each (number of prompts, length of the cache, which of greedy, top_k,
    top_p and min_p are asked for). A context of 131,072 has 14 lengths of the cache, so at most 6 * 14
    prefills for each number of prompts and 14 decoders for each of those choices. The values of the settings,
    the seed and the prompts recompile nothing, nor does `max_new_tokens` within a length of the cache; more
    than 8 stop tokens do, at 16, 32, ….
    """
    settings = (max_new_tokens, temperature, top_k, top_p, min_p, stop_tokens, seed)
    return generate_with_params(model.config, params_of(model), prompts, *settings)


def stream(
    model: Transformer, prompts: Sequence[Sequence[int]], *args, **kwargs
) -> Iterator[list[list[int]]]:
    """The same answers as `generate`, whose arguments it takes, while they are being decoded.

    Yields a list with a list for each prompt, the tokens that are new to it, possibly none: the first token
    alone and as soon as it is there, later ones about every 0.1 s. Errors in the arguments are raised by the
    call, not by the first `next`.
    """
    return stream_with_params(model.config, params_of(model), prompts, *args, **kwargs)


def generate_with_params(
    config: ModelConfig, params: dict, prompts: Sequence[Sequence[int]], *args, **kwargs
) -> list[list[int]]:
    """`generate` for a config and its parameters as a plain tree; the other arguments are the same."""
    chunks = _chunks(
        config, params, *_checked(config, prompts, *args, **kwargs), lambda steps, seconds: STEPS
    )
    return [[token for part in parts for token in part] for parts in zip(*chunks, strict=True)]


def stream_with_params(
    config: ModelConfig, params: dict, prompts: Sequence[Sequence[int]], *args, **kwargs
) -> Iterator[list[list[int]]]:
    """`stream` for a config and its parameters as a plain tree; the other arguments are the same."""
    return _chunks(config, params, *_checked(config, prompts, *args, **kwargs), _steady_pace)


class TextStream:
    """Tokens to text, piece by piece, where a character may be spread over several tokens."""

    def __init__(self, decode_bytes: Callable[[Sequence[int]], bytes]):
        """`decode_bytes`: that of a Tokenizer."""
        self._decode_bytes = decode_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, tokens: Sequence[int]) -> str:
        """The text that is complete with these tokens; the bytes of an unfinished character wait."""
        return self._utf8.decode(self._decode_bytes(tokens))

    def close(self) -> str:
        """What is left at the end: nothing, or U+FFFD for a character that broke off."""
        return self._utf8.decode(b"", final=True)


def _steady_pace(steps: int, seconds: float) -> int:
    """Steps of the next call, from those of the last one and how long it took; 1 at the start."""
    if seconds < STREAM_INTERVAL:
        return min(2 * steps, STEPS)
    return max(steps // 2, 1) if seconds > 2 * STREAM_INTERVAL else steps


def _checked(
    config,
    prompts,
    max_new_tokens=32,
    temperature=0.0,
    top_k=None,
    top_p=None,
    min_p=None,
    stop_tokens=(),
    seed=0,
) -> tuple[list[np.ndarray], int, Settings, np.ndarray, np.uint32]:
    """The arguments of `generate`, checked and as arrays."""
    require(len(prompts) > 0, "prompts", prompts, "must hold at least one prompt")
    arrays = []
    for i, prompt in enumerate(prompts):
        name, array = f"prompts[{i}]", np.asarray(prompt)
        require(array.ndim == 1, name, prompt, "must be a sequence of token ids")
        require(array.size > 0, name, prompt, "must hold at least one token")
        known = array.dtype.kind in "iu" and (array >= 0) & (array < config.vocab_size)
        allowed = f"a token id must be an integer from 0 to {config.vocab_size - 1}"
        require(np.all(known), f"{name}[{np.argmin(known)}]", array[np.argmin(known)].item(), allowed)
        arrays.append(array.astype(np.int32))
    require(max_new_tokens >= 1, "max_new_tokens", max_new_tokens, "must be 1 or more")
    require(0 <= temperature < math.inf, "temperature", temperature, "must be 0 (greedy) or more")
    require(top_k is None or top_k >= 1, "top_k", top_k, "must be 1 or more, or None")
    require(top_p is None or 0 < top_p <= 1, "top_p", top_p, "must be above 0 and at most 1, or None")
    require(min_p is None or 0 <= min_p < 1, "min_p", min_p, "must be at least 0 and below 1, or None")
    require(0 <= seed < 1 << 32, "seed", seed, "must be from 0 to 4294967295")
    longest = int(np.argmax([len(array) for array in arrays]))
    limit, length = config.max_position_embeddings, len(arrays[longest])
    has = f"prompts[{longest}] has {length} tokens and model.max_position_embeddings is {limit}"
    require(length < limit, "prompts", f"{length} tokens long", f"must leave room for an answer; {has}")
    require(
        length + max_new_tokens <= limit,
        "max_new_tokens",
        max_new_tokens,
        f"must be at most {limit - length}, because {has}",
    )
    settings: Settings = {}
    if temperature > 0:
        # An array type of its own keeps 1 and 1.0 from being two programs.
        settings["temperature"] = np.float32(temperature)
        if top_k is not None:
            settings["top_k"] = np.int32(min(top_k, config.vocab_size))
        if top_p is not None:
            settings["top_p"] = np.float32(top_p)
        if min_p is not None:
            settings["min_p"] = np.float32(min_p)
    stops = np.full(_bucket(len(stop_tokens), 8), -1, np.int32)
    stops[: len(stop_tokens)] = stop_tokens
    return arrays, max_new_tokens, settings, stops, np.uint32(seed)


def _bucket(count: int, smallest: int = SMALLEST) -> int:
    """The first power of two that is at least `count`."""
    return max(smallest, 1 << (count - 1).bit_length()) if count > 0 else smallest


def _chunks(
    config: ModelConfig,
    params: dict,
    prompts: list[np.ndarray],
    max_new_tokens: int,
    settings: Settings,
    stops_K: np.ndarray,
    seed: np.uint32,
    pace: Callable[[int, float], int],
) -> Iterator[list[list[int]]]:
    """The one engine. `pace`: steps of the last decoding call and its seconds -> steps of the next one."""
    # The mesh splits the batch evenly: empty sequences, done before they begin, fill it up.
    shards = batch_shards(current_axes())
    batch = -(-len(prompts) // shards) * shards
    fed_B = np.zeros(batch, np.int32)
    fed_B[: len(prompts)] = [len(prompt) - 1 for prompt in prompts]
    longest = int(fed_B.max())
    length = min(_bucket(longest + max_new_tokens), config.max_position_embeddings)

    cache = _empty_cache(config, batch, length)
    for start, size in _pieces(longest, batch * config.num_attention_heads * length):
        tokens_BT = np.zeros((batch, size), np.int32)
        for b, prompt in enumerate(prompts):
            part = prompt[start : min(start + size, fed_B[b])]
            tokens_BT[b, : len(part)] = part
        cache = _prefill(config, params, cache, tokens_BT, np.int32(start), fed_B)

    latest_B, done_B = np.zeros(batch, np.int32), np.ones(batch, bool)
    latest_B[: len(prompts)] = [prompt[-1] for prompt in prompts]
    done_B[: len(prompts)] = False
    made, steps = 0, pace(1, STREAM_INTERVAL)
    while made < max_new_tokens and not done_B.all():
        steps = min(steps, max_new_tokens - made)
        began = time.monotonic()
        cache, tokens_BC = _decode(
            config,
            params,
            cache,
            latest_B,
            fed_B,
            done_B,
            np.int32(made),
            np.int32(steps),
            stops_K,
            seed,
            settings,
        )
        tokens_BC = np.asarray(tokens_BC)[:, :steps]
        yield [[int(token) for token in row if token >= 0] for row in tokens_BC[: len(prompts)]]
        latest_B, done_B = tokens_BC[:, -1], tokens_BC[:, -1] < 0
        made, fed_B = made + steps, fed_B + np.int32(steps)
        steps = pace(steps, time.monotonic() - began)


def _pieces(count: int, scores_per_token: int) -> Iterator[tuple[int, int]]:
    """Cuts `count` tokens into (start, size) of powers of two; the last piece may reach past the end."""
    room = 1 << (max(PIECE_SCORES // scores_per_token, 1).bit_length() - 1)
    largest = max(SMALLEST, min(LARGEST_PIECE, room))
    start = 0
    while start < count:
        size = min(largest, _bucket(count - start))
        yield start, size
        start += size


def _placed(cache: list[LayerCache]) -> list[LayerCache]:
    """The cache as every program hands it over: another placement would compile the next one again."""
    return jax.tree.map(lambda leaf: constrain(leaf, CACHE), cache)


@functools.partial(jax.jit, static_argnames=("config", "batch", "length"))
def _empty_cache(config: ModelConfig, batch: int, length: int) -> list[LayerCache]:
    return _placed(make_cache(config, batch, length, compute_dtype(config)))


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def _prefill(config, params, cache, tokens_BT, start, lengths_B) -> list[LayerCache]:
    """Reads tokens `start` … `start` + T - 1 of each sequence into the cache, as far as `lengths_B` goes."""
    positions_BT = start + jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    segment_ids_BT = (positions_BT < lengths_B[:, None]).astype(jnp.int32)
    model = with_params(config, params)
    return _placed(model.hidden_states(tokens_BT, segment_ids_BT, positions_BT, cache=cache)[1])


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def _decode(config, params, cache, latest_B, positions_B, done_B, made, steps, stops_K, seed, settings):
    """Up to `steps` (traced) tokens for every sequence that is not done.

    `latest_B` stands at `positions_B` and has not been read yet; `made` tokens have been sampled before.
    Returns the cache and int32 [B, STEPS], where -1 stands for the end of a sequence and all after it.
    """
    model = with_params(config, params)
    keys_B = sequence_keys(seed, latest_B.shape[0])

    def going(state):
        step, _, _, done_B, _ = state
        return (step < steps) & ~jnp.all(done_B)

    def one_step(state):
        step, cache, latest_B, done_B, tokens_BC = state
        hidden_BTD, cache, _ = model.hidden_states(
            latest_B[:, None],
            (~done_B).astype(jnp.int32)[:, None],
            (positions_B + step)[:, None],
            cache=cache,
        )
        logits_BV = model.logits(hidden_BTD)[:, 0]
        latest_B = sample(logits_BV, step_keys(keys_B, made + step), **settings)
        done_B |= jnp.any(latest_B[:, None] == stops_K, axis=1)
        tokens_BC = tokens_BC.at[:, step].set(jnp.where(done_B, -1, latest_B))
        return step + 1, _placed(cache), latest_B, done_B, tokens_BC

    tokens_BC = jnp.full((latest_B.shape[0], STEPS), -1, jnp.int32)
    _, cache, _, _, tokens_BC = jax.lax.while_loop(
        going, one_step, (jnp.int32(0), cache, latest_B, done_B, tokens_BC)
    )
    # Every process of a mesh reads all of the answers.
    return _placed(cache), constrain(tokens_BC, P())
