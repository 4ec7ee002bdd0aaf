"""Attention on TPU: JAX's splash attention, with block sizes and precision for gpt-oss.

Letters: B batch, T queries, S keys, N query heads, K key/value heads, G = N / K, H head size. XLA cannot
partition the kernels: on a mesh, call them inside `jax.shard_map`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from gptoss_jax.kernels.attention.reference import AttentionSpec
from gptoss_jax.kernels.backend import matmul_precision, without_x64

LANES = 128  # sequence length and block sizes are multiples of this
# Maximum block size, in queries and keys. For 4,096 tokens of the released models (64 query heads, 8
# key/value heads, size 64), libtpu 0.0.42 schedules the fewest cycles with these on v5e, v5p and v6e, without
# memory stalls; with a window, 256 is as good but takes twice as many steps. Its listings:
# LIBTPU_INIT_ARGS="--xla_jf_dump_to=DIR --xla_jf_dump_llo_text=true" python benchmarks/tpu_compile.py
# A fused kernel for dq, dk and dv would save cycles without a window, but it writes dq once per block of
# keys, in the dtype of q.
# In float32, blocks of 1,024 are too large for the VMEM of v5e and v5p.
WINDOW_BLOCK = FLOAT32_BLOCK = 512
FULL_BLOCK = 1024
PADDING = -1  # segment id of the padding in the last block


class _Static(NamedTuple):
    """Compile-time settings of a kernel."""

    window: int | None
    block_T: int
    block_S: int
    offset: int | None  # the index of the first query among the keys; None if it is traced
    interpret: bool


# The gradient in q, k and v; the sinks; the output.
_Residuals = tuple[Callable, jax.Array | None, jax.Array]
_Array = jax.Array | np.ndarray


def splash_attention(
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
) -> jax.Array:
    """Computes attention with JAX's splash attention. The arguments are those of `api.attention`; `interpret`
    runs the kernels on any platform, slowly. Returns [B, T, N, H].

    The mask depends on the order of tokens in the row; positions are not read. Raises ValueError for sink
    tokens, which these kernels do not support.
    """
    del positions_BS
    if spec.sink_tokens:
        raise ValueError(f"sink_tokens is {spec.sink_tokens}: must be 0 for splash attention")
    (B, T, N, H), (_, S, K, _) = q_BTNH.shape, k_BSKH.shape
    block_T, block_S = (_block_size(length, spec.window, q_BTNH.dtype) for length in (T, S))
    static_offset = offset if isinstance(offset, int) else None
    static = _Static(spec.window, block_T, block_S, static_offset, interpret)
    padding_T, padding_S = -T % static.block_T, -S % static.block_S
    q_ids_BT = jax.lax.dynamic_slice_in_dim(segment_ids_BS, offset, T, axis=1)
    segments = splash.SegmentIds(
        *(
            jnp.pad(ids, ((0, 0), (0, padding)), constant_values=PADDING)
            for ids, padding in ((q_ids_BT, padding_T), (segment_ids_BS, padding_S))
        )
    )
    q_BNTH, k_BKSH, v_BKSH = (
        jnp.pad(x.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, padding), (0, 0)))
        for x, padding in (
            (q_BTNH * jnp.asarray(H**-0.5, q_BTNH.dtype), padding_T), (k_BSKH, padding_S), (v_BSKH, padding_S)
        )
    )  # fmt: skip
    q_BKGTH = q_BNTH.reshape(B, K, N // K, T + padding_T, H)
    sinks_KG = None if sinks_N is None else sinks_N.astype(jnp.float32).reshape(K, N // K)
    # One kernel call covers the query heads of one key/value head. The two cores of a v5p can split the
    # key/value-head and batch dimensions, but not the kernel's grid in the backward pass.
    attention = functools.partial(_attention, static)
    attention = jax.vmap(attention, in_axes=(0, 0, 0, None, None if sinks_N is None else 0))
    attention = jax.vmap(attention, in_axes=(0, 0, 0, (0, None), None))
    queries = segments, jnp.asarray(offset, jnp.int32)
    out_BKGTH = attention(q_BKGTH, k_BKSH, v_BKSH, queries, sinks_KG)
    return out_BKGTH.reshape(B, N, T + padding_T, H).transpose(0, 2, 1, 3)[:, :T]


def _block_size(length: int, window: int | None, dtype: jnp.dtype) -> int:
    """Returns the smallest block size that covers `length` with the fewest blocks."""
    largest = FULL_BLOCK if window is None else WINDOW_BLOCK
    blocks = -(-length // (min(largest, FLOAT32_BLOCK) if dtype == jnp.float32 else largest))
    return -(-length // (blocks * LANES)) * LANES


def _kernel(
    static: _Static, segments: splash.SegmentIds, offset: jax.Array, sinks_G: jax.Array | None, G: int
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """Returns JAX's kernel as a function of q, k and v."""
    window, block_T, block_S, static_offset, interpret = static
    # The kernel of a single block, to which the indices of all blocks are added. JAX would compute them from
    # the mask of every pair of tokens, which takes minutes for long sequences, and only for a static offset.
    # LocalMask counts the keys to the left of the query's position.
    shape = block_T, block_S
    mask = splash.CausalMask(shape) if window is None else splash.LocalMask(shape, (window - 1, 0), 0)
    kernel = splash.make_splash_mqa_single_device(
        splash.MultiHeadMask([mask] * G),
        block_sizes=splash.BlockSizes(block_T, block_S, block_S, block_T, block_S, block_S, block_T, block_S),
        interpret=interpret,
    )
    start = offset if static_offset is None else static_offset
    T, S = segments.q.shape[0], segments.kv.shape[0]
    by_queries, by_keys = _visible_blocks(static, start, T, S)
    indices = {"q_sequence": start + jnp.arange(T, dtype=jnp.int32)}
    kernel.fwd_mask_info = kernel.fwd_mask_info._replace(**by_queries, **indices)
    kernel.dq_mask_info = kernel.dq_mask_info._replace(**by_queries, **indices)
    kernel.dkv_mask_info = kernel.dkv_mask_info._replace(**by_keys, **indices)
    return lambda q_GTH, k_SH, v_SH: kernel(q_GTH, k_SH, v_SH, segments, sinks_G)


