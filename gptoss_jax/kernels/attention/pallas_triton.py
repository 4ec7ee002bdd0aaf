"""FlashAttention for GPUs, forward and backward, without a [T, T] array: Pallas kernels for Triton.

Letters: B batch, T queries, S keys, N query heads, K key/value heads, G = N / K, H head size. The G query
heads of a key/value head are processed together: a row is one query of one of these heads, and the R = T * G
rows are sorted by token, then by head. Keys are thus read once for all G heads, a block of rows spans few
tokens and reads few keys outside of its window, and the gradient of a key is a single sum over rows.

Segments are contiguous and their positions increase, so loop bounds follow from indices in the row: query t
sees no key after t and none before the start of its segment. Work is half of T^2 in full-attention layers,
less for packed documents, and T * window in sliding-window layers.

Formulas: docs/math.md, "Forward pass"; FlashAttention-2 (arXiv:2307.08691), algorithms 1 and 2. Exponentials
use base 2: `lse` is log2 of the softmax denominator, including the sink.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from gptoss_jax.kernels.attention.reference import (
    MASK_VALUE,
    AttentionSpec,
    in_window_or_sink,
    segment_starts,
)
from gptoss_jax.kernels.backend import without_x64

LOG2_E = math.log2(math.e)
Carry = TypeVar("Carry")
Span = slice | pl.Slice


class Block(NamedTuple):
    """Block size in rows and keys (powers of two, at least 16) and Triton's compiler parameters."""

    rows: int
    keys: int
    warps: int
    stages: int


class Blocks(NamedTuple):
    forward: Block
    d_queries: Block
    d_keys: Block  # and values


def block_sizes(dtype: jnp.dtype, head_size: int) -> Blocks:
    """Returns block sizes for the H100; not tuned on hardware.

    Compiled by Triton 3.6 for sm_90, all of them fit in its shared memory. Only float32 kernels spill
    registers.
    """
    is_small = head_size <= 64
    if jnp.dtype(dtype).itemsize < 4:
        return Blocks(Block(128, 64, 8, 3), Block(128, 64, 8, 2), Block(64, 64, 4 if is_small else 8, 2))
    # float32 does not use tensor cores: accumulators and gathered operands are in registers.
    return Blocks(Block(64 if is_small else 32, 32, 8, 2), Block(64, 32, 8, 2), Block(64, 32, 8, 2))


class _Static(NamedTuple):
    """Compile-time settings of a kernel."""

    spec: AttentionSpec
    scale: float  # H ** -0.5, of the head size before padding
    blocks: Blocks
    interpret: bool


