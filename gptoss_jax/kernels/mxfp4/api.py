"""Grouped matmul with MXFP4 experts: multiplies rows sorted by group by one quantized matrix per group.

Only the bytes of nonempty groups are read, and dequantized inside a kernel or one group at a time. Time and
memory thus grow with the rows and their groups, not with E.

Letters: R rows, E groups (experts), D input width, F output width, G = D / 32 blocks of values that share a
scale, C = 16 bytes per block. Every backend is a function (x_RD, blocks_EFGC, scales_EFG, group_sizes_E) ->
y_RF and, with `transposed=True`, (g_RF, ...) -> dx_RD, the gradient in x. Packed weights have no gradient.
"""

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from gptoss_jax.kernels import backend, selection
from gptoss_jax.kernels.cpu import build
from gptoss_jax.kernels.cpu.grouped import cpu_mxfp4_matmul
from gptoss_jax.kernels.grouped_matmul.api import add_group_bias
from gptoss_jax.kernels.layer_view import LayerView, as_groups
from gptoss_jax.kernels.mxfp4 import codec
from gptoss_jax.kernels.mxfp4.xla import xla_mxfp4_matmul
from gptoss_jax.kernels.shapes import assert_shapes


def mxfp4_grouped_matmul(
    x_RD: jax.Array,
    blocks_EFGC: jax.Array | LayerView,
    scales_EFG: jax.Array | LayerView,
    group_sizes_E: jax.Array,
    bias_EF: jax.Array | None = None,
) -> jax.Array:
    """Multiplies each group of rows by its quantized matrix and adds its bias; differentiable in x and bias.

    Args:
      x_RD: rows sorted by group, in bfloat16 or float32.
      blocks_EFGC: uint8; the weight of output f and input d is `codec.dequantize(blocks, scales)[e, f, d]`.
      scales_EFG: uint8.
      group_sizes_E: int32, the number of rows in each group, possibly 0; the sum may be less than R.

    Returns:
      [R, F] in the dtype of `x_RD`; rows without a group are zero.
    """
    dims = assert_shapes("RD EFGC EFG E EF", x_RD, blocks_EFGC, scales_EFG, group_sizes_E, bias_EF)
    message = f"D is not {codec.BLOCK_SIZE} G with D={dims.D}, G={dims.G}"
    chex.assert_axis_dimension(x_RD, 1, codec.BLOCK_SIZE * dims.G, custom_message=message)
    blocks, sizes = as_groups(blocks_EFGC, group_sizes_E.astype(jnp.int32))
    scales, _ = as_groups(scales_EFG, group_sizes_E)
    y_RF = differentiable_matmul(_implementation(x_RD), x_RD, blocks, scales, sizes)
    return add_group_bias(y_RF, bias_EF, group_sizes_E)


def _implementation(x_RD: jax.Array) -> Callable:
    """Returns the implementation for the backend."""
    if build.is_usable("mxfp4_matmul", x_RD.dtype):
        return cpu_mxfp4_matmul
    if backend.platform() == "cpu" or not selection.is_enabled("mxfp4_matmul"):
        return xla_mxfp4_matmul
    # Imported lazily: Pallas backends are slow to import.
    if backend.platform() == "tpu":
        from gptoss_jax.kernels.mxfp4.pallas_tpu import mosaic_mxfp4_matmul

        return mosaic_mxfp4_matmul
    from gptoss_jax.kernels.mxfp4.pallas_triton import triton_mxfp4_matmul

    return triton_mxfp4_matmul


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def differentiable_matmul(
    implementation: Callable,
    x_RD: jax.Array,
    blocks_EFGC: jax.Array,
    scales_EFG: jax.Array,
    group_sizes_E: jax.Array,
) -> jax.Array:
    """Makes an implementation of `mxfp4_grouped_matmul` without a bias differentiable in x."""
    return implementation(x_RD, blocks_EFGC, scales_EFG, group_sizes_E)


def _forward(
    implementation: Callable, x_RD: jax.Array, *weights: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return implementation(x_RD, *weights), weights


def _backward(
    implementation: Callable, weights: tuple[jax.Array, ...], g_RF: jax.Array
) -> tuple[jax.Array, None, None, None]:
    return implementation(g_RF, *weights, transposed=True), None, None, None


differentiable_matmul.defvjp(_forward, _backward)
