"""Streams lazy tensors into sharded arrays and back, multithreaded, one layer of one parameter at a time."""

import functools
import math
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout

from gptoss_jax.checkpoints.lazy_tensors import (
    DenseTensor,
    DequantizedTensor,
    Index,
    LazyTensor,
    copy_cast,
)
from gptoss_jax.kernels.cpu import unpack
from gptoss_jax.kernels.mxfp4 import codec

# Bytes per thread and read: small enough for the cache, large enough to amortize NumPy's overhead.
TASK_BYTES = 8 << 20


def read_slices(slices: Iterable[tuple[np.ndarray, LazyTensor, Index]]) -> set[str]:
    """Reads a slice of a tensor into each array, multithreaded.

    Returns the names of tensors with NaN or infinite values.
    """
    tasks = []
    for out, tensor, index in slices:
        first, *rest = (slice(*part.indices(size)) for part, size in zip(index, tensor.shape, strict=True))
        step = max(1, TASK_BYTES * len(out) // max(out.nbytes, 1))
        for i in range(0, len(out), step):
            rows = slice(first.start + i, min(first.start + i + step, first.stop))
            tasks.append((out[i : i + step], tensor, (rows, *rest)))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    if any(isinstance(tensor, DequantizedTensor) for _, tensor, _ in tasks):
        unpack.is_supported()  # compiles the kernel here, once, and not in every thread
    with ThreadPoolExecutor(cores) as pool:
        finite = pool.map(lambda task: task[1].read_into(task[0], task[2]), tasks)
        return {tensor.name for (_, tensor, _), is_finite in zip(tasks, finite, strict=True) if not is_finite}


def with_layout(
    key: str, leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding
) -> jax.ShapeDtypeStruct:
    """Adds a sharding to an abstract parameter and, on TPU, the memory layout that programs expect if it is
    not XLA's default. `key` is the last two names of the parameter's path."""
    # XLA's default for these is column-major, and it transposes the whole table for each lookup, and the head
    # for the loss.
    order = (
        (0, 1)
        if key in ("embedding.weight", "head.weight")
        else codec.TPU_LAYOUTS.get(key.rpartition("_")[2])
    )
    place: jax.sharding.Sharding | Format = sharding
    if order is not None and _platform(sharding) == "tpu":
        leading = leaf.ndim - len(order)
        place = Format(Layout((*range(leading), *(leading + axis for axis in order))), sharding)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def _platform(sharding: jax.sharding.Sharding) -> str:
    device: jax.Device = next(iter(sharding.device_set))
    return device.platform


def load_sharded(leaf: jax.ShapeDtypeStruct, tensors: list[LazyTensor]) -> tuple[jax.Array, set[str]]:
    """Reads one array of the parameter tree, filling each shard directly from the source.

    Args:
      leaf: shape, dtype, sharding and optionally memory layout of the array.
      tensors: one per layer, stacked along the first axis of the array, or a single one for the whole array.

    Returns:
      The array, and the names of tensors with NaN or infinite values.
    """
    is_stacked, layout = len(leaf.shape) > len(tensors[0].shape), leaf.format.layout
    devices_by_index: dict[tuple, list[jax.Device]] = {}
    for device, index in leaf.sharding.addressable_devices_indices_map(leaf.shape).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, leaf.shape, strict=True))
        devices_by_index.setdefault(bounds, []).append(device)
    shards: list[jax.Array] = []
    non_finite: set[str] = set()
    for bounds, devices in devices_by_index.items():
        index = tuple(slice(start, stop) for start, stop in bounds)
        layers, index = (tensors[index[0]], index[1:]) if is_stacked else (tensors, index)
        formats = [Format(layout, jax.sharding.SingleDeviceSharding(device)) for device in devices]
        if is_stacked and (devices[0].platform != "cpu" or layout is not None):
            arrays, names = _stack_on_devices(leaf.dtype, index, layers, formats)
        else:
            # On CPU, jax takes over the host's array without a copy; devices with the same shard share it.
            host, names = _read_on_host(leaf.dtype, index, layers)
            arrays = [jax.device_put(host if is_stacked else host[0], place) for place in formats]
        shards += arrays
        non_finite |= names
    array = jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)
    # Otherwise the host would hold this array, still in transfer, together with the next one.
    return jax.block_until_ready(array), non_finite


def _read_on_host(dtype: np.dtype, index: Index, tensors: list[LazyTensor]) -> tuple[np.ndarray, set[str]]:
    """Reads the same slice of every tensor into one array, [tensors, ...]."""
    shape = (len(tensors), *(part.stop - part.start for part in index))
    # On CPU, jax takes over an array without a copy if it is aligned to 64 bytes.
    raw = np.empty(math.prod(shape) * np.dtype(dtype).itemsize + 64, np.uint8)
    start = -raw.ctypes.data % 64
    out = raw[start : start + len(raw) - 64].view(dtype).reshape(shape)
    return out, read_slices((row, tensor, index) for row, tensor in zip(out, tensors, strict=True))


