import jax
import jax.numpy as jnp

from gptoss_jax.kernels import mxfp4, native
from gptoss_jax.kernels.grouped_matmul import grouped_matmul, is_native


def mxfp4_grouped_matmul(x_RD, blocks, scales, sizes, bias=None):
    if is_native(x_RD.dtype):
        no = jnp.zeros(0, jnp.float32)
        return jax.ffi.ffi_call(
            native.target("GroupedPacked"),
            jax.ShapeDtypeStruct((x_RD.shape[0], blocks.shape[1]), jnp.float32),
        )(x_RD, blocks, scales, no if bias is None else bias, sizes)
    w = mxfp4.unpack(blocks, scales, x_RD.dtype).swapaxes(1, -1)
    return grouped_matmul(x_RD, w, sizes, bias)
