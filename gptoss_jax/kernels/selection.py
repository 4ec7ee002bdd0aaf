"""Whether a hand-written kernel runs or the plain XLA code that it replaces.

Three things turn a kernel off: the setting `model.kernels`, the environment variable GPTOSS_JAX_KERNELS, and,
on GPU and TPU, a failed check (`first_use.py`). All are looked at when a program is traced.
"""

import contextlib
import contextvars
import os
from collections.abc import Iterator

from gptoss_jax.config.kernels import plain_kernels
from gptoss_jax.kernels import first_use, target

ENVIRONMENT = "GPTOSS_JAX_KERNELS"
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
    """Whether to use this kernel, one of `config.kernels.KERNELS`, on the platform compiled for."""
    settings = _setting.get(), os.environ.get(ENVIRONMENT, "auto")
    if kernel in plain_kernels(settings[0], "model.kernels") | plain_kernels(settings[1], ENVIRONMENT):
        return False
    if target.platform() == "cpu" or "unchecked" in settings:
        return True
    return kernel not in first_use.failed_kernels(target.platform())
