"""Grouped matmul on CPU, with dense or MXFP4 weights: the kernels in `grouped_matmul.cc`.

Operands are float32 or bfloat16; products and sums are in float32, and a result is rounded once.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from gptoss_jax.kernels import backend
from gptoss_jax.kernels.cpu import build
from gptoss_jax.kernels.group_tiles import as_matrices
from gptoss_jax.kernels.layer_view import LayerView, as_groups
from gptoss_jax.kernels.mxfp4.codec import BLOCK_SIZE


def cpu_grouped_matmul(
    x_RD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array, bias_EF: jax.Array | None = None
) -> jax.Array:
    """`grouped_matmul`. `w_EDF` may have the matrices of all layers, and `bias_EF` the biases of the layer
    that has rows. The gradient of the matrices is in their dtype: it is not rounded to that of `x_RD`."""
    bias = jnp.zeros((0, 0), jnp.float32) if bias_EF is None else bias_EF.reshape(bias_EF.shape[0], -1)
    return _matmul(x_RD, w_EDF, bias.astype(jnp.float32), group_sizes_E)


@jax.custom_vjp
def _matmul(x_RD: jax.Array, w_EDF: jax.Array, bias_EF: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    w_EDF = as_matrices(w_EDF)
    call = _call("GroupedMatmul", x_RD.dtype, (x_RD.shape[0], w_EDF.shape[2]))
    return call(x_RD, w_EDF, bias_EF, group_sizes_E, transposed=False)[0]


def _backward(
    residuals: tuple[jax.Array, jax.Array, jax.Array, jax.Array], g_RF: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    x_RD, stored, bias_EF, group_sizes_E = residuals
    w_EDF = as_matrices(stored)
    no_bias = jnp.zeros((0, 0), jnp.float32)
    row_grad = _call("GroupedMatmul", x_RD.dtype, x_RD.shape)
    (dx_RD,) = row_grad(g_RF, w_EDF, no_bias, group_sizes_E, transposed=True)
    bias_shape = w_EDF.shape[0], w_EDF.shape[2]
    weight_grad = _call("GroupedMatmulWeightGrad", w_EDF.dtype, w_EDF.shape, bias_shape)
    dw_EDF, db_EF = weight_grad(x_RD, g_RF, group_sizes_E)
    return (
        dx_RD,
        dw_EDF.reshape(stored.shape),
        jnp.sum(db_EF.reshape(-1, *bias_EF.shape), axis=0) if bias_EF.size else no_bias,
        None,
    )


_matmul.defvjp(lambda *arguments: (_matmul(*arguments), arguments), _backward)


def supports_einsum(equation: str, x: jax.Array, result_type: jnp.dtype | None) -> bool:
    """Returns True if `einsum` can be used: on one device, contracting the weight's first letters."""
    x_letters, w_letters, y_letters = equation.replace("->", ",").split(",")
    summed = "".join(letter for letter in x_letters if letter not in y_letters)
    fits = x_letters.endswith(summed) and w_letters.startswith(summed) and result_type in (None, x.dtype)
    return fits and not backend.is_multi_device() and build.is_usable("grouped_matmul", x.dtype)


def einsum(equation: str, x: jax.Array, layer: LayerView) -> jax.Array:
    """Returns `jnp.einsum(equation, x, weight)` for the weight of one layer, read in place.

    All rows form one group. Unlike in XLA on CPU, the rounding of a row does not depend on the number of
    rows.
    """
    x_letters, _, y_letters = equation.replace("->", ",").split(",")
    inner = math.prod(x.shape[i] for i, letter in enumerate(x_letters) if letter not in y_letters)
    kept = tuple(x.shape[i] for i, letter in enumerate(x_letters) if letter in y_letters)
    rows, outputs = x.size // inner, layer.shape[x.ndim - len(kept) :]
    stack = layer.stack.reshape(layer.stack.shape[0], 1, inner, math.prod(outputs))
    w_GDF, sizes_G = as_groups(LayerView(stack, layer.index), jnp.full(1, rows, jnp.int32))
    return cpu_grouped_matmul(x.reshape(rows, inner), w_GDF, sizes_G).reshape(*kept, *outputs)


def cpu_mxfp4_matmul(
    x_RD: jax.Array,
    blocks_EFGC: jax.Array,
    scales_EFG: jax.Array,
    group_sizes_E: jax.Array,
    transposed: bool = False,
) -> jax.Array:
    """`mxfp4_grouped_matmul` without a bias or, if `transposed`, its gradient in x. Blocks of a matrix are
    dequantized while they are packed into the CPU's cache."""
    F, G = scales_EFG.shape[1:]
    call = _call("GroupedMatmulMxfp4", x_RD.dtype, (x_RD.shape[0], BLOCK_SIZE * G if transposed else F))
    return call(x_RD, blocks_EFGC, scales_EFG, group_sizes_E, transposed=transposed)[0]


def _call(
    name: str, dtype: jnp.dtype, shape: tuple[int, ...], *more: tuple[int, ...]
) -> Callable[..., Sequence[jax.Array]]:
    """Returns a kernel; its results have these shapes, the first one this dtype, all others float32."""
    types = dtype, *(jnp.float32 for _ in more)
    return jax.ffi.ffi_call(build.target(name), list(map(jax.ShapeDtypeStruct, (shape, *more), types)))
