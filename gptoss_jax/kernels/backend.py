"""What a program is compiled for: the one place where code asks, so that it can choose its kernels."""

import jax


def platform() -> str:
    """That of the mesh in use (`jax.set_mesh`), else of the default device: "cpu", "gpu" or "tpu".

    A mesh may be of devices that are not here, as when a step is compiled for a TPU on a machine without one.
    """
    device = _device_of_mesh()
    return jax.default_backend() if device is None else device.platform


def device_kind() -> str:
    """What JAX calls the device, "TPU v5 lite" for one."""
    device = _device_of_mesh()
    return jax.devices()[0].device_kind if device is None else device.device_kind


def is_spread() -> bool:
    """Whether a program is for several devices, which the compiler shares its arrays among: it cannot cut a
    call into a kernel of ours in parts, and would bring all of them to every device."""
    return jax.sharding.get_abstract_mesh().size > 1


def _device_of_mesh():
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh.abstract_device