def _visible_blocks(
    static: _Static, offset: int | jax.Array, T: int, S: int
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Returns the blocks that the kernels visit, as fields of JAX's `MaskInfo`: blocks of keys for each block
    of queries, [1, queries, steps], and blocks of queries for each block of keys, [1, steps, keys].

    `block_mask` is 0 in steps without a block. Then `data_next` is the first block of the next row.
    """
    window, block_T, block_S, *_ = static
    xp = jnp if static.offset is None else np  # static block indices give the smallest grid

    def visited(first: _Array, last: _Array, number: int, most: int) -> tuple[jax.Array, jax.Array]:
        steps = min(number, most)
        if static.offset is not None:
            steps = max(1, int((last - first).max()) + 1)
        block = first[:, None] + xp.arange(steps, dtype=np.int32)
        is_used = block <= last[:, None]
        following = xp.clip(xp.roll(first, -1), 0, number - 1)[:, None]
        # Scalar memory is small.
        index_type = np.int8 if number <= 128 else np.int32
        data_next = xp.where(is_used, block, following).astype(index_type)
        return jnp.asarray(data_next), jnp.asarray(is_used.astype(np.int8))

    num_T, num_S = T // block_T, S // block_S
    # The number of blocks that a block and its window can touch.
    reach = None if window is None else window - 1
    query = offset + block_T * xp.arange(num_T, dtype=np.int32)
    first = xp.zeros_like(query) if reach is None else xp.maximum(query - reach, 0) // block_S
    last = xp.minimum((query + block_T - 1) // block_S, num_S - 1)
    most = num_S if reach is None else (block_T + reach - 2) // block_S + 2
    data, mask = visited(first, last, num_S, most)
    by_queries = {"data_next": data[None], "block_mask": mask[None]}
    key = block_S * xp.arange(num_S, dtype=np.int32) - offset
    first = xp.maximum(key, 0) // block_T
    last = xp.full_like(key, num_T - 1)
    if reach is not None:
        last = xp.minimum((key + block_S - 1 + reach) // block_T, last)
    most = num_T if reach is None else (block_S + reach - 2) // block_T + 2
    data, mask = visited(first, last, num_T, most)
    by_keys = {"data_next": data.T[None], "block_mask": mask.T[None]}
    return by_queries, by_keys


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@without_x64
def _attention(
    static: _Static,
    q_GTH: jax.Array,
    k_SH: jax.Array,
    v_SH: jax.Array,
    queries: tuple[splash.SegmentIds, jax.Array],
    sinks_G: jax.Array | None,
) -> jax.Array:
    """Attention of the query heads of one key/value head; `queries` are the segments, and the offset of the
    queries among the keys.

    Has a custom gradient because JAX's gradient of the sinks is computed from terms rounded to the dtype of
    q, and its backward pass does not use the matmul precision of the forward pass.
    """
    with jax.default_matmul_precision(matmul_precision(q_GTH.dtype)):
        return _kernel(static, *queries, sinks_G, len(q_GTH))(q_GTH, k_SH, v_SH)


@without_x64
def _forward(
    static: _Static,
    q_GTH: jax.Array,
    k_SH: jax.Array,
    v_SH: jax.Array,
    queries: tuple[splash.SegmentIds, jax.Array],
    sinks_G: jax.Array | None,
) -> tuple[jax.Array, _Residuals]:
    kernel = _kernel(static, *queries, sinks_G, len(q_GTH))
    with jax.default_matmul_precision(matmul_precision(q_GTH.dtype)):
        out_GTH, vjp = jax.vjp(kernel, q_GTH, k_SH, v_SH)
    return out_GTH, (vjp, sinks_G, out_GTH)


@without_x64
def _backward(
    static: _Static, residuals: _Residuals, d_out_GTH: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None, jax.Array | None]:
    vjp, sinks_G, out_GTH = residuals
    with jax.default_matmul_precision(matmul_precision(out_GTH.dtype)):
        dq_GTH, dk_SH, dv_SH = vjp(d_out_GTH)
    d_sinks_G = None
    if sinks_G is not None:
        # The kernel's residuals include the log of the softmax denominator, including the sink.
        saved = (x for x in jax.tree.leaves(vjp) if x.dtype == jnp.float32)
        (lse_GT,) = (x for x in saved if x.shape == out_GTH.shape[:2])
        delta_GT = jnp.sum(out_GTH.astype(jnp.float32) * d_out_GTH.astype(jnp.float32), axis=-1)
        d_sinks_G = -jnp.sum(jnp.exp(sinks_G[:, None] - lse_GT) * delta_GT, axis=-1)
    return dq_GTH, dk_SH, dv_SH, None, d_sinks_G


_attention.defvjp(_forward, _backward)