class _Arrays(NamedTuple):
    """Kernel inputs; inside a kernel, refs to the block for its key/value head and batch row."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    positions: jax.Array
    starts: jax.Array  # the index at which each token's segment starts
    lasts: jax.Array  # the index of the last token that may see each token
    offset: jax.Array  # [1], the index of the first query among the keys
    sinks: jax.Array
    # Only in the backward pass.
    d_out: Any = None
    lse: Any = None
    delta: Any = None


Residuals = tuple[_Arrays, jax.Array, jax.Array]  # inputs, output, lse
LETTERS = ("BTKGH", "BSKH", "BSKH", "BS", "BS", "BS", "1", "KG", "BTKGH", "BKR", "BKR")


def triton_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segment_ids_BS: jax.Array,
    positions_BS: jax.Array,
    spec: AttentionSpec,
    *,
    sinks_N: jax.Array | None = None,
    offset: int | jax.Array = 0,
    interpret: bool = False,
    blocks: Blocks | None = None,
) -> jax.Array:
    """Computes attention with our Triton kernels. The arguments are those of `api.attention`, but positions
    may increase by more than one between tokens of a segment. If they do not increase, as in padding with all
    positions 0, a query still sees only keys of its own segment, up to its own index. Returns [B, T, N, H].

    A length that is not a multiple of the block size, or a head size that is not a power of two of at least
    16, costs a padded copy. float32 is multiplied in float32, narrower dtypes on tensor cores. For tests,
    `interpret` runs the kernels as plain JAX, and `blocks` overrides `block_sizes`.
    """
    T, N, H = q_BTNH.shape[1:]
    blocks = blocks or block_sizes(q_BTNH.dtype, H)
    static = _Static(spec, H**-0.5, blocks, interpret)
    largest = max(max(block.rows, block.keys) for block in blocks)
    pad_T, pad_H = (0, -T % largest), (0, max(16, pl.next_power_of_2(H)) - H)
    pad_S = 0, pad_T[1] + -(k_BSKH.shape[1] + pad_T[1]) % largest
    q, k, v = (
        jnp.pad(x, ((0, 0), pad, (0, 0), pad_H))
        for x, pad in ((q_BTNH, pad_T), (k_BSKH, pad_S), (v_BSKH, pad_S))
    )
    # Padding is a separate segment. Padded queries have keys, too.
    segment_ids_BS = jnp.pad(segment_ids_BS, ((0, 0), pad_S), constant_values=-1)
    sinks_N = jnp.full(N, MASK_VALUE, jnp.float32) if sinks_N is None else sinks_N.astype(jnp.float32)
    q_BTKGH, sinks_KG = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3]), sinks_N.reshape(k.shape[2], -1)
    tokens = jnp.pad(positions_BS, ((0, 0), pad_S)), *_bounds(segment_ids_BS, spec)
    arrays = _Arrays(q_BTKGH, k, v, *tokens, jnp.asarray(offset, jnp.int32)[None], sinks_KG)
    return _attention(static, arrays).reshape(q.shape)[:, :T, :, :H]


def _bounds(segment_ids_BT: jax.Array, spec: AttentionSpec) -> tuple[jax.Array, jax.Array]:
    """Returns `starts` and `lasts` of `_Arrays`."""
    T = segment_ids_BT.shape[1]
    index_T = jnp.arange(T, dtype=jnp.int32)
    starts_BT = segment_starts(segment_ids_BT)
    # The end of a segment is its start in the reversed row.
    lasts_BT = ends_BT = T - 1 - segment_starts(segment_ids_BT[:, ::-1])[:, ::-1]
    if spec.window is not None:
        lasts_BT = jnp.minimum(ends_BT, index_T + spec.window - 1)
    if spec.sink_tokens:
        lasts_BT = jnp.where(index_T - starts_BT < spec.sink_tokens, ends_BT, lasts_BT)
    return starts_BT, lasts_BT


def _visible(
    spec: AttentionSpec, query: jax.Array, query_position: jax.Array,
    start: jax.Array, key: jax.Array, key_position: jax.Array,
) -> jax.Array:  # fmt: skip
    """Applies the mask rule. The first condition matters only if positions do not increase as required."""
    mask = (key <= query) & (key >= start)
    if spec.window is None:
        return mask
    mask &= in_window_or_sink(query - key, key - start, spec)
    return mask & in_window_or_sink(query_position - key_position, key_position, spec)


def _dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    return lax.dot_general(
        a, b, (((a_axis,), (b_axis,)), ((), ())),
        precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32,
    )  # fmt: skip


def _span(block: jax.Array, size: int) -> jax.Array:
    return block * size + lax.iota(jnp.int32, size)


def _rows(block: jax.Array, size: int, G: int) -> tuple[jax.Array, jax.Array, Span]:
    """Returns the query and head of each row in a block, and the slice of its rows."""
    row = _span(block, size)
    return lax.div(row, G), lax.rem(row, G), pl.ds(block * size, size)


def _over_keys(
    static: _Static, refs: _Arrays, size: Block, block: jax.Array,
    step: Callable[[Span, jax.Array, Carry], Carry], carry: Carry,
) -> Carry:  # fmt: skip
    """Folds `step(keys, scores, carry)` over the key blocks that a block of rows may see.

    `keys` slices the refs of keys and values; `scores` are masked base-2 exponents.
    """
    spec, G = static.spec, refs.q.shape[1]
    query, head, _ = _rows(block, size.rows, G)
    q, query = refs.q[query, head], query + refs.offset[0]
    start, position = refs.starts[query], refs.positions[query]

    def one_block(j, carry):
        keys = pl.ds(j * size.keys, size.keys)
        scores = _dot(q, refs.k[keys], 1, 1) * (static.scale * LOG2_E)
        mask = _visible(
            spec, query[:, None], position[:, None], start[:, None],
            _span(j, size.keys)[None], refs.positions[keys][None],
        )  # fmt: skip
        return step(keys, jnp.where(mask, scores, MASK_VALUE), carry)

    first, last = (refs.offset[0] + lax.div(block * size.rows + i, G) for i in (0, size.rows - 1))
    near = segment_start = refs.starts[first]
    if spec.window is not None:
        near = jnp.maximum(segment_start, first - spec.window + 1)
    low, high = lax.div(near, size.keys), lax.div(last, size.keys) + 1
    if spec.sink_tokens:
        # Only the first query's segment can start before the keys near it.
        end = lax.div(segment_start + spec.sink_tokens - 1, size.keys) + 1
        carry = lax.fori_loop(lax.div(segment_start, size.keys), jnp.minimum(end, low), one_block, carry)
    return lax.fori_loop(low, high, one_block, carry)


def _forward_kernel(static: _Static, refs: _Arrays, out_ref: jax.Ref, lse_ref: jax.Ref) -> None:
    T, G, H = refs.q.shape
    size = static.blocks.forward
    block = T * G // size.rows - 1 - pl.program_id(0)  # last rows first: they see the most keys
    query, head, rows = _rows(block, size.rows, G)

    def step(keys, scores, carry):
        out, largest, total = carry
        # MASK_VALUE is finite, so a row accumulates meaningless weights until it sees its first key, which
        # rescales them by 0.
        larger = jnp.maximum(largest, jnp.max(scores, axis=1))
        weights = jnp.exp2(scores - larger[:, None])
        shrink = jnp.exp2(largest - larger)
        v = refs.v[keys]
        out = out * shrink[:, None] + _dot(weights.astype(v.dtype), v, 1, 0)
        return out, larger, total * shrink + jnp.sum(weights, axis=1)

    # The sink initializes the softmax, as a logit with value 0.
    largest, total = refs.sinks[head] * LOG2_E, jnp.ones(size.rows, jnp.float32)
    carry = jnp.zeros((size.rows, H), jnp.float32), largest, total
    out, largest, total = _over_keys(static, refs, size, block, step, carry)
    out_ref[query, head] = (out / total[:, None]).astype(out_ref.dtype)
    lse_ref[rows] = largest + jnp.log2(total)


def _d_queries_kernel(static: _Static, refs: _Arrays, dq_ref: jax.Ref) -> None:
    T, G, H = refs.q.shape
    size = static.blocks.d_queries
    block = T * G // size.rows - 1 - pl.program_id(0)
    query, head, rows = _rows(block, size.rows, G)
    d_out, lse, delta = refs.d_out[query, head], refs.lse[rows][:, None], refs.delta[rows][:, None]

    def step(keys, scores, dq):
        d_scores = jnp.exp2(scores - lse) * (_dot(d_out, refs.v[keys], 1, 1) - delta)
        k = refs.k[keys]
        return dq + _dot(d_scores.astype(k.dtype), k, 1, 0)

    dq = _over_keys(static, refs, size, block, step, jnp.zeros((size.rows, H), jnp.float32))
    dq_ref[query, head] = (dq * static.scale).astype(dq_ref.dtype)


def _d_keys_kernel(static: _Static, refs: _Arrays, dk_ref: jax.Ref, dv_ref: jax.Ref) -> None:
    (T, G, H), offset = refs.q.shape, refs.offset[0]
    size, block = static.blocks.d_keys, pl.program_id(0)
    keys = pl.ds(block * size.keys, size.keys)
    k, v, key, position = refs.k[keys], refs.v[keys], _span(block, size.keys), refs.positions[keys]

    def step(i, carry):
        # Transposed scores, [keys, rows], so that the left operands of the matmuls need no transpose.
        dk, dv = carry
        query, head, rows = _rows(i, size.rows, G)
        q, d_out, query = refs.q[query, head], refs.d_out[query, head], query + offset
        scores = _dot(k, q, 1, 1) * (static.scale * LOG2_E)
        mask = _visible(
            static.spec, query[None], refs.positions[query][None], refs.starts[query][None],
            key[:, None], position[:, None],
        )  # fmt: skip
        weights = jnp.exp2(jnp.where(mask, scores, MASK_VALUE) - refs.lse[rows][None])
        dv += _dot(weights.astype(d_out.dtype), d_out, 1, 0)
        d_scores = weights * (_dot(v, d_out, 1, 1) - refs.delta[rows][None])
        return dk + _dot(d_scores.astype(q.dtype), q, 1, 0), dv

    first = lax.div(jnp.maximum(block * size.keys - offset, 0) * G, size.rows)
    end_row = jnp.clip(jnp.max(refs.lasts[keys]) - offset + 1, 0, T) * G
    zeros = jnp.zeros((size.keys, H), jnp.float32)
    dk, dv = lax.fori_loop(first, lax.div(end_row + size.rows - 1, size.rows), step, (zeros, zeros))
    dk_ref[keys] = (dk * static.scale).astype(dk_ref.dtype)
    dv_ref[keys] = dv.astype(dv_ref.dtype)


def _call(
    static: _Static, kernel: Callable[..., None], block: Block, programs: int,
    arrays: _Arrays, outputs: list[tuple[str, Any]],
) -> list[jax.Array]:  # fmt: skip
    """Runs `kernel` on a grid of `programs` blocks, key/value heads and batch rows.

    Args:
      outputs: pairs of letters and `jax.ShapeDtypeStruct`.
    """
    grid_axis = {"K": 1, "B": 2}

    def spec(letters, array):
        if array is None:
            return None
        shape = (None if x in grid_axis else size for x, size in zip(letters, array.shape, strict=True))
        axes = [grid_axis.get(x) for x in letters]
        return pl.BlockSpec(
            tuple(shape), lambda *ids: tuple(0 if axis is None else ids[axis] for axis in axes)
        )

    B, _, K, _ = arrays.k.shape
    return pl.pallas_call(
        functools.partial(kernel, static),
        grid=(programs, K, B),
        in_specs=[_Arrays(*map(spec, LETTERS, arrays))],
        out_specs=[spec(*pair) for pair in outputs],
        out_shape=[jax.ShapeDtypeStruct(array.shape, array.dtype) for _, array in outputs],
        compiler_params=plgpu.CompilerParams(num_warps=block.warps, num_stages=block.stages),
        interpret=static.interpret,
    )(arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@without_x64
def _attention(static: _Static, arrays: _Arrays) -> jax.Array:
    return _forward(static, arrays)[0]


@without_x64
def _forward(static: _Static, arrays: _Arrays) -> tuple[jax.Array, Residuals]:
    B, T, K, G, _ = arrays.q.shape
    block = static.blocks.forward
    outputs = [("BTKGH", arrays.q), ("BKR", jax.ShapeDtypeStruct((B, K, T * G), jnp.float32))]
    out_BTKGH, lse_BKR = _call(static, _forward_kernel, block, T * G // block.rows, arrays, outputs)
    return out_BTKGH, (arrays, out_BTKGH, lse_BKR)


@without_x64
def _backward(static: _Static, residuals: Residuals, d_out_BTKGH: jax.Array) -> tuple[_Arrays]:
    arrays, out_BTKGH, lse_BKR = residuals
    B, T, K, G, _ = out_BTKGH.shape
    delta_BTKG = jnp.sum(d_out_BTKGH.astype(jnp.float32) * out_BTKGH.astype(jnp.float32), axis=-1)
    delta_BKR = delta_BTKG.transpose(0, 2, 1, 3).reshape(B, K, T * G)
    arrays = arrays._replace(d_out=d_out_BTKGH, lse=lse_BKR, delta=delta_BKR)
    block, outputs = static.blocks.d_queries, [("BTKGH", arrays.q)]
    (dq_BTKGH,) = _call(static, _d_queries_kernel, block, T * G // block.rows, arrays, outputs)
    block, outputs = static.blocks.d_keys, [("BSKH", arrays.k), ("BSKH", arrays.v)]
    num_blocks = arrays.k.shape[1] // block.keys
    dk_BSKH, dv_BSKH = _call(static, _d_keys_kernel, block, num_blocks, arrays, outputs)
    weights_BKTG = jnp.exp2(arrays.sinks[:, None] * LOG2_E - lse_BKR.reshape(B, K, T, G))
    d_sinks_KG = -jnp.sum(weights_BKTG * delta_BKR.reshape(B, K, T, G), axis=(0, 2))
    none: Any = None  # integers have no gradient
    return (_Arrays(dq_BTKGH, dk_BSKH, dv_BSKH, none, none, none, none, d_sinks_KG),)


_attention.defvjp(_forward, _backward)
