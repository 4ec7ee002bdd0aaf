"""Dequantizes MXFP4 matrices into NumPy arrays, while loading weights: the kernel in `unpack_mxfp4.cc`."""

import ctypes
import functools
from collections.abc import Callable

import ml_dtypes
import numpy as np

from gptoss_jax.config.kernels import ENVIRONMENT, kernel_variable, plain_kernels
from gptoss_jax.kernels.cpu import build
from gptoss_jax.kernels.mxfp4.codec import BLOCK_BYTES, BLOCK_SIZE


def is_supported() -> bool:
    """Returns True if the kernel is compiled and not turned off. It runs on the host of any backend."""
    return "mxfp4_unpack" not in plain_kernels(kernel_variable(), ENVIRONMENT) and build.is_available()


def unpack(blocks_FGC: np.ndarray, scales_FG: np.ndarray, start: int, out_DF: np.ndarray) -> None:
    """Dequantizes rows into columns, exactly as `codec.dequantize`. Other Python threads run meanwhile.

    Args:
      blocks_FGC: uint8, 16 bytes for 32 values along D; only F may be strided.
      scales_FG: uint8, likewise.
      start: the value of each row that is first in `out_DF`.
      out_DF: bfloat16 or float32, for a range of the values of each row; only D may be strided.
    """
    (F, G), D = scales_FG.shape, len(out_DF)
    types = blocks_FGC.dtype, scales_FG.dtype, out_DF.dtype
    if types not in [(np.uint8, np.uint8, to) for to in (np.float32, ml_dtypes.bfloat16)]:
        raise TypeError(f"types are {', '.join(map(str, types))}: must be uint8, uint8, bfloat16 or float32")
    assert blocks_FGC.shape == (F, G, BLOCK_BYTES) and out_DF.shape == (D, F), (
        blocks_FGC.shape,
        out_DF.shape,
    )
    assert start >= 0 and start + D <= BLOCK_SIZE * G, (start, D, G)
    for array in (blocks_FGC, scales_FG, out_DF):
        assert array[:1].flags.c_contiguous, array.strides
    _kernel()(
        blocks_FGC.ctypes.data,
        blocks_FGC.strides[0],
        scales_FG.ctypes.data,
        scales_FG.strides[0],
        F,
        G,
        start,
        start + D,
        out_DF.ctypes.data,
        out_DF.strides[0],
        out_DF.itemsize,
    )


@functools.cache
def _kernel() -> Callable[..., None]:
    library = build.load_library()
    assert library is not None, "is_supported is False"
    function = library.UnpackMxfp4
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [pointer, size, pointer, size, size, size, size, size, pointer, size, size]
    function.restype = None
    return function
