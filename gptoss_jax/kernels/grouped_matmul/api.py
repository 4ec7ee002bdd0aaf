"""Grouped matmul, the matmul of the experts: multiplies rows sorted by group by one matrix per group.

Letters: R rows, E groups (experts), D input width, F output width. Rows past the sum of the group sizes
have no group, and their results are zero. Every backend is a function (x_RD, w_EDF, group_sizes_E) -> y_RF,
differentiable in x and w; the CPU backend can also add the bias. Matrices may have more dimensions after D;
residuals keep the stored shape, because a scan over layers would stack copies of reshaped weights.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from gptoss_jax.kernels import backend, selection
from gptoss_jax.kernels.cpu import build
from gptoss_jax.kernels.cpu.grouped import cpu_grouped_matmul
from gptoss_jax.kernels.group_tiles import group_of_row, zero_ungrouped
from gptoss_jax.kernels.grouped_matmul.xla import xla_grouped_matmul
from gptoss_jax.kernels.layer_view import LayerView, as_groups, cast
from gptoss_jax.kernels.shapes import assert_shapes


def grouped_matmul(
    x_RD: jax.Array,
    w_EDF: jax.Array | LayerView,
    group_sizes_E: jax.Array,
    bias_EF: jax.Array | None = None,
) -> jax.Array:
    """Multiplies each group of rows by its matrix and adds its bias; differentiable in rows, matrix and bias.

    Args:
      x_RD: rows sorted by group.
      w_EDF: one matrix per group, rounded to the dtype of `x_RD`; all dimensions after D (in the bias: after
        E) are outputs.
      group_sizes_E: int32, the number of rows in each group; the sum may be less than R.

    Returns:
      [R, F] in the dtype of `x_RD`; rows without a group are zero.
    """
    letters = "RD EDF E EF" if len(w_EDF.shape) == 3 else "RD EDPF E EPF"
    assert_shapes(letters, x_RD, w_EDF, group_sizes_E, bias_EF)
    # A view expands to the matrices of all layers, so that kernels read the stack in place.
    if build.is_usable("grouped_matmul", x_RD.dtype, w_EDF.dtype):
        return cpu_grouped_matmul(x_RD, *as_groups(w_EDF, group_sizes_E), bias_EF)
    w_GDF, sizes_G = as_groups(cast(w_EDF, x_RD.dtype), group_sizes_E)
    return add_group_bias(_implementation()(x_RD, w_GDF, sizes_G), bias_EF, group_sizes_E)


def _implementation() -> Callable:
    """Returns the implementation for the backend. None uses `lax.ragged_dot`, which on CPU and GPU, and on
    TPU for the gradient of the matrices, multiplies every row by the matrix of every group."""
    if backend.platform() == "cpu" or not selection.is_enabled("grouped_matmul"):
        return xla_grouped_matmul
    # Imported lazily: Pallas backends are slow to import.
    if backend.platform() == "tpu":
        from gptoss_jax.kernels.grouped_matmul.pallas_tpu import megablox_grouped_matmul

        return megablox_grouped_matmul
    from gptoss_jax.kernels.grouped_matmul.pallas_triton import triton_grouped_matmul

    return triton_grouped_matmul


def reference_grouped_matmul(x_RD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """Reference implementation with `jax.lax.ragged_dot`."""
    # ragged_dot is undefined for rows without a group: the first mask keeps them out of the gradient, the
    # second out of the result.
    x_RD = zero_ungrouped(x_RD, group_sizes_E)
    y_RF = lax.ragged_dot(x_RD, w_EDF, group_sizes_E, precision=backend.matmul_precision(x_RD.dtype))
    return zero_ungrouped(y_RF, group_sizes_E)


def add_group_bias(x_RF: jax.Array, bias_EF: jax.Array | None, group_sizes_E: jax.Array) -> jax.Array:
    """Adds the bias of its group, if any, to each row; rows without a group are unchanged."""
    if bias_EF is None:
        return x_RF
    groups_R, bias_EF = group_of_row(group_sizes_E, x_RF.shape[0]), bias_EF.reshape(bias_EF.shape[0], -1)
    # Gather in float32, because the gradient of the gather is a sum over rows. Rows without a group index
    # past the end; padding the biases with zeros instead would copy them.
    wide_EF = bias_EF.astype(jnp.promote_types(bias_EF.dtype, jnp.float32))
    return x_RF + wide_EF.at[groups_R].get(mode="fill", fill_value=0).astype(x_RF.dtype)
