"""Queries the backend that a program is compiled for; kernel selection uses only this module."""

import contextlib
import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import jaxlib

# Decorator that traces a function with `jax_enable_x64` off. With it on, Pallas kernels would compute indices
# in int64, which neither Mosaic nor Triton supports. Arguments of 32 bits or less are not affected.
without_x64 = jax.enable_x64(False)


def matmul_precision(dtype: jnp.dtype) -> str:
    """Returns "highest" for float32, which TPUs and GPUs would otherwise round to bfloat16 or TF32 before
    multiplying, and "default" for narrower dtypes, the only precision that TPU kernels accept for them."""
    return "highest" if dtype == jnp.float32 else "default"


def platform() -> str:
    """Returns the platform of the current mesh (`jax.set_mesh`) or the default device: "cpu", "gpu" or "tpu".

    A mesh may have devices that are not attached, as when compiling for TPU on a machine without one.
    """
    device = _device_of_mesh()
    return jax.default_backend() if device is None else device.platform


def device_kind() -> str:
    """Returns JAX's name for the kind of device, such as "TPU v5 lite"."""
    device = _device_of_mesh()
    return jax.devices()[0].device_kind if device is None else device.device_kind


def is_multi_device() -> bool:
    """Returns True if the compiler partitions the arrays of a program over several devices.

    The compiler cannot partition a call to our kernels, and would gather all operands on every device.
    """
    return jax.sharding.get_abstract_mesh().size > 1


def _device_of_mesh() -> jax.sharding.AbstractDevice | None:
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh.abstract_device


@functools.cache
def describe_device() -> str:
    """Describes the default device and the versions of its compiler and driver, on one line."""
    device = jax.local_devices()[0]
    versions = [f"jax {jax.__version__}", f"jaxlib {jaxlib.__version__}", device.client.platform_version]
    with contextlib.suppress(OSError):
        # "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  …"; CUDA's own version is jaxlib's.
        text = pathlib.Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
        if device.platform == "gpu" and (driver := re.search(r"[0-9]+[.][0-9.]+", text)):
            versions.append(f"driver {driver[0]}")
    names = dict.fromkeys((device.platform, device.device_kind, *versions))  # "cpu" is all three on a CPU
    return " ".join(", ".join(names).split())
