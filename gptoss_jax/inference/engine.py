"""The engine: chunked prefill into a KV cache, then a jitted decode loop.

A prefill reads all tokens of the prompts except the last. From then on every step is the same: read the
latest token, sample the next one. Between calls only the cache stays on the devices.

Letters: B sequences, T prompt tokens of a chunk, V vocabulary, C tokens of a decode call.
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from gptoss_jax.checkpoints.readers import find_tokenizer
from gptoss_jax.config import ModelConfig, require
from gptoss_jax.data.tokenizer import Tokenizer
from gptoss_jax.inference.detokenizer import StreamingDetokenizer
from gptoss_jax.inference.sampling import SamplingSettings, sample, sequence_keys, step_keys
from gptoss_jax.inference.sampling_params import Completion, SamplingParams
from gptoss_jax.model.kv_cache import KVCache, grow, init_cache
from gptoss_jax.model.transformer import Transformer, bind, compute_dtype, get_params
from gptoss_jax.parallel import distributed
from gptoss_jax.parallel.mesh import batch_shards, current_axes
from gptoss_jax.parallel.rules import CACHE_LBKSH, ROWS, constrain

# Tokens of each sequence that one prefill call reads.
PREFILL_CHUNKS = (512, 128, 32)
# Bounds the memory of a prefill call: tokens of all sequences, unless the smallest chunks have more.
MAX_PREFILL_TOKENS = 4096
# Tokens of each sequence that one decode call samples.
MAX_STEPS = 64
# The same when several processes stream: their clocks differ, so time cannot decide.
MULTI_HOST_STEPS = 8
# Slots of the smallest cache; each larger size doubles.
MIN_CACHE_LEN = 256
# Target seconds between parts of a stream, and between searches for stop strings.
STREAM_INTERVAL = 0.1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """The sequences of a batch, one row each, without their cache."""

    token_B: jax.Array  # int32, the latest token, which is not in the cache yet
    done_B: jax.Array  # bool
    num_generated: jax.Array  # int32, tokens sampled so far
    max_new_tokens_B: jax.Array  # int32
    is_stop_BV: jax.Array  # bool
    seed_B: jax.Array  # uint32
    sampling_settings: SamplingSettings


class Engine:
    """Decodes batches of prompts with one model."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer | None = None) -> None:
        """`tokenizer` finds stop strings; default: the one in the folder that the model was loaded from."""
        self._config, self._params, self._origin = model.config, get_params(model), model.origin
        self._tokenizer = tokenizer

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams],
        *,
        streaming: bool,
    ) -> Iterator[list[Completion]]:
        """Yields the answers in parts as they are decoded; see `generate.stream`.

        Without `streaming` and stop strings, each part has all tokens of one decode call.
        """
        prompts = list(prompts)
        require(len(prompts) > 0, "prompts", prompts, "must hold at least one prompt")
        sampling = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
        allowed = f"must be one for all prompts, or {len(prompts)}, one for each"
        require(len(sampling) == len(prompts), "number of sampling params", len(sampling), allowed)
        checked = [self._check(i, *pair) for i, pair in enumerate(zip(prompts, sampling, strict=True))]
        stop_strings = next((one.stop_strings for one in sampling if one.stop_strings), ())
        if stop_strings and self._tokenizer is None and self._origin is not None:
            self._tokenizer = find_tokenizer(pathlib.Path(self._origin))
        found = not stop_strings or self._tokenizer is not None
        require(found, "stop_strings", stop_strings, "must come with a tokenizer to find them: tokenizer=…")
        return self._run(checked, sampling, streaming or bool(stop_strings))

    def _check(self, i: int, prompt: Sequence[int], sampling: SamplingParams) -> np.ndarray:
        """Returns a prompt as int32 [T]; raises ValueError if the model cannot continue it."""
        name, vocab_size = f"prompts[{i}]", self._config.vocab_size
        try:
            tokens = np.asarray(prompt)
        except ValueError:  # rows of several lengths
            tokens = np.empty((0, 0))
        require(tokens.ndim == 1, name, prompt, "must be a sequence of token ids")
        require(tokens.size > 0, name, prompt, "must hold at least one token")
        is_known = tokens.dtype.kind in "iu" and (tokens >= 0) & (tokens < vocab_size)
        first = int(np.argmin(is_known))
        allowed = f"must be an integer from 0 to {vocab_size - 1}"
        require(np.all(is_known), f"{name}[{first}]", tokens.tolist()[first], f"a token id {allowed}")
        stops = sampling.stop_tokens
        require(all(0 <= t < vocab_size for t in stops), "stop_tokens", stops, f"each {allowed}")
        limit = self._config.max_position_embeddings
        left, has = limit - len(tokens), f"{name} has {len(tokens)} tokens"
        has = f"{has} and model.max_position_embeddings is {limit}"
        require(left > 0, "prompts", f"{len(tokens)} tokens long", f"must leave room for an answer; {has}")
        wanted = sampling.max_new_tokens
        require(wanted <= left, "max_new_tokens", wanted, f"must be at most {left}, because {has}")
        return tokens.astype(np.int32)

    def _run(
        self, prompts: list[np.ndarray], sampling: list[SamplingParams], streaming: bool
    ) -> Iterator[list[Completion]]:
        config = self._config
        distributed.agree_on_kernels(config.kernels)
        shards = batch_shards(current_axes())
        # Rows without a sequence pad the batch, so that the mesh splits it evenly.
        batch = next_power_of_two(-(-len(prompts) // shards)) * shards
        state = _initial_state(config, prompts, sampling, batch)
        prefill_len_B = np.zeros(batch, np.int32)
        prefill_len_B[: len(prompts)] = [len(prompt) - 1 for prompt in prompts]
        max_new_tokens, max_prefill = int(state.max_new_tokens_B.max()), int(prefill_len_B.max())
        cache_len = _cache_len(config, max_prefill + min(max_new_tokens, MAX_STEPS))
        cache = _init_cache(config, batch, cache_len)
        for start, size in _prefill_chunks(max_prefill, batch):
            tokens_BT = np.zeros((batch, size), np.int32)
            for row, prompt in zip(tokens_BT, prompts, strict=False):
                chunk = prompt[start : min(start + size, len(prompt) - 1)]
                row[: len(chunk)] = chunk
            # At most one chunk in flight (see `parallel/in_flight.py`): a long prompt has hundreds. The next
            # call donates the cache, so this is the only result to wait for.
            jax.block_until_ready(cache)
            cache = _prefill(config, self._params, cache, tokens_BT, np.clip(prefill_len_B - start, 0, size))

        answers = [_Answer(one, self._tokenizer) for one in sampling]
        logprobs = any(one.logprobs for one in sampling)
        num_generated, num_steps = 0, 1 if streaming else MAX_STEPS
        while not state.done_B.all():
            num_steps = min(num_steps, max_new_tokens - num_generated)
            end_B = prefill_len_B + np.minimum(num_generated + num_steps, state.max_new_tokens_B)
            needed = int(np.max(np.where(state.done_B, 0, end_B)))
            if needed > cache_len:
                cache_len = _cache_len(config, needed)
                cache = _grow(config, cache, cache_len)
            began = time.monotonic()
            cache, tokens_BC, logprobs_BC = _decode(
                config, self._params, cache, state, np.int32(num_steps), logprobs
            )
            tokens_BC, logprobs_BC = np.asarray(tokens_BC)[:, :num_steps], np.asarray(logprobs_BC)
            yield [answer.add(tokens_BC[b], logprobs_BC[b]) for b, answer in enumerate(answers)]
            num_generated += num_steps
            done_B = np.ones(batch, bool)
            done_B[: len(answers)] = [answer.finish_reason is not None for answer in answers]
            state = dataclasses.replace(
                state, token_B=tokens_BC[:, -1], done_B=done_B, num_generated=np.int32(num_generated)
            )
            if streaming:
                num_steps = _next_num_steps(num_steps, time.monotonic() - began)


class _Answer:
    """The answer to one prompt, on the host: finds stop strings and the reason why it ended."""

    def __init__(self, sampling: SamplingParams, tokenizer: Tokenizer | None) -> None:
        self.finish_reason = None
        self._sampling = sampling
        self._num_generated = 0
        self._detokenizer = None
        if sampling.stop_strings:
            self._detokenizer = StreamingDetokenizer(tokenizer, sampling.stop_strings)

    def add(self, tokens_C: np.ndarray, logprobs_C: np.ndarray) -> Completion:
        """Adds the tokens that one call decoded for this prompt, -1 from its end on; returns the new part."""
        if self.finish_reason is not None:
            return Completion([], [] if self._sampling.logprobs else None, self.finish_reason)
        tokens = [int(token) for token in tokens_C if token >= 0]
        if len(tokens) < len(tokens_C):
            self.finish_reason = "stop"
        self._num_generated += len(tokens)
        if self._num_generated == self._sampling.max_new_tokens:
            self.finish_reason = "length"
        for i, token in enumerate(tokens if self._detokenizer else ()):
            self._detokenizer.feed([token])
            if self._detokenizer.stopped:
                tokens, self.finish_reason = tokens[: i + 1], "stop"
                break
        logprobs = logprobs_C[: len(tokens)].tolist() if self._sampling.logprobs else None
        return Completion(tokens, logprobs, self.finish_reason)


def max_compilations(config: ModelConfig, decoders: int = 1) -> int:
    """Returns the maximum number of programs compiled for a number of prompts (rounded to a power of two).

    `decoders` is 2 if answers both with and without log-probabilities are wanted.
    """
    lengths = {_cache_len(config, tokens) for tokens in range(1, config.max_position_embeddings + 1)}
    return len(lengths) * (2 + len(PREFILL_CHUNKS) + decoders)


def next_power_of_two(count: int) -> int:
    """Returns the smallest power of two that is at least `count`."""
    return 1 << max(count - 1, 0).bit_length()


def _cache_len(config: ModelConfig, tokens: int) -> int:
    """Returns the slots of the smallest cache that holds `tokens` tokens."""
    length = MIN_CACHE_LEN * next_power_of_two(-(-tokens // MIN_CACHE_LEN))
    return min(length, config.max_position_embeddings)


def _prefill_chunks(tokens: int, batch: int) -> Iterator[tuple[int, int]]:
    """Splits `tokens` tokens into chunks (start, size).

    At most half of the last chunk is padding, unless it has the smallest size: every call reads all weights,
    so fewer calls are worth some padding.
    """
    sizes = [size for size in PREFILL_CHUNKS if size * batch <= MAX_PREFILL_TOKENS] or PREFILL_CHUNKS[-1:]
    start = 0
    while start < tokens:
        left = tokens - start
        size = next((size for size in sizes if size <= left), sizes[-1])
        size = min((wider for wider in sizes if left <= wider <= 2 * left), default=size)
        yield start, size
        start += size


def _next_num_steps(num_steps: int, seconds: float) -> int:
    """Returns the steps of a stream's next decode call, given the last call's steps and time."""
    if jax.process_count() > 1:
        return min(2 * num_steps, MULTI_HOST_STEPS)
    if seconds < STREAM_INTERVAL:
        return min(2 * num_steps, MAX_STEPS)
    return max(num_steps // 2, 1) if seconds > 2 * STREAM_INTERVAL else num_steps


def _initial_state(
    config: ModelConfig, prompts: list[np.ndarray], sampling: list[SamplingParams], batch: int
) -> DecodeState:
    """Returns the state after the prefill. Rows from `len(prompts)` to `batch` are done."""
    unused = batch - len(prompts)

    def column(name, neutral, dtype):
        values = [getattr(one, name) for one in sampling]
        return np.array([neutral if value is None else value for value in values] + [neutral] * unused, dtype)

    is_stop_BV = np.zeros((batch, config.vocab_size), bool)
    for row, one in zip(is_stop_BV, sampling, strict=False):
        row[list(one.stop_tokens)] = True
    return DecodeState(
        token_B=np.array([prompt[-1] for prompt in prompts] + [0] * unused, np.int32),
        done_B=np.array([False] * len(prompts) + [True] * unused),
        num_generated=np.int32(0),
        max_new_tokens_B=column("max_new_tokens", 0, np.int32),
        is_stop_BV=is_stop_BV,
        seed_B=column("seed", 0, np.uint32),
        sampling_settings=SamplingSettings.of([*sampling, *[None] * unused]),
    )


def _constrain_cache(cache: KVCache) -> KVCache:
    """Gives the cache the same sharding after every program; a different one would recompile the next."""
    layers = jax.tree.map(lambda leaf: constrain(leaf, CACHE_LBKSH), cache.layers)
    return KVCache(layers, constrain(cache.lengths, ROWS))


@functools.partial(jax.jit, static_argnames=("config", "batch", "cache_len"))
def _init_cache(config: ModelConfig, batch: int, cache_len: int) -> KVCache:
    return _constrain_cache(init_cache(config, batch, cache_len, compute_dtype(config)))


@functools.partial(jax.jit, static_argnames=("config", "cache_len"))
def _grow(config: ModelConfig, cache: KVCache, cache_len: int) -> KVCache:
    return _constrain_cache(grow(config, cache, cache_len))


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def _prefill(
    config: ModelConfig, params: dict, cache: KVCache, tokens_BT: jax.Array, count_B: jax.Array
) -> KVCache:
    """Reads the first `count_B` tokens of each row into the cache."""
    segment_ids_BT = (jnp.arange(tokens_BT.shape[1], dtype=jnp.int32) < count_B[:, None]).astype(jnp.int32)
    model = bind(config, params)
    return _constrain_cache(model.hidden_states(tokens_BT, segment_ids_BT, cache=cache)[1])


@functools.partial(jax.jit, static_argnames=("config", "logprobs"), donate_argnames="cache")
def _decode(
    config: ModelConfig,
    params: dict,
    cache: KVCache,
    state: DecodeState,
    num_steps: jax.Array,
    logprobs: bool,
) -> tuple[KVCache, jax.Array, jax.Array]:
    """Samples up to `num_steps` (traced, at most MAX_STEPS) tokens for every row that is not done.

    Returns the cache; the tokens, int32 [B, MAX_STEPS], -1 where a row was done; and, if `logprobs`, their
    log-probabilities, float32 of the same shape, else [B, 0].
    """
    model = bind(config, params)
    keys_B = sequence_keys(state.seed_B)

    def is_running(carry):
        step, _, _, done_B, *_ = carry
        return (step < num_steps) & ~jnp.all(done_B)

    def one_step(carry):
        step, cache, token_B, done_B, tokens_BC, logprobs_BC = carry
        hidden_BTD, cache, _ = model.hidden_states(
            token_B[:, None], (~done_B).astype(jnp.int32)[:, None], cache=cache
        )
        logits_BV = model.logits(hidden_BTD)[:, 0]
        token_B = sample(logits_BV, step_keys(keys_B, state.num_generated + step), state.sampling_settings)
        done_B |= jnp.take_along_axis(state.is_stop_BV, token_B[:, None], axis=1)[:, 0]
        tokens_BC = tokens_BC.at[:, step].set(jnp.where(done_B, -1, token_B))
        if logprobs:
            chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=1)[:, 0]
            logprobs_BC = logprobs_BC.at[:, step].set(chosen_B - jax.nn.logsumexp(logits_BV, axis=1))
        done_B |= state.num_generated + step + 1 >= state.max_new_tokens_B
        return step + 1, _constrain_cache(cache), token_B, done_B, tokens_BC, logprobs_BC

    B = state.token_B.shape[0]
    tokens_BC = jnp.full((B, MAX_STEPS), -1, jnp.int32)
    logprobs_BC = jnp.zeros((B, MAX_STEPS if logprobs else 0), jnp.float32)
    carry = jnp.int32(0), cache, state.token_B, state.done_B, tokens_BC, logprobs_BC
    _, cache, _, _, tokens_BC, logprobs_BC = jax.lax.while_loop(is_running, one_step, carry)
    # Every process of a mesh reads all answers.
    return _constrain_cache(cache), constrain(tokens_BC, P()), constrain(logprobs_BC, P())