def _stack_on_devices(
    dtype: np.dtype, index: Index, tensors: list[LazyTensor], formats: list[Format]
) -> tuple[list[jax.Array], set[str]]:
    """Stacks the same slice of every tensor on each device; the host holds one layer at a time. Packed
    experts are sent as they are stored and dequantized on the device."""
    shape = (len(tensors), *(part.stop - part.start for part in index))
    arrays = [_zeros_program(shape, np.dtype(dtype), place)() for place in formats]
    non_finite: set[str] = set()
    for i, tensor in enumerate(tensors):
        if isinstance(tensor, DequantizedTensor):
            arrays, is_finite = _unpack_on_devices(arrays, i, tensor, index, formats)
            names = set() if is_finite else {tensor.name}
        else:
            (host,), names = _read_on_host(dtype, index, [tensor])
            arrays = [
                _setting_program(place)(array, jax.device_put(host, place.sharding), i)
                for array, place in zip(arrays, formats, strict=True)
            ]
        non_finite |= names
        jax.block_until_ready(arrays)
    return arrays, non_finite


def _unpack_on_devices(
    arrays: list[jax.Array], i: int, tensor: DequantizedTensor, index: Index, formats: list[Format]
) -> tuple[list[jax.Array], bool]:
    """Sets layer i on each device from packed bytes, a quarter of the values; returns if all are finite."""
    *packed, start = tensor.packed(index)
    host = [
        _read_on_host(part.dtype, tuple(slice(0, size) for size in part.shape), [DenseTensor("", part)])[0][0]
        for part in packed
    ]
    results = [
        _unpacking_program(place, start)(array, *jax.device_put(host, place.sharding), i)
        for array, place in zip(arrays, formats, strict=True)
    ]
    return [array for array, _ in results], bool(results[0][1])


@functools.cache
def _zeros_program(shape: tuple[int, ...], dtype: np.dtype, place: Format) -> Callable[[], jax.Array]:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=place)


@functools.cache
def _setting_program(place: Format) -> Callable[[jax.Array, jax.Array, int], jax.Array]:
    """Compiles (array, layer, i) -> the array with layer i set, in place (donated)."""

    def set_layer(array: jax.Array, layer: jax.Array, i: int) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(array, layer, i, 0)

    return jax.jit(set_layer, donate_argnums=0, out_shardings=place)


@functools.cache
def _unpacking_program(place: Format, start: int) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Compiles (array [L, E, D, (P,) F], blocks [E, F, (P,) G, 16], scales [E, F, (P,) G], i) -> the array
    with layer i set, in place (donated), and whether all its values are finite.

    `start` is the first value along D. The device needs extra memory for one expert besides the bytes.
    """

    def set_layer(array, blocks, scales, i):
        def set_expert(e, state):
            array, is_finite = state
            values = codec.dequantize(blocks[e], scales[e], array.dtype)
            values = jnp.swapaxes(values[..., start : start + array.shape[2]], 0, -1)
            at = (i, e, *(0 for _ in values.shape))
            array = jax.lax.dynamic_update_slice(array, values[None, None], at)
            return array, is_finite & jnp.all(jnp.isfinite(values))

        return jax.lax.fori_loop(0, len(blocks), set_expert, (array, jnp.bool_(True)))

    assert place.sharding is not None  # that of one device's shard
    finite = jax.sharding.SingleDeviceSharding(next(iter(place.sharding.device_set)))
    return jax.jit(set_layer, donate_argnums=0, out_shardings=(place, finite))


def layer_on_host(array: jax.Array, layer: int | None) -> np.ndarray:
    """Returns one layer of a stacked array, or the whole array (None), on the host.

    This is a view if the array is in host memory; otherwise it is assembled from the shards, and a device
    needs extra memory for only one layer of its shard.
    """
    if len(array.sharding.device_set) == 1 and next(iter(array.devices())).platform == "cpu":
        whole = np.asarray(array)
        return whole if layer is None else whole[layer]
    out = np.empty(array.shape if layer is None else array.shape[1:], array.dtype)
    shards = {str(shard.index): shard for shard in array.addressable_shards}
    for shard in shards.values():
        data, index = shard.data, shard.index
        if layer is not None:  # the axis of layers is not sharded
            data, index = jax.lax.dynamic_index_in_dim(data, layer, keepdims=False), index[1:]
        copy_cast(out[index], np.asarray(data))
    return out
