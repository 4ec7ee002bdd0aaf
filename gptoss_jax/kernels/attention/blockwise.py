"""Attention in blocks of queries and keys, in plain XLA: runs everywhere, forward and backward without a [T,
T] array (Dao 2023, arXiv:2307.08691; the sink's gradient: MATH.md, "Forward").

Letters: B batch, T queries and keys, N query heads, K key/value heads, G = N / K, H head size; C tokens of a
block, R = G * C query rows of one key/value head.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gptoss_jax.kernels import backend
from gptoss_jax.kernels.attention.mask import MASKED, segment_starts, visible

# Tokens of a block at most: large enough for the products to be fast, small enough for its scores to stay in
# the cache and for little to be computed that is masked; in a sliding layer on CPU that counts for more.
BLOCK, WINDOW_BLOCK = 256, 64


class _Static(NamedTuple):
    """What a program is compiled for."""

    window: int | None
    sink_tokens: int
    dropout: float
    block: int


class _Row(NamedTuple):
    """What the mask rule needs of the tokens of a row, and where each one's segment begins; int32 [B, T]."""

    positions: jax.Array
    segments: jax.Array
    starts: jax.Array


def blockwise_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array,
    window: int | None,
    sink_tokens: int = 0,
    sinks_N: jax.Array | None = None,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
    block: int | None = None,
) -> jax.Array:
    """Attention of rows to themselves, see `flash_attention.flash_attention`. Returns [B, T, N, H].

    Blocks of keys that no query of a block can see are not visited: those after it, those before its window,
    and those before the first query's segment. So a sliding layer costs O(T * W).
    """
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    if block is None:
        block = WINDOW_BLOCK if window is not None and backend.platform() == "cpu" else BLOCK
    count = -(-T // block)
    size = -(-T // count)
    static = _Static(window, sink_tokens if window is not None else 0, 0.0, size)
    if dropout_key is not None and dropout > 0:
        static = static._replace(dropout=dropout)
    rows = (0, count * size - T)

    def heads_first(x_BTKH):
        return jnp.pad(x_BTKH, ((0, 0), rows, (0, 0), (0, 0))).transpose(0, 2, 1, 3)

    # Tokens that fill the last block up are a segment of their own.
    segments_BT = jnp.pad(segment_ids_BT, ((0, 0), rows), constant_values=-1)
    row = _Row(jnp.pad(positions_BT, ((0, 0), rows)), segments_BT, segment_starts(segments_BT))
    # [B, K, blocks, R, H]: the products are batched matrix products over [B, K].
    q = jnp.pad(q_BTNH * jnp.asarray(H**-0.5, q_BTNH.dtype), ((0, 0), rows, (0, 0), (0, 0)))
    q = q.reshape(B, count, size, K, N // K, H).transpose(0, 3, 1, 4, 2, 5)
    q = q.reshape(B, K, count, -1, H)
    out = _attend(static, q, heads_first(k_BTKH), heads_first(v_BTKH), sinks_N, row, dropout_key)
    out = out.reshape(B, K, count, N // K, size, H).transpose(0, 2, 4, 1, 3, 5)
    return out.reshape(B, count * size, N, H)[:, :T]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static, q, k, v, sinks_N, row, dropout_key):
    return _forward(static, q, k, v, sinks_N, row, dropout_key)[0]


def _forward(static, q, k, v, sinks_N, row, dropout_key):
    B, K, count, R, H = q.shape
    sum_type = jnp.promote_types(q.dtype, jnp.float32)
    if sinks_N is None:
        largest, total = jnp.full((B, K, R), MASKED, sum_type), jnp.zeros((B, K, R), sum_type)
    else:
        # A sink is where the running softmax starts from: a logit that has no value.
        largest = jnp.broadcast_to(_sinks_of_rows(sinks_N, K, R).astype(sum_type), (B, K, R))
        total = jnp.ones((B, K, R), sum_type)

    def one_block(i, carry):
        q_i = _block_of(q, i)

        def step(keys, state):
            largest, total, out = state
            scores = _scores(q_i, keys)
            largest, before = jnp.maximum(largest, jnp.max(scores, axis=-1)), largest
            weights = jnp.exp(scores - largest[..., None])
            shrink = jnp.exp(before - largest)
            total = total * shrink + jnp.sum(weights, axis=-1)
            weights = _dropped(static, weights, keys, dropout_key)
            out = out * shrink[..., None] + _matmul(weights.astype(v.dtype), keys.v, sum_type)
            return largest, total, out

        state = (largest, total, jnp.zeros((B, K, R, H), sum_type))
        last, sum_of_all, out_i = _over_keys(static, row, k, v, i, step, state)
        place = functools.partial(lax.dynamic_update_index_in_dim, index=i, axis=2)
        outs, logs = carry
        return place(outs, (out_i / sum_of_all[..., None]).astype(q.dtype)), place(
            logs, last + jnp.log(sum_of_all)
        )

    empty = (jnp.zeros(q.shape, q.dtype), jnp.zeros(q.shape[:-1], sum_type))
    out, log_total = lax.fori_loop(np.int32(0), np.int32(count), one_block, empty)
    return out, (q, k, v, sinks_N, row, dropout_key, out, log_total)


def _backward(static, kept, g):
    q, k, v, sinks_N, row, dropout_key, out, log_total = kept
    B, K, count, R, H = q.shape
    sum_type = log_total.dtype
    delta = jnp.sum(g.astype(sum_type) * out.astype(sum_type), axis=-1)

    def one_block(i, carry):
        dq, dk, dv = carry
        q_i, g_i = _block_of(q, i), _block_of(g, i)
        log_total_i, delta_i = _block_of(log_total, i)[..., None], _block_of(delta, i)[..., None]

        def step(keys, state):
            dq_i, dk, dv = state
            weights = jnp.exp(_scores(q_i, keys) - log_total_i)
            d_weights = _dropped(static, _matmul(g_i, keys.v, sum_type, turned=True), keys, dropout_key)
            d_scores = (weights * (d_weights - delta_i)).astype(q.dtype)
            weights = _dropped(static, weights, keys, dropout_key).astype(q.dtype)
            dq_i = dq_i + _matmul(d_scores, keys.k, sum_type)
            return (
                dq_i,
                keys.add(dk, _outer(d_scores, q_i, sum_type)),
                keys.add(dv, _outer(weights, g_i, sum_type)),
            )

        state = (jnp.zeros((B, K, R, H), sum_type), dk, dv)
        dq_i, dk, dv = _over_keys(static, row, k, v, i, step, state)
        return lax.dynamic_update_index_in_dim(dq, dq_i.astype(q.dtype), i, axis=2), dk, dv

    zeros = (jnp.zeros(q.shape, q.dtype), jnp.zeros(k.shape, sum_type), jnp.zeros(v.shape, sum_type))
    dq, dk, dv = lax.fori_loop(np.int32(0), np.int32(count), one_block, zeros)
    d_sinks_N = None
    if sinks_N is not None:
        share = jnp.exp(_sinks_of_rows(sinks_N, K, R).astype(sum_type)[:, None] - log_total)
        by_head = (share * delta).reshape(B, K, count, -1, static.block)
        d_sinks_N = -jnp.sum(by_head, axis=(0, 2, 4)).reshape(-1).astype(sinks_N.dtype)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), d_sinks_N, None, None


_attend.defvjp(_forward, _backward)


class _Keys(NamedTuple):
    """Some keys and values, [B, K, S, H], which queries of a block see them, and how to add to their
    gradient."""

    k: jax.Array
    v: jax.Array
    mask: jax.Array  # bool [B, C, S]
    add: object
    index: jax.Array  # tells pairs of blocks apart


def _over_keys(static, row, k, v, i, step, state):
    """Folds `step(keys, state)` over the blocks of keys that queries of block i may see."""
    C, window, sink_tokens = static.block, static.window, static.sink_tokens
    begin = i * C
    queries = _Row(*(lax.dynamic_slice_in_dim(x, begin, C, axis=1) for x in row))
    # The first query's segment alone can begin before the block.
    segment_start_B = queries.starts[:, 0]
    earliest = segment_start_B if window is None else jnp.maximum(segment_start_B, begin - window + 1)
    first = jnp.min(earliest) // C

    def one(j, state):
        read = functools.partial(lax.dynamic_slice_in_dim, start_index=j * C, slice_size=C)
        keys = read(row.positions, axis=1), read(row.segments, axis=1)
        mask = visible(queries.positions, queries.segments, *keys, window, sink_tokens)

        def add(total, x):
            return lax.dynamic_update_slice_in_dim(total, read(total, axis=2) + x, j * C, axis=2)

        index = i * (row.segments.shape[1] // C + 1) + j
        return step(_Keys(read(k, axis=2), read(v, axis=2), mask, add, index), state)

    if sink_tokens:
        T = row.segments.shape[1]
        place_BS = segment_start_B[:, None] + jnp.arange(min(sink_tokens, T), dtype=jnp.int32)
        is_before_BS = place_BS < first * C
        place_BS = jnp.minimum(place_BS, T - 1)
        positions_BS, segments_BS = (jnp.take_along_axis(x, place_BS, axis=1) for x in row[:2])
        mask = visible(queries.positions, queries.segments, positions_BS, segments_BS, window, sink_tokens)
        batch = jnp.arange(len(place_BS), dtype=jnp.int32)[:, None]

        def add(total, x):
            return total.at[batch, :, place_BS].add(
                jnp.where(is_before_BS[..., None, None], x.swapaxes(1, 2), 0)
            )

        ks, vs = (x[batch, :, place_BS].swapaxes(1, 2) for x in (k, v))
        index = i * (T // C + 1) + T // C
        state = step(_Keys(ks, vs, mask & is_before_BS[:, None], add, index), state)
    return lax.fori_loop(first, i + 1, one, state)


def _block_of(x, i):
    return lax.dynamic_index_in_dim(x, i, axis=2, keepdims=False)


def _sinks_of_rows(sinks_N, K, R):
    """[K, R]: each head's sink for all its rows."""
    sinks_KG = sinks_N.reshape(K, -1)
    return jnp.repeat(sinks_KG, R // sinks_KG.shape[1], axis=1)


def _matmul(a, b, result_type, turned=False):
    """a b, or a b^T, over the leading axes [B, K]."""
    contract = ((3,), (3 if turned else 2,))
    return lax.dot_general(
        a, b, (contract, ((0, 1), (0, 1))), precision="highest", preferred_element_type=result_type
    )


def _outer(a, b, result_type):
    """a^T b over the leading axes [B, K]."""
    return lax.dot_general(
        a, b, (((2,), (2,)), ((0, 1), (0, 1))), precision="highest", preferred_element_type=result_type
    )


def _scores(q_i, keys):
    """Scaled products [B, K, R, S], masked."""
    B, K, R, _ = q_i.shape
    C, S = keys.mask.shape[1:]
    scores = _matmul(q_i, keys.k, jnp.promote_types(q_i.dtype, jnp.float32), turned=True)
    scores = jnp.where(keys.mask[:, None, None], scores.reshape(B, K, R // C, C, S), MASKED)
    return scores.reshape(B, K, R, S)


def _dropped(static, weights, keys, dropout_key):
    """Weights, or their gradient, after dropout: the same ones are dropped for the same pair of blocks."""
    if not static.dropout:
        return weights
    kept = jax.random.bernoulli(
        jax.random.fold_in(dropout_key, keys.index), np.float32(1 - static.dropout), weights.shape
    )
    return jnp.where(kept, weights / (1 - static.dropout), 0)
