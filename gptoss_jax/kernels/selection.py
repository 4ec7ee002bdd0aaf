"""Selection between a hand-written kernel and the plain XLA code that replaces it.

A kernel is off if the setting `model.kernels`, the environment variable GPTOSS_JAX_KERNELS or, on GPU and
TPU, a failed check (`first_use.py`) says so. All three are looked at when a program is traced.
"""

import contextlib
import contextvars
from collections.abc import Iterator

from gptoss_jax.config.kernels import ENVIRONMENT, KERNELS, kernel_variable, plain_kernels
from gptoss_jax.kernels import backend, first_use

_setting = contextvars.ContextVar("kernels", default="auto")


@contextlib.contextmanager
def using(setting: str) -> Iterator[None]:
    """Applies a `model.kernels` setting to all that is traced inside."""
    token = _setting.set(setting)
    try:
        yield
    finally:
        _setting.reset(token)


def is_enabled(kernel: str) -> bool:
    """Returns True if a kernel, one of `config.kernels.KERNELS`, exists for the platform compiled for and is
    not off."""
    if backend.platform() not in KERNELS[kernel]:
        return False
    off = plain_kernels(_setting.get(), "model.kernels") | plain_kernels(kernel_variable(), ENVIRONMENT)
    return kernel not in off and kernel not in failed_kernels()


def failed_kernels() -> frozenset[str]:
    """The kernels that failed their check on this machine, which is run first if it has not been; empty on
    CPU and where a setting skips the check or uses no kernel."""
    if backend.platform() == "cpu" or {"unchecked", "plain"} & {_setting.get(), kernel_variable()}:
        return frozenset()
    return first_use.failed_kernels(backend.platform())
