"""Attention on TPU: JAX's splash kernels with their blocks, their precision and the gradient of the sinks.

Letters as in `flash_attention.py`: B batch, T queries and keys, N query heads, K key/value heads, G = N / K,
H head size. Compiled programs hold Mosaic kernels, which XLA cannot split over a mesh: call it in a
`jax.shard_map` where there is one.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

from gptoss_jax.kernels.x32 import without_x64

LANES = 128  # sequences and blocks are multiples of it
# The most rows and columns in a block of scores. For 4,096 tokens of the released models (64 heads on 8, of
# size 64) libtpu 0.0.42 schedules, forward and backward, in millions of cycles (its listings of instructions,
# LIBTPU_INIT_ARGS="--xla_jf_dump_to=DIR --xla_jf_dump_llo_text=true", times the steps of the grids):
#   window 128: blocks of 256 4.9 (v5e), 6.6 (v5p), 4.6 (v6e); of 512 5.5, 6.3, 4.5, in half as many steps.
#   no window: blocks of 512 12.8, 16.4, 9.9; of 1,024 12.4, 13.4, 9.0; 2,048 x 1,024 14.2, too large, 10.0.
# What a step waits for memory comes on top. One kernel for dq, dk and dv would save 2 to 3 of these without a
# window, but writes dq once for each block of keys, in the type of q.
# In float32, blocks of 1,024 are too large for the VMEM of v5e and v5p.
WINDOW_BLOCK = FLOAT32_BLOCK = 512
FULL_BLOCK = 1024
PADDING = -1  # the segment of what fills a row up to whole blocks; no token's


def splash_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array,
    window: int | None,
    sink_tokens: int = 0,
    sinks_N: jax.Array | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Attention of rows to themselves. Returns [B, T, N, H] in the type of `q_BTNH`.

    The mask follows places in the row, not positions: those must rise by exactly one from token to token of
    a segment, and are not read. Segment ids are 0 or more. `interpret` runs the kernels on any platform,
    slowly. Raises ValueError for sink tokens in a layer with a window, which these kernels cannot show.
    """
    del positions_BT
    if sink_tokens and window is not None:
        raise ValueError(f"sink_tokens is {sink_tokens}: splash attention shows none beyond a window: give 0")
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    block = _block(T, window, q_BTNH.dtype)
    fill = -T % block
    segment_ids_BT = jnp.pad(segment_ids_BT, ((0, 0), (0, fill)), constant_values=PADDING)
    q_BNTH, k_BKTH, v_BKTH = (
        jnp.pad(x.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, fill), (0, 0)))
        for x in (q_BTNH * jnp.asarray(H**-0.5, q_BTNH.dtype), k_BTKH, v_BTKH)
    )
    q_BKGTH = q_BNTH.reshape(B, K, N // K, T + fill, H)
    sinks_KG = None if sinks_N is None else sinks_N.astype(jnp.float32).reshape(K, N // K)
    # The heads of one key/value head share a kernel; several of them, and rows, are dimensions that the two
    # cores of a v5p can split, which the kernels' own are not in the backward pass.
    attend = functools.partial(_attend, window, block, interpret)
    attend = jax.vmap(attend, in_axes=(0, 0, 0, None, None if sinks_N is None else 0))
    attend = jax.vmap(attend, in_axes=(0, 0, 0, 0, None))
    out_BKGTH = attend(q_BKGTH, k_BKTH, v_BKTH, segment_ids_BT, sinks_KG)
    return out_BKGTH.reshape(B, N, T + fill, H).transpose(0, 2, 1, 3)[:, :T]


def _block(length: int, window: int | None, dtype: jnp.dtype) -> int:
    """Equal blocks, as few as the largest size allows and no larger than they need be."""
    most = FULL_BLOCK if window is None else WINDOW_BLOCK
    blocks = -(-length // (min(most, FLOAT32_BLOCK) if dtype == jnp.float32 else most))
    return -(-length // (blocks * LANES)) * LANES


def _kernel(heads, length, window, block, interpret, save_residuals=False):
    shape = (length, length)
    # LocalMask counts the keys to the left of the query's own.
    mask = splash.CausalMask(shape) if window is None else splash.LocalMask(shape, (window - 1, 0), 0)
    return splash.make_splash_mqa_single_device(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(block, block, block, block, block, block, block, block),
        save_residuals=save_residuals,
        interpret=interpret,
    )


def _precision(dtype):
    # Else the kernels round float32 to bfloat16 before they multiply; narrower types they refuse to multiply
    # in any other way than their own.
    return jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
@without_x64
def _attend(window, block, interpret, q_GTH, k_TH, v_TH, segment_ids_T, sinks_G):
    """The query heads of one key/value head.

    JAX's gradient of it would give the sinks' in the type of q, from terms rounded to it, and round float32
    to bfloat16 whatever precision the forward pass is called with. So its parts are put together here.
    """
    kernel = _kernel(*q_GTH.shape[:2], window, block, interpret)
    with _precision(q_GTH.dtype):
        return kernel(q_GTH, k_TH, v_TH, splash.SegmentIds(segment_ids_T, segment_ids_T), sinks_G)


@without_x64
def _forward(window, block, interpret, q_GTH, k_TH, v_TH, segment_ids_T, sinks_G):
    kernel = _kernel(*q_GTH.shape[:2], window, block, interpret, save_residuals=True)
    segment_ids = splash.SegmentIds(segment_ids_T, segment_ids_T)
    with _precision(q_GTH.dtype):
        out_GTH, (lse_GT,) = kernel(q_GTH, k_TH, v_TH, segment_ids, sinks_G)
    return out_GTH, (q_GTH, k_TH, v_TH, segment_ids, sinks_G, out_GTH, lse_GT)


@without_x64
def _backward(window, block, interpret, residuals, d_out_GTH):
    """Flash attention's backward with the lse that has the sinks in it (MATH.md, "Forward")."""
    q_GTH, _, _, _, sinks_G, out_GTH, lse_GT = residuals
    kernel = _kernel(*q_GTH.shape[:2], window, block, interpret)
    with _precision(q_GTH.dtype):
        # Not part of JAX's public interface, which has the forward pass alone to give the lse.
        _, _, _, dq_GTH, dk_TH, dv_TH, *_ = splash_attention_kernel._splash_attention_bwd(
            **kernel.kwargs,
            res=(*residuals[:4], None, out_GTH, lse_GT, kernel.dq_mask_info, kernel.dkv_mask_info),
            do=d_out_GTH,
        )
    d_sinks_G = None
    if sinks_G is not None:
        delta_GT = jnp.sum(out_GTH.astype(jnp.float32) * d_out_GTH.astype(jnp.float32), axis=-1)
        d_sinks_G = -jnp.sum(jnp.exp(sinks_G[:, None] - lse_GT) * delta_GT, axis=-1)
    return dq_GTH, dk_TH, dv_TH, None, d_sinks_G


_attend.defvjp(_forward, _backward)
