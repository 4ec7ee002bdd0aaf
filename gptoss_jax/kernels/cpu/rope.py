"""Rotary position embedding on CPU: the kernel in `rope.cc`, one pass over memory; heads in float32 or
bfloat16, computed in float32.

The plain equivalent is `xla_rope` in `model/rope.py`. XLA fuses it into each of its uses, which compute the
cosines again for every head.
"""

import jax

from gptoss_jax.kernels import backend
from gptoss_jax.kernels.cpu import build


def is_supported(x_BTNH: jax.Array) -> bool:
    """Returns True if the kernel can be used: on one CPU device, enabled, and compiled; not in
    decoding, where a token per row is less work than a call."""
    fits = x_BTNH.shape[1] > 1 and not backend.is_multi_device()
    return fits and build.is_usable("rope", x_BTNH.dtype)


@jax.custom_vjp
def rope(x_BTNH: jax.Array, cos_BTJ: jax.Array, sin_BTJ: jax.Array) -> jax.Array:
    """Returns every head rotated by its token's angles, J = H / 2. The tables have no gradient."""
    return _rotate(x_BTNH, cos_BTJ, sin_BTJ, inverse=False)


def _backward(tables: tuple[jax.Array, jax.Array], g_BTNH: jax.Array) -> tuple[jax.Array, None, None]:
    return _rotate(g_BTNH, *tables, inverse=True), None, None


rope.defvjp(lambda x_BTNH, *tables: (rope(x_BTNH, *tables), tables), _backward)


def _rotate(x_BTNH: jax.Array, cos_BTJ: jax.Array, sin_BTJ: jax.Array, *, inverse: bool) -> jax.Array:
    call = jax.ffi.ffi_call(build.target("Rope"), jax.ShapeDtypeStruct(x_BTNH.shape, x_BTNH.dtype))
    return call(x_BTNH, cos_BTJ, sin_BTJ, inverse=inverse)
