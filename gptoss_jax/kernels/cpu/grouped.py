"""Grouped matmul on CPU, with dense or MXFP4 weights: the kernels in `grouped_matmul.cc`.

Operands are float32 or bfloat16; products and sums are in float32, and a result is rounded once.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from gptoss_jax.kernels import backend
from gptoss_jax.kernels.cpu import build
from gptoss_jax.kernels.group_tiles import as_matrices
from gptoss_jax.kernels.layer_view import LayerView, as_groups, read
from gptoss_jax.kernels.mxfp4.codec import BLOCK_SIZE


def cpu_grouped_matmul(
    x_RD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array, bias_EF: jax.Array | None = None
) -> jax.Array:
    """`grouped_matmul`. `w_EDF` may have the matrices of all layers, and `bias_EF` the biases of the layer
    that has rows. The gradient of the matrices is in their dtype: it is not rounded to that of `x_RD`."""
    bias = _no_bias() if bias_EF is None else bias_EF.reshape(bias_EF.shape[0], -1)
    return _matmul(False, x_RD, w_EDF, bias.astype(jnp.float32), group_sizes_E)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(
    is_transposed: bool, x: jax.Array, w: jax.Array, bias_EF: jax.Array, group_sizes_E: jax.Array
) -> jax.Array:
    """x w of each group, or x w^T without a bias."""
    w = as_matrices(w)
    call = _call("GroupedMatmul", x.dtype, (x.shape[0], w.shape[1 if is_transposed else 2]))
    return call(x, w, bias_EF, group_sizes_E, transposed=is_transposed)[0]


def _backward(
    is_transposed: bool, residuals: tuple[jax.Array, jax.Array, jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    x, w, bias_EF, group_sizes_E = residuals
    dx = _matmul(not is_transposed, g, w, _no_bias(), group_sizes_E)
    dw, sums = _weight_gradient(*((g, x) if is_transposed else (x, g)), group_sizes_E, w.dtype)
    d_bias = jnp.sum(sums.reshape(-1, *bias_EF.shape), axis=0) if bias_EF.size else bias_EF
    return dx, dw.reshape(w.shape), d_bias, None


_matmul.defvjp(lambda *arguments: (_matmul(*arguments), arguments[1:]), _backward)


def _no_bias() -> jax.Array:
    return jnp.zeros((0, 0), jnp.float32)


def _weight_gradient(
    x_RD: jax.Array, g_RF: jax.Array, group_sizes_E: jax.Array, dtype: jnp.dtype
) -> Sequence[jax.Array]:
    """Returns x^T g of each group, [E, D, F], and the sum of its rows of g, [E, F], in float32."""
    E, D, F = group_sizes_E.size, x_RD.shape[1], g_RF.shape[1]
    return _call("GroupedMatmulWeightGrad", dtype, (E, D, F), (E, F))(x_RD, g_RF, group_sizes_E)


def supports_einsum(equation: str, x: jax.Array, result_type: jnp.dtype | None) -> bool:
    """Returns True if `einsum` can be used: on one device, for an equation of one of its forms."""
    x_letters, w_letters, y_letters = equation.replace("->", ",").split(",")
    summed = _summed(equation)
    in_order = "".join(letter for letter in x_letters + w_letters if letter not in summed) == y_letters
    if x_letters.endswith(summed):
        fits = w_letters.startswith(summed) or w_letters.endswith(summed)
    else:
        fits = x_letters.startswith(summed) and w_letters.startswith(summed)
    fits = fits and in_order and result_type in (None, x.dtype)
    return fits and not backend.is_multi_device() and build.is_usable("grouped_matmul", x.dtype)


def einsum(equation: str, x: jax.Array, layer: LayerView) -> jax.Array:
    """Returns `jnp.einsum(equation, x, weight)` for the weight of one layer, read in place.

    The equation contracts the last letters of `x` with the first of the weight (y = x w) or with its last
    (y = x w^T), or the first letters of both (y = x^T w, not differentiable). All rows form one group. Unlike
    in XLA on CPU, the rounding of a row does not depend on the number of rows.
    """
    x_letters, w_letters, _ = equation.replace("->", ",").split(",")
    summed = _summed(equation)
    inner = math.prod(x.shape[i] for i, letter in enumerate(x_letters) if letter in summed)
    outer_shape = tuple(x.shape[i] for i, letter in enumerate(x_letters) if letter not in summed)
    w_shape = tuple(layer.shape[i] for i, letter in enumerate(w_letters) if letter not in summed)
    rows, columns, groups = math.prod(outer_shape), math.prod(w_shape), layer.stack.shape[0]
    if not x_letters.endswith(summed):
        stack = read(layer).reshape(inner, columns)
        y = _weight_gradient(x.reshape(inner, rows), stack, jnp.full(1, inner, jnp.int32), x.dtype)[0]
        return y.reshape(*outer_shape, *w_shape)
    is_transposed = not w_letters.startswith(summed)
    matrix = (columns, inner) if is_transposed else (inner, columns)
    stack = layer.stack.reshape(groups, 1, *matrix)
    w_GDF, sizes_G = as_groups(LayerView(stack, layer.index), jnp.full(1, rows, jnp.int32))
    y = _matmul(is_transposed, x.reshape(rows, inner), w_GDF, _no_bias(), sizes_G)
    return y.reshape(*outer_shape, *w_shape)


def _summed(equation: str) -> str:
    """Returns the letters that an equation contracts."""
    x_letters, _, y_letters = equation.replace("->", ",").split(",")
    return "".join(letter for letter in x_letters if letter not in y_letters)


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
