"""The engine's device state, one pytree with a row per slot, and the jitted functions on it.

A prompt is prefilled in chunks into a "row" (a batch-1 cache), which is then inserted into a slot. One
program decodes all slots, each with its own sampling parameters; free slots cost only their rows in the dense
matmuls. Only sampled tokens and log-probabilities are copied to the host.

Letters: B slots, or rows of a prefill; T tokens of a prefill chunk, V vocabulary, U 32-bit words of a token
mask, C steps of a decode call, K top tokens.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from gptoss_jax.config import ModelConfig
from gptoss_jax.inference.sampling import (
    Array,
    SamplingSettings,
    adjust_logits,
    is_in_token_mask,
    make_token_mask,
    sample,
    sequence_keys,
    step_keys,
    token_logprobs,
    top_logprobs,
)
from gptoss_jax.inference.sampling_params import SamplingParams
from gptoss_jax.model.kv_cache import KVCache, grow, init_cache
from gptoss_jax.model.transformer import Transformer, bind, compute_dtype
from gptoss_jax.parallel.context import splits_prefill
from gptoss_jax.parallel.rules import CACHE_LBKSH, SEQUENCES_LBKSH, constrain

# Maximum steps per decode call.
MAX_STEPS = 64
# Markers in a decode call's tokens: the slot did not run; a stop token was sampled (STOPPED - token).
NOT_RUN, STOPPED = -1, -2
# Positions per chunk of prompt log-probabilities: bounds the memory of the logits.
LOGPROB_CHUNK = 32
ABSENT: Any = None  # a part of the state that a program handles apart from the rest
ROW_LBKSH = P(None, None, *CACHE_LBKSH[2:])  # a row is not sharded over the batch axes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """State of all slots. A slot is running unless it is done or paused."""

    cache: KVCache
    token_B: jax.Array  # int32, the latest token, not yet in the cache
    done_B: jax.Array  # bool, free or finished
    paused_B: jax.Array  # bool
    num_generated_B: jax.Array  # int32, tokens sampled so far
    counts_BV: jax.Array  # int32, how often each token was sampled
    requests: "SlotRequest"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotRequest:
    """Parameters of each slot's request, as arrays with one row per slot."""

    max_new_tokens: Array  # int32 [B]
    seed: Array  # uint32 [B]
    stop_mask: Array  # int32 [B, U], the stop tokens
    pause_token: Array  # int32 [B], after which the slot pauses; -1 for none
    has_logprobs: Array  # bool [B]
    has_top_logprobs: Array  # bool [B]
    sampling: SamplingSettings

    @classmethod
    def of(
        cls, config: ModelConfig, params: SamplingParams | None, pause_token: int | None = None
    ) -> "SlotRequest":
        """Returns one row as NumPy arrays; `params=None` gives the row of a free slot."""
        one = SamplingParams() if params is None else params
        return cls(
            max_new_tokens=np.array([0 if params is None else one.max_new_tokens], np.int32),
            seed=np.array([one.seed], np.uint32),
            stop_mask=make_token_mask(one.stop_tokens, config.vocab_size)[None],
            pause_token=np.array([-1 if pause_token is None else pause_token], np.int32),
            has_logprobs=np.array([one.logprobs]),
            has_top_logprobs=np.array([one.logprobs and one.top_logprobs > 0]),
            sampling=SamplingSettings.of([params]),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeOutput:
    """Results of a decode call. Log-probabilities are undefined for slots that did not request them."""

    tokens_BC: Array  # int32; STOPPED - token for a stop token, NOT_RUN where the slot was not running
    logprobs_BC: Array  # float32
    top_tokens_BCK: Array  # int32
    top_logprobs_BCK: Array  # float32


def _constrain_cache(cache: KVCache | None, spec: P = CACHE_LBKSH) -> KVCache:
    """Fixes the sharding of a cache, so that the next program does not recompile for another one."""
    assert cache is not None  # None is only returned for None
    layers = jax.tree.map(lambda leaf: constrain(leaf, spec), cache.layers)
    return KVCache(layers, constrain(cache.lengths, P(spec[1]) if spec else P()))


def _constrain_slots(slots: Slots) -> Slots:
    rest = dataclasses.replace(slots, cache=ABSENT)  # small, and replicated
    rest = jax.tree.map(lambda leaf: constrain(leaf, P()), rest)
    return dataclasses.replace(rest, cache=_constrain_cache(slots.cache))


@functools.partial(jax.jit, static_argnames=("config", "num_slots", "cache_len"))
def init_slots(config: ModelConfig, num_slots: int, cache_len: int) -> Slots:
    """Returns free slots with a cache of `cache_len` tokens each."""
    B, V = num_slots, config.vocab_size
    free = SlotRequest.of(config, None)
    return _constrain_slots(
        Slots(
            cache=init_cache(config, B, cache_len, compute_dtype(config)),
            token_B=jnp.zeros(B, jnp.int32),
            done_B=jnp.ones(B, bool),
            paused_B=jnp.zeros(B, bool),
            num_generated_B=jnp.zeros(B, jnp.int32),
            counts_BV=jnp.zeros((B, V), jnp.int32),
            requests=jax.tree.map(lambda leaf: jnp.repeat(jnp.asarray(leaf), B, axis=0), free),
        )
    )


@functools.partial(jax.jit, static_argnames=("config", "cache_len"))
def grow_slots(config: ModelConfig, slots: Slots, cache_len: int) -> Slots:
    """Returns the slots with the cache grown to `cache_len` tokens each."""
    return _constrain_slots(dataclasses.replace(slots, cache=grow(config, slots.cache, cache_len)))


@functools.partial(jax.jit, static_argnames=("config", "cache_len"))
def init_row(config: ModelConfig, cache_len: int) -> KVCache:
    """Returns an empty batch-1 cache."""
    return _constrain_cache(init_cache(config, 1, cache_len, compute_dtype(config)), ROW_LBKSH)


@functools.partial(jax.jit, static_argnames=("config", "batch", "has_logprobs"), donate_argnames="rows")
def prefill(
    config: ModelConfig,
    params: dict,
    rows: list[KVCache],
    tokens_BT: jax.Array,
    targets_BT: jax.Array,
    count_B: jax.Array,
    *,
    batch: int,
    has_logprobs: bool,
) -> tuple[list[KVCache], tuple[jax.Array, jax.Array, jax.Array] | None]:
    """Prefills a chunk of each prompt into its row.

    Args:
      rows: batch-1 caches, all of the same length.
      tokens_BT: int32, one chunk per row.
      targets_BT: int32, the next tokens; used only if `has_logprobs`.
      count_B: int32, number of tokens in each chunk without padding.
      batch: batch size of the program, at least `len(rows)` and a multiple of `prefill_shards`.

    Returns:
      The rows and, if `has_logprobs`, the log-probability of each target, float32 [B, T], and the most likely
      tokens and their log-probabilities, [B, T, K].
    """
    num_rows = len(rows)

    def pad(x):
        return jnp.pad(x, ((0, batch - num_rows), *[(0, 0)] * (x.ndim - 1)))

    tokens_BT, count_B = pad(tokens_BT), pad(count_B)
    layers = jax.tree.map(
        lambda *leaves: _pad_rows(jnp.concatenate(leaves, axis=1), batch), *[r.layers for r in rows]
    )
    spec = SEQUENCES_LBKSH if splits_prefill(tokens_BT.shape[1]) else CACHE_LBKSH
    before = _constrain_cache(KVCache(layers, pad(jnp.concatenate([row.lengths for row in rows]))), spec)
    segment_ids_BT = (jnp.arange(tokens_BT.shape[1], dtype=jnp.int32) < count_B[:, None]).astype(jnp.int32)
    model = bind(config, params)
    hidden_BTD, cache, _ = model.hidden_states(tokens_BT, segment_ids_BT, cache=before)
    assert cache is not None  # as there was one before
    rows = [
        _constrain_cache(
            KVCache(
                jax.tree.map(lambda leaf: leaf[:, i : i + 1], cache.layers),  # noqa: B023 (called here)
                cache.lengths[i : i + 1],
            ),
            ROW_LBKSH,
        )
        for i in range(num_rows)
    ]
    return rows, _prompt_logprobs(model, hidden_BTD[:num_rows], targets_BT) if has_logprobs else None


def _pad_rows(leaf_LBKSH: jax.Array, batch: int) -> jax.Array:
    missing = batch - leaf_LBKSH.shape[1]
    return jnp.pad(leaf_LBKSH, ((0, 0), (0, missing), (0, 0), (0, 0), (0, 0))) if missing else leaf_LBKSH


def _prompt_logprobs(
    model: Transformer, hidden_BTD: jax.Array, targets_BT: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the log-probabilities of targets and most likely tokens, computed in chunks to bound memory."""
    B, T, _ = hidden_BTD.shape
    chunks = T // LOGPROB_CHUNK

    def one_chunk(inputs):
        hidden_BCD, targets_BC = inputs
        logits_BCV = model.logits(hidden_BCD)
        logits_MV = logits_BCV.reshape(-1, logits_BCV.shape[-1])
        best = top_logprobs(logits_MV, jnp.ones(len(logits_MV), bool))
        found = token_logprobs(logits_MV, targets_BC.reshape(-1)), *best
        return jax.tree.map(lambda x: x.reshape(*targets_BC.shape, *x.shape[1:]), found)

    def split(x):
        return jnp.moveaxis(x.reshape(B, chunks, T // chunks, *x.shape[2:]), 1, 0)

    found = lax.map(one_chunk, (split(hidden_BTD), split(targets_BT)))
    found = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(B, T, *x.shape[3:]), found)
    return jax.tree.map(lambda x: constrain(x, P()), found)


@functools.partial(jax.jit, donate_argnames="slots")
def insert(slots: Slots, row: KVCache, slot: jax.Array, token: jax.Array, request: SlotRequest) -> Slots:
    """Starts a request in a slot.

    Args:
      row: batch-1 cache of the prompt without its last token, at most as long as the slots' cache.
      slot: int32 scalar, index of the slot.
      token: int32 scalar, the prompt's last token.
      request: the request's parameters, one row.
    """

    def put(leaf, new):
        return lax.dynamic_update_slice(leaf, new, (slot, *[jnp.int32(0)] * (leaf.ndim - 1)))

    def put_layer(stack, new):
        start = jnp.int32(0), slot, *[jnp.int32(0)] * 3
        return lax.dynamic_update_slice(stack, new.astype(stack.dtype), start)

    cache = KVCache(
        jax.tree.map(put_layer, slots.cache.layers, row.layers), put(slots.cache.lengths, row.lengths)
    )
    return _constrain_slots(
        Slots(
            cache=cache,
            token_B=put(slots.token_B, token[None]),
            done_B=put(slots.done_B, jnp.zeros(1, bool)),
            paused_B=put(slots.paused_B, jnp.zeros(1, bool)),
            num_generated_B=put(slots.num_generated_B, jnp.zeros(1, jnp.int32)),
            counts_BV=put(slots.counts_BV, jnp.zeros((1, slots.counts_BV.shape[1]), jnp.int32)),
            requests=jax.tree.map(put, slots.requests, request),
        )
    )


@functools.partial(jax.jit, static_argnames="config", donate_argnames="slots")
def decode(
    config: ModelConfig,
    params: dict,
    slots: Slots,
    num_steps: jax.Array,
    allowed_BU: jax.Array,
    changes: tuple[jax.Array, jax.Array],
) -> tuple[Slots, DecodeOutput]:
    """Samples up to `num_steps` (traced, at most MAX_STEPS) tokens in every running slot.

    Args:
      allowed_BU: int32, token mask of the tokens that grammars allow; -1 allows all. If any token is masked,
        `num_steps` must be 1.
      changes: two bool arrays [B], applied first: slots to stop, and paused slots to resume.
    """
    model = bind(config, params)
    requests, (ends_B, continues_B) = slots.requests, changes
    slots = dataclasses.replace(slots, done_B=slots.done_B | ends_B, paused_B=slots.paused_B & ~continues_B)
    keys_B = sequence_keys(requests.seed)
    B, V = slots.counts_BV.shape

    def is_running(carry):
        step, slots, _ = carry
        return (step < num_steps) & ~jnp.all(slots.done_B | slots.paused_B)

    def one_step(carry):
        step, slots, decoded = carry
        running_B = ~(slots.done_B | slots.paused_B)
        hidden_BTD, cache, _ = model.hidden_states(
            slots.token_B[:, None], running_B.astype(jnp.int32)[:, None], cache=slots.cache
        )
        logits_BV = model.logits(hidden_BTD)[:, 0]
        settings = requests.sampling.where(running_B)
        adjusted_BV = adjust_logits(
            logits_BV, settings, slots.counts_BV, jnp.where(running_B[:, None], allowed_BU, -1)
        )
        token_B = sample(adjusted_BV, step_keys(keys_B, slots.num_generated_B), settings)
        stops_B = is_in_token_mask(requests.stop_mask, token_B)
        found_B = jnp.where(running_B, jnp.where(stops_B, STOPPED - token_B, token_B), NOT_RUN)
        is_added_B = running_B & ~stops_B
        num_generated_B = slots.num_generated_B + is_added_B
        slots = Slots(
            cache=_constrain_cache(cache),
            token_B=jnp.where(running_B, token_B, slots.token_B),
            done_B=slots.done_B | (running_B & (stops_B | (num_generated_B >= requests.max_new_tokens))),
            paused_B=slots.paused_B | (is_added_B & (token_B == requests.pause_token)),
            num_generated_B=num_generated_B,
            counts_BV=slots.counts_BV.at[jnp.arange(B, dtype=jnp.int32), token_B].add(
                is_added_B.astype(jnp.int32)
            ),
            requests=ABSENT,
        )
        logprobs_B = lax.cond(
            jnp.any(running_B & requests.has_logprobs),
            lambda: token_logprobs(logits_BV, token_B),
            lambda: jnp.zeros(B, jnp.float32),
        )
        top_BK = top_logprobs(logits_BV, running_B & requests.has_top_logprobs)
        decoded = jax.tree.map(
            lambda all_steps, new: all_steps.at[:, step].set(new),
            decoded,
            DecodeOutput(found_B, logprobs_B, *top_BK),
        )
        return step + 1, slots, decoded

    none_BCK = [
        jnp.zeros((B, MAX_STEPS, *x.shape[1:]), x.dtype)
        for x in jax.eval_shape(top_logprobs, jax.ShapeDtypeStruct((B, V), jnp.float32), ends_B)
    ]
    decoded = DecodeOutput(
        jnp.full((B, MAX_STEPS), NOT_RUN, jnp.int32), jnp.zeros((B, MAX_STEPS), jnp.float32), *none_BCK
    )
    carry = jnp.int32(0), dataclasses.replace(slots, requests=ABSENT), decoded
    _, slots, decoded = lax.while_loop(is_running, one_step, carry)
    slots = _constrain_slots(dataclasses.replace(slots, requests=requests))
    # Replicated: every process reads all tokens.
    return slots, jax.tree.map(lambda x: constrain(x, P()), decoded)


def to_host(decoded: DecodeOutput, has_logprobs: bool, has_top_logprobs: bool) -> DecodeOutput:
    """Copies the results to NumPy arrays, log-probabilities only if requested."""
    return DecodeOutput(
        np.asarray(decoded.tokens_BC),
        np.asarray(decoded.logprobs_BC) if has_logprobs else ABSENT,
        np.asarray(decoded.top_tokens_BCK) if has_top_logprobs else ABSENT,
        np.asarray(decoded.top_logprobs_BCK) if has_top_logprobs else ABSENT,
    )
