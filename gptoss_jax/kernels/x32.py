"""Kernels under `jax_enable_x64`."""

import functools
from collections.abc import Callable

import jax


def without_x64(function: Callable) -> Callable:
    """Traces a function as if `jax_enable_x64` were off.

    Pallas kernels need it: under that setting the integers that they compute indices from would be int64,
    which neither Mosaic nor Triton indexes with. Arguments of 32 bits and less are not affected.
    """

    @functools.wraps(function)
    def traced(*args, **kwargs):
        with jax.enable_x64(False):
            return function(*args, **kwargs)

    return traced
