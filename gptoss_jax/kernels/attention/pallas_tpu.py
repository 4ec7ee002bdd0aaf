"""Attention on TPU: JAX's splash attention, with block sizes and precision for gpt-oss.

Letters: B batch, T queries and keys, N query heads, K key/value heads, G = N / K, H head size. XLA cannot
partition the kernels: on a mesh, call them inside `jax.shard_map`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
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
    block: int
    interpret: bool


# The gradient in q, k and v; the sinks; the output.
_Residuals = tuple[Callable, jax.Array | None, jax.Array]


def splash_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    positions_BT: jax.Array,
    spec: AttentionSpec,
    *,
    sinks_N: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Computes attention with JAX's splash attention. The arguments are those of `api.attention`; `interpret`
    runs the kernels on any platform, slowly. Returns [B, T, N, H].

    The mask depends on the order of tokens in the row; positions are not read. Segment ids must not be
    negative. Raises ValueError for sink tokens, which these kernels do not support.
    """
    del positions_BT
    if spec.sink_tokens:
        raise ValueError(f"sink_tokens is {spec.sink_tokens}: must be 0 for splash attention")
    (B, T, N, H), K = q_BTNH.shape, k_BTKH.shape[2]
    block = _block_size(T, spec.window, q_BTNH.dtype)
    padding = -T % block
    segment_ids_BT = jnp.pad(segment_ids_BT, ((0, 0), (0, padding)), constant_values=PADDING)
    q_BNTH, k_BKTH, v_BKTH = (
        jnp.pad(x.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, padding), (0, 0)))
        for x in (q_BTNH * jnp.asarray(H**-0.5, q_BTNH.dtype), k_BTKH, v_BTKH)
    )
    q_BKGTH = q_BNTH.reshape(B, K, N // K, T + padding, H)
    sinks_KG = None if sinks_N is None else sinks_N.astype(jnp.float32).reshape(K, N // K)
    # One kernel call covers the query heads of one key/value head. The two cores of a v5p can split the
    # key/value-head and batch dimensions, but not the kernel's grid in the backward pass.
    attention = functools.partial(_attention, _Static(spec.window, block, interpret))
    attention = jax.vmap(attention, in_axes=(0, 0, 0, None, None if sinks_N is None else 0))
    attention = jax.vmap(attention, in_axes=(0, 0, 0, 0, None))
    out_BKGTH = attention(q_BKGTH, k_BKTH, v_BKTH, segment_ids_BT, sinks_KG)
    return out_BKGTH.reshape(B, N, T + padding, H).transpose(0, 2, 1, 3)[:, :T]


def _block_size(length: int, window: int | None, dtype: jnp.dtype) -> int:
    """Returns the smallest block size that covers `length` with the fewest blocks."""
    largest = FULL_BLOCK if window is None else WINDOW_BLOCK
    blocks = -(-length // (min(largest, FLOAT32_BLOCK) if dtype == jnp.float32 else largest))
    return -(-length // (blocks * LANES)) * LANES


def _kernel(
    static: _Static, segment_ids_T: jax.Array, sinks_G: jax.Array | None, G: int
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """Returns JAX's kernel as a function of q, k and v."""
    window, block, interpret = static
    shape = len(segment_ids_T), len(segment_ids_T)
    # LocalMask counts the keys to the left of the query's position.
    mask = splash.CausalMask(shape) if window is None else splash.LocalMask(shape, (window - 1, 0), 0)
    kernel = splash.make_splash_mqa_single_device(
        splash.MultiHeadMask([mask] * G),
        block_sizes=splash.BlockSizes(block, block, block, block, block, block, block, block),
        interpret=interpret,
    )
    segment_ids = splash.SegmentIds(segment_ids_T, segment_ids_T)
    return lambda q_GTH, k_TH, v_TH: kernel(q_GTH, k_TH, v_TH, segment_ids, sinks_G)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@without_x64
def _attention(
    static: _Static,
    q_GTH: jax.Array,
    k_TH: jax.Array,
    v_TH: jax.Array,
    segment_ids_T: jax.Array,
    sinks_G: jax.Array | None,
) -> jax.Array:
    """Attention of the query heads of one key/value head.

    Has a custom gradient because JAX's gradient of the sinks is computed from terms rounded to the dtype of
    q, and its backward pass does not use the matmul precision of the forward pass.
    """
    with jax.default_matmul_precision(matmul_precision(q_GTH.dtype)):
        return _kernel(static, segment_ids_T, sinks_G, len(q_GTH))(q_GTH, k_TH, v_TH)


@without_x64
def _forward(
    static: _Static,
    q_GTH: jax.Array,
    k_TH: jax.Array,
    v_TH: jax.Array,
    segment_ids_T: jax.Array,
    sinks_G: jax.Array | None,
) -> tuple[jax.Array, _Residuals]:
    kernel = _kernel(static, segment_ids_T, sinks_G, len(q_GTH))
    with jax.default_matmul_precision(matmul_precision(q_GTH.dtype)):
        out_GTH, vjp = jax.vjp(kernel, q_GTH, k_TH, v_TH)
    return out_GTH, (vjp, sinks_G, out_GTH)


@without_x64
def _backward(
    static: _Static, residuals: _Residuals, d_out_GTH: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None, jax.Array | None]:
    vjp, sinks_G, out_GTH = residuals
    with jax.default_matmul_precision(matmul_precision(out_GTH.dtype)):
        dq_GTH, dk_TH, dv_TH = vjp(d_out_GTH)
    d_sinks_G = None
    if sinks_G is not None:
        # The kernel's residuals include the log of the softmax denominator, including the sink.
        saved = (x for x in jax.tree.leaves(vjp) if x.dtype == jnp.float32)
        (lse_GT,) = (x for x in saved if x.shape == out_GTH.shape[:2])
        delta_GT = jnp.sum(out_GTH.astype(jnp.float32) * d_out_GTH.astype(jnp.float32), axis=-1)
        d_sinks_G = -jnp.sum(jnp.exp(sinks_G[:, None] - lse_GT) * delta_GT, axis=-1)
    return dq_GTH, dk_TH, dv_TH, None, d_sinks_G


_attention.defvjp(_forward, _backward)
