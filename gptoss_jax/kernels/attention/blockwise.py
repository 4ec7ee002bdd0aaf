"""Blockwise attention in plain XLA for all platforms: forward and backward pass without a [T, T] array
(Dao 2023, arXiv:2307.08691; the sink's gradient: docs/math.md, "Forward pass").

Letters: B batch, T queries and keys, S keys per block, N query heads, K key/value heads, G = N / K, H head
size; C tokens per block, R = G * C query rows per key/value head.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gptoss_jax.kernels import backend
from gptoss_jax.kernels.attention.reference import (
    MASK_VALUE,
    AttentionSpec,
    apply_dropout,
    attention_mask,
    einsum,
    group_heads,
    masked,
    segment_starts,
    sinks_of_rows,
    ungroup_heads,
)

# Maximum number of tokens per block: large enough for fast matmuls, small enough that the scores stay in
# cache and little work is masked out, which matters most in sliding-window layers on CPU.
BLOCK, WINDOW_BLOCK = 256, 64

State = TypeVar("State", bound=tuple[jax.Array, ...])


class _Inputs(NamedTuple):
    q: jax.Array  # [B, K, blocks, R, H], scaled
    k_BKTH: jax.Array
    v_BKTH: jax.Array
    segment_ids_BT: jax.Array
    positions_BT: jax.Array
    starts_BT: jax.Array  # the index at which each token's segment starts
    offset: jax.Array  # the index of the first query among the keys, int32
    sinks_N: jax.Array | None
    dropout_key: jax.Array | None


_Residuals = tuple[_Inputs, jax.Array, jax.Array]  # inputs, output, log of the softmax denominator


class _KeyBlock(NamedTuple):
    """A block of keys and values that some queries of a block can see."""

    k_BKSH: jax.Array
    v_BKSH: jax.Array
    mask_BCS: jax.Array
    pair: jax.Array  # the index of the pair of blocks, for dropout
    add: Callable  # (total_BKTH, x_BKSH) -> total_BKTH with x added at these keys


def blockwise_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segment_ids_BS: jax.Array,
    positions_BS: jax.Array,
    spec: AttentionSpec,
    *,
    sinks_N: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
    offset: int | jax.Array = 0,
    block: int | None = None,
) -> jax.Array:
    """Computes attention in plain XLA, one block of queries and keys at a time. The arguments are those of
    `api.attention`; `block` is the maximum number of tokens in a block. Returns [B, T, N, H].

    For each block of queries, key blocks that none of them can see are skipped: those after the block, before
    its window, and before the first query's segment. A sliding-window layer thus costs O(T * W).
    """
    (B, T, N, H), (_, S, K, _) = q_BTNH.shape, k_BSKH.shape
    if block is None:
        block = WINDOW_BLOCK if spec.window is not None and backend.platform() == "cpu" else BLOCK
    blocks = -(-T // block)
    C = -(-T // blocks)
    # Blocks of keys start at multiples of C, and the last block of queries must end before the last one.
    padding_T = blocks * C - T
    padding_S = -(-(S + padding_T) // C) * C - S

    def pad(x, padding, value=0):
        widths = (0, 0), (0, padding), *[(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, widths, constant_values=value)

    # Padding that fills the last block is a separate segment.
    segment_ids_BS = pad(segment_ids_BS, padding_S, -1)
    group = jax.vmap(functools.partial(group_heads, K=K), in_axes=1, out_axes=2)
    q = group(pad(q_BTNH, padding_T).reshape(B, blocks, C, N, H))
    k_BKSH, v_BKSH = (pad(x, padding_S).transpose(0, 2, 1, 3) for x in (k_BSKH, v_BSKH))
    tokens = segment_ids_BS, pad(positions_BS, padding_S), segment_starts(segment_ids_BS)
    inputs = _Inputs(q, k_BKSH, v_BKSH, *tokens, jnp.asarray(offset, jnp.int32), sinks_N, dropout_key)
    out = _attention(spec, C, inputs)
    ungroup = jax.vmap(functools.partial(ungroup_heads, T=C), in_axes=2, out_axes=1)
    return ungroup(out).reshape(B, blocks * C, N, H)[:, :T]


class SoftmaxState(NamedTuple):
    """Online softmax over the keys seen so far: the running maximum of the scores and, relative to it, the
    sum of the weights and the weighted sum of the values."""

    largest_BKR: jax.Array
    total_BKR: jax.Array
    out_BKRH: jax.Array


def init_softmax(q_BKRH: jax.Array, sinks_N: jax.Array | None) -> SoftmaxState:
    """Returns the state before the first key; a sink is a logit without a value."""
    shape, dtype = q_BKRH.shape, jnp.promote_types(q_BKRH.dtype, jnp.float32)
    out_BKRH, total_BKR = jnp.zeros(shape, dtype), jnp.zeros(shape[:3], dtype)
    if sinks_N is None:
        return SoftmaxState(jnp.full_like(total_BKR, MASK_VALUE), total_BKR, out_BKRH)
    sinks_KR = sinks_of_rows(sinks_N, *shape[1:3]).astype(dtype)
    return SoftmaxState(total_BKR + sinks_KR, total_BKR + 1, out_BKRH)


def update_softmax(
    state: SoftmaxState, scores_BKRS: jax.Array, v_BKSH: jax.Array, drop: Callable = lambda weights: weights
) -> SoftmaxState:
    """Updates the state with a block of keys and their masked scores. `drop` applies dropout to the weights.

    MASK_VALUE is finite, so a row accumulates meaningless weights until it sees its first key, which rescales
    them by 0.
    """
    largest_BKR = jnp.maximum(state.largest_BKR, jnp.max(scores_BKRS, axis=-1))
    weights_BKRS = jnp.exp(scores_BKRS - largest_BKR[..., None])
    shrink_BKR = jnp.exp(state.largest_BKR - largest_BKR)
    total_BKR = state.total_BKR * shrink_BKR + jnp.sum(weights_BKRS, axis=-1)
    more_BKRH = einsum("BKRS,BKSH->BKRH", drop(weights_BKRS).astype(v_BKSH.dtype), v_BKSH)
    return SoftmaxState(largest_BKR, total_BKR, state.out_BKRH * shrink_BKR[..., None] + more_BKRH)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(spec: AttentionSpec, C: int, x: _Inputs) -> jax.Array:
    return _forward(spec, C, x)[0]


def _forward(spec: AttentionSpec, C: int, x: _Inputs) -> tuple[jax.Array, _Residuals]:
    def one_block(i, carry):
        q_BKRH = _block_of(x.q, i)

        def step(keys, state):
            dropout = functools.partial(_drop, spec, x.dropout_key, keys)
            return update_softmax(state, _scores(q_BKRH, keys), keys.v_BKSH, dropout)

        largest_BKR, total_BKR, out_BKRH = _over_keys(spec, C, x, i, step, init_softmax(q_BKRH, x.sinks_N))
        results = (out_BKRH / total_BKR[..., None]).astype(x.q.dtype), largest_BKR + jnp.log(total_BKR)
        return tuple(lax.dynamic_update_index_in_dim(a, b, i, 2) for a, b in zip(carry, results, strict=True))

    empty = jnp.zeros_like(x.q), jnp.zeros(x.q.shape[:-1], jnp.promote_types(x.q.dtype, jnp.float32))
    out, lse = lax.fori_loop(np.int32(0), np.int32(x.q.shape[2]), one_block, empty)
    return out, (x, out, lse)


def _backward(spec: AttentionSpec, C: int, residuals: _Residuals, d_out: jax.Array) -> tuple[_Inputs]:
    x, out, lse = residuals
    delta = jnp.sum(d_out.astype(lse.dtype) * out.astype(lse.dtype), axis=-1)

    def one_block(i, carry):
        dq, dk_BKTH, dv_BKTH = carry
        q_BKRH, d_out_BKRH = _block_of(x.q, i), _block_of(d_out, i)
        lse_BKR1, delta_BKR1 = _block_of(lse, i)[..., None], _block_of(delta, i)[..., None]

        def step(keys, state):
            dq_BKRH, dk_BKTH, dv_BKTH = state
            dropout = functools.partial(_drop, spec, x.dropout_key, keys)
            weights_BKRS = jnp.exp(_scores(q_BKRH, keys) - lse_BKR1)
            d_weights_BKRS = dropout(einsum("BKRH,BKSH->BKRS", d_out_BKRH, keys.v_BKSH))
            d_scores_BKRS = (weights_BKRS * (d_weights_BKRS - delta_BKR1)).astype(dq.dtype)
            weights_BKRS = dropout(weights_BKRS).astype(dq.dtype)
            dq_BKRH = dq_BKRH + einsum("BKRS,BKSH->BKRH", d_scores_BKRS, keys.k_BKSH)
            dk_BKTH = keys.add(dk_BKTH, einsum("BKRS,BKRH->BKSH", d_scores_BKRS, q_BKRH))
            dv_BKTH = keys.add(dv_BKTH, einsum("BKRS,BKRH->BKSH", weights_BKRS, d_out_BKRH))
            return dq_BKRH, dk_BKTH, dv_BKTH

        state = jnp.zeros(q_BKRH.shape, lse.dtype), dk_BKTH, dv_BKTH
        dq_BKRH, dk_BKTH, dv_BKTH = _over_keys(spec, C, x, i, step, state)
        return lax.dynamic_update_index_in_dim(dq, dq_BKRH.astype(dq.dtype), i, 2), dk_BKTH, dv_BKTH

    zeros = jnp.zeros_like(x.q), *(jnp.zeros(y.shape, lse.dtype) for y in (x.k_BKTH, x.v_BKTH))
    dq, dk_BKTH, dv_BKTH = lax.fori_loop(np.int32(0), np.int32(x.q.shape[2]), one_block, zeros)
    d_sinks_N = None
    if x.sinks_N is not None:
        B, K, blocks, R, _ = dq.shape
        weights = jnp.exp(sinks_of_rows(x.sinks_N, K, R).astype(lse.dtype)[:, None] - lse)
        d_sinks = jnp.sum((weights * delta).reshape(B, K, blocks, -1, C), axis=(0, 2, 4))
        d_sinks_N = -d_sinks.reshape(-1).astype(x.sinks_N.dtype)
    dk_BKTH, dv_BKTH = dk_BKTH.astype(x.k_BKTH.dtype), dv_BKTH.astype(x.v_BKTH.dtype)
    none: Any = None  # integers have no gradient
    return (_Inputs(dq, dk_BKTH, dv_BKTH, none, none, none, none, d_sinks_N, None),)


_attention.defvjp(_forward, _backward)


def _over_keys(
    spec: AttentionSpec,
    C: int,
    x: _Inputs,
    i: jax.Array,
    step: Callable[[_KeyBlock, State], State],
    state: State,
) -> State:
    """Folds `step(keys, state)` over the key blocks that queries of block i may see."""
    T = x.positions_BT.shape[1]
    first_query = x.offset + i * C

    def read(array, block, axis):
        return lax.dynamic_slice_in_dim(array, block * C, C, axis)

    def read_queries(array):
        return lax.dynamic_slice_in_dim(array, first_query, C, axis=1)

    queries = read_queries(x.segment_ids_BT), read_queries(x.positions_BT)
    # Only the first query's segment can start before the block.
    start_B = read_queries(x.starts_BT)[:, 0]
    earliest_B = start_B if spec.window is None else jnp.maximum(start_B, first_query - spec.window + 1)
    first_block, end_block = jnp.min(earliest_B) // C, (first_query + C - 1) // C + 1

    def one_block(j, state):
        def add(total_BKTH, x_BKSH):
            return lax.dynamic_update_slice_in_dim(total_BKTH, read(total_BKTH, j, 2) + x_BKSH, j * C, 2)

        keys = read(x.segment_ids_BT, j, 1), read(x.positions_BT, j, 1)
        mask_BCS = attention_mask(*queries, spec, *keys)
        k_BKSH, v_BKSH = read(x.k_BKTH, j, 2), read(x.v_BKTH, j, 2)
        return step(_KeyBlock(k_BKSH, v_BKSH, mask_BCS, i * (T // C + 1) + j, add), state)

    if spec.sink_tokens:
        # Only sink tokens outside of the blocks of the loop below.
        index_BS = start_B[:, None] + jnp.arange(min(spec.sink_tokens, T), dtype=jnp.int32)
        is_far_BS = index_BS < first_block * C
        index_BS = jnp.minimum(index_BS, T - 1)
        batch_B1 = jnp.arange(len(index_BS), dtype=jnp.int32)[:, None]

        def add_far(total_BKTH, x_BKSH):
            x_BSKH = jnp.where(is_far_BS[..., None, None], x_BKSH.swapaxes(1, 2), 0)
            return total_BKTH.at[batch_B1, :, index_BS].add(x_BSKH)

        keys = (jnp.take_along_axis(y, index_BS, axis=1) for y in (x.segment_ids_BT, x.positions_BT))
        mask_BCS = attention_mask(*queries, spec, *keys) & is_far_BS[:, None]
        k_BKSH, v_BKSH = (y[batch_B1, :, index_BS].swapaxes(1, 2) for y in (x.k_BKTH, x.v_BKTH))
        state = step(_KeyBlock(k_BKSH, v_BKSH, mask_BCS, i * (T // C + 1) + T // C, add_far), state)
    return lax.fori_loop(first_block, end_block, one_block, state)


def _block_of(x: jax.Array, i: jax.Array) -> jax.Array:
    return lax.dynamic_index_in_dim(x, i, axis=2, keepdims=False)


def _scores(q_BKRH: jax.Array, keys: _KeyBlock) -> jax.Array:
    return masked(einsum("BKRH,BKSH->BKRS", q_BKRH, keys.k_BKSH), keys.mask_BCS)


def _drop(
    spec: AttentionSpec, dropout_key: jax.Array | None, keys: _KeyBlock, weights_BKRS: jax.Array
) -> jax.Array:
    """Applies dropout to weights or their gradient, with the same mask for the same pair of blocks."""
    key = None if dropout_key is None else jax.random.fold_in(dropout_key, keys.pair)
    return apply_dropout(weights_BKRS, spec.dropout, key)
