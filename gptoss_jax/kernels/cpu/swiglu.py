"""SwiGLU on CPU: the kernels in `swiglu.cc`, one pass over memory for the result and one for the gradient;
float32 or bfloat16, computed in float32. The plain equivalent is `xla_swiglu_halves` in `model/moe.py`."""

import functools
import math

import jax
import numpy as np

from gptoss_jax.kernels.cpu import build

# alpha, limit and up_offset of the activation.
Constants = tuple[float, float | None, float]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def swiglu_halves(constants: Constants, h_RF: jax.Array) -> jax.Array:
    """Returns SwiGLU of the two halves of each row, [R, 2 F] -> [R, F]; the gradient saves only the input."""
    R, columns = h_RF.shape
    return _call("SwiGLU", (R, columns // 2), constants, h_RF)


def _backward(constants: Constants, h_RF: jax.Array, g_RF: jax.Array) -> tuple[jax.Array]:
    return (_call("SwiGLUGrad", h_RF.shape, constants, h_RF, g_RF),)


swiglu_halves.defvjp(lambda constants, h_RF: (swiglu_halves(constants, h_RF), h_RF), _backward)


def _call(name: str, shape: tuple[int, ...], constants: Constants, *operands: jax.Array) -> jax.Array:
    alpha, limit, up_offset = constants
    call = jax.ffi.ffi_call(build.target(name), jax.ShapeDtypeStruct(shape, operands[0].dtype))
    return call(
        *operands,
        alpha=np.float32(alpha),
        limit=np.float32(math.inf if limit is None else limit),
        up_offset=np.float32(up_offset),
    )
