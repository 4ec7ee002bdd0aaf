"""The device mesh: its axes, construction, and the axis sizes of the current mesh."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from gptoss_jax.config import MeshConfig, ModelConfig, require
from gptoss_jax.config.base import nearest

# Those of MeshConfig, in order: devices along the last axis are nearest neighbors.
AXES = tuple(MeshConfig().sizes)
# Axes that split the sequences of a batch. The context axis splits each of them (`parallel/context.py`).
SEQUENCES = ("data", "fsdp", "expert")
# Axes that split the rows of the model's activations, and over which gradients are summed: a row is a
# sequence or, with a context axis, a part of one. Devices along the tensor axis have the same rows.
BATCH = ("data", "fsdp", "context", "expert")


def divisors(number: int, most: int) -> list[int]:
    """Returns the divisors of a number up to `most`, in ascending order."""
    return [size for size in range(1, min(number, most) + 1) if number % size == 0]


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh of the devices (default: all) with the axis sizes of the config.

    The axes have type Auto: the compiler chooses all shardings that parameters and a few constraints do not
    fix. With `dcn_data` and `dcn_fsdp`, only the outermost steps along these axes lead to another slice.

    Raises ValueError, with valid sizes, if the axis sizes do not multiply to the number of devices, or those
    of the slices not to the number of slices.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    sizes = config.sizes
    product = math.prod(size for size in sizes.values() if size != -1)
    if count % product or (product != count and -1 not in sizes.values()):
        asked = " x ".join(f"{name} {size}" for name, size in sizes.items())
        allowed = f"axis sizes must multiply to {count}, the number of devices; {_valid_sizes(sizes, count)}"
        raise ValueError(f"mesh is {asked}: {allowed}")
    shape = tuple(count // product if size == -1 else size for size in sizes.values())
    return Mesh(_grid(config, shape, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _grid(config: MeshConfig, shape: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
    """Returns the devices in the shape of the mesh."""
    for axis in ("data", "fsdp"):
        outer, size = getattr(config, f"dcn_{axis}"), shape[AXES.index(axis)]
        allowed = f"must divide mesh.{axis} ({size}), of which it is the number of slices"
        require(size % outer == 0, f"mesh.dcn_{axis}", outer, allowed)
    if config.slices == 1 and devices[0].platform != "tpu":
        # Any axis may lead to another node: JAX gives the GPUs of a node a slice of their own.
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    processes = len({device.process_index for device in devices})
    # CPUs have no slices: the network joins processes.
    by_process = slices == 1 and processes > 1 and devices[0].platform != "tpu"
    granules = processes if by_process else slices
    is_simulated = granules == 1 and devices[0].platform == "cpu"
    joined = "the number of processes" if by_process else "the number of slices of these devices"
    allowed = f"mesh.dcn_data times mesh.dcn_fsdp must be {granules}, {joined}"
    is_right = config.slices == granules or is_simulated
    name = "dcn_data" if config.dcn_fsdp == 1 else "dcn_fsdp"
    require(is_right, f"mesh.{name}", getattr(config, name), allowed)
    # A mesh axis may split a physical axis: an expert axis of 8 on a 4x4x4 slice takes two of its rows.
    if config.slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    outer_shape = [getattr(config, f"dcn_{axis}", 1) for axis in AXES]
    inner_shape = [size // outer for size, outer in zip(shape, outer_shape, strict=True)]
    if is_simulated:
        # Equal parts of the devices, in order.
        parts = np.array(devices).reshape(*outer_shape, *inner_shape)
        order = np.arange(2 * len(AXES)).reshape(2, -1).T.ravel()
        return parts.transpose(order).reshape(shape)
    return mesh_utils.create_hybrid_device_mesh(
        inner_shape,
        outer_shape,
        devices,
        process_is_granule=by_process,
        allow_split_physical_axes=True,
    )


def _valid_sizes(sizes: dict[str, int], count: int) -> str:
    """Describes the axis sizes that fit the devices, for a single axis if changing one is enough."""
    valid = []
    for name, size in sizes.items():
        others = math.prod(other for key, other in sizes.items() if key != name and other != -1)
        if -1 in sizes.values() and size != -1:
            valid += [f"{name} {', '.join(map(str, divisors(count // others, count)))}"] * (
                count % others == 0
            )
        elif size != -1 and count % others == 0:
            valid.append(f"{name} {count // others}")
    of_each_axis = ", ".join(map(str, divisors(count, count)))
    return f"valid sizes: {' or '.join(valid) if valid else f'{of_each_axis} for each axis'}"


def check_model(config: ModelConfig, axes: Mapping[str, int]) -> None:
    """Raises ValueError, with the valid sizes, if mesh axes of these sizes cannot shard a model."""
    split = {
        "expert": ("num_local_experts",),
        "tensor": ("num_key_value_heads", "intermediate_size", "vocab_size"),
        "fsdp": ("hidden_size",),
    }
    for axis, fields in split.items():
        sizes = {field: getattr(config, field) for field in fields}
        valid = ", ".join(map(str, divisors(math.gcd(*sizes.values()), math.prod(axes.values()))))
        for field, size in sizes.items():
            allowed = f"must divide model.{field} ({size}); valid sizes: {valid}"
            require(size % axes[axis] == 0, f"mesh.{axis}", axes[axis], allowed)


def parse_mesh(text: str, devices: int) -> dict[str, int]:
    """Returns sizes by axis from text such as "fsdp=16,expert=4"; other axes are 1, and one may be -1.

    Raises ValueError for an unknown axis, and if the sizes do not multiply to the number of devices.
    """
    sizes = _parse_config(text).sizes
    product = math.prod(size for size in sizes.values() if size != -1)
    sizes = {name: devices // product if size == -1 else size for name, size in sizes.items()}
    allowed = f"axis sizes must multiply to {devices}, the number of devices"
    require(math.prod(sizes.values()) == devices, "mesh", text, allowed)
    return sizes


def _parse_config(text: str) -> MeshConfig:
    sizes = dict.fromkeys(AXES, 1)
    for part in filter(None, text.replace(" ", "").split(",")):
        name, _, size = part.partition("=")
        near = nearest(name, AXES)
        hint = f"did you mean {near}? " if near else ""
        require(name in sizes, "mesh", text, f"{hint}axes are {', '.join(AXES)}")
        is_number = size.removeprefix("-").isdecimal()
        require(is_number, "mesh", text, "must be axis=number, such as fsdp=16,expert=4")
        sizes[name] = int(size)
    return MeshConfig(**sizes)


@contextlib.contextmanager
def use_mesh(text: str | None) -> Iterator[Mesh | None]:
    """Makes a mesh such as "tensor=2" the current one for inference; None uses one device, without a mesh.

    A mesh may have fewer devices than the machine: it takes the first ones. Raises ValueError for an unknown
    axis, more devices than there are, and several processes.
    """
    if text is None:
        yield None
        return
    require(jax.process_count() == 1, "mesh", text, "must be left out: inference runs in a single process")
    available = jax.devices()
    config = _parse_config(text)
    sizes = config.sizes
    product = math.prod(size for size in sizes.values() if size != -1)
    count = len(available) if -1 in sizes.values() else product
    plural = "s" * (len(available) != 1)
    allowed = f"needs {product} devices, and this machine has {len(available)} JAX device{plural}"
    require(product <= len(available), "mesh", text, allowed)
    mesh = make_mesh(config, available[:count])
    with jax.set_mesh(mesh):
        yield mesh


def current_axes() -> dict[str, int]:
    """Returns the axis sizes of the current mesh (`jax.set_mesh`); empty for no mesh or one device."""
    axes = dict(jax.sharding.get_abstract_mesh().shape)
    return axes if math.prod(axes.values()) > 1 else {}


def batch_shards(axes: Mapping[str, int]) -> int:
    """Returns the number of shards of the rows of activations; 1 without a mesh."""
    return math.prod(axes.get(axis, 1) for axis in BATCH)


def sequence_shards(axes: Mapping[str, int]) -> int:
    """Returns the number of shards of the sequences of a batch; 1 without a mesh."""
    return math.prod(axes.get(axis, 1) for axis in SEQUENCES)
