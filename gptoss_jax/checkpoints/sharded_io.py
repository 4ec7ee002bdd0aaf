"""Pieces of weights to arrays on devices, and such arrays to slices for pieces: on all cores, never whole."""

import functools
import math
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout

from gptoss_jax.checkpoints.lazy_tensors import DenseTensor, Index, LazyTensor, copy_cast
from gptoss_jax.kernels.mxfp4.codec import TPU_LAYOUTS

# What one thread works at: small enough for its cache, large enough for numpy's overhead.
TASK_BYTES = 8 << 20


def fill(jobs: Iterable[tuple[np.ndarray, LazyTensor, Index]]) -> list[str]:
    """Fills each array with a slice of its piece, on all cores.

    Returns the names of the tensors in which something infinite or not a number was met.
    """
    tasks = []
    for out, piece, index in jobs:
        index = tuple(slice(*part.indices(size)) for part, size in zip(index, piece.shape, strict=True))
        step = max(1, TASK_BYTES * len(out) // max(out.nbytes, 1))
        # What the source holds in another order is read best as a whole.
        whole = (
            isinstance(piece, DenseTensor)
            and isinstance(piece.array, np.ndarray)
            and not _rows_first(piece.array)
        )
        step = len(out) if whole else step
        for i in range(0, len(out), step):
            first = slice(index[0].start + i, min(index[0].start + i + step, index[0].stop))
            tasks.append((out[i : i + step], piece, (first, *index[1:])))

    def work(task) -> str | None:
        out, piece, index = task
        return None if piece.fill(out, index) else piece.name

    with ThreadPoolExecutor(
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    ) as pool:
        return sorted({name for name in pool.map(work, tasks) if name is not None})


def _rows_first(array: np.ndarray) -> bool:
    return array.ndim < 2 or array.strides[0] == max(array.strides)


def abstract(key: str, leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    """A leaf of the parameter tree with its place and, where a TPU's programs read it in another order than
    XLA would keep it in, its order in memory. `key` is the last two names of its path."""
    order = _order(key, leaf.ndim) if _platform(sharding) == "tpu" else None
    place = sharding if order is None else Format(Layout(order), sharding)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def _platform(sharding: jax.sharding.Sharding) -> str:
    return next(iter(sharding.device_set)).platform


def _order(key: str, ndim: int) -> tuple[int, ...] | None:
    """The axes of a parameter from the outermost to the innermost; None leaves them to XLA."""
    last = TPU_LAYOUTS.get(key.rpartition("_")[2])
    if key == "embedding.weight":
        # XLA keeps it by columns, and turns all of it before it looks up rows.
        last = (0, 1)
    if last is None:
        return None
    before = ndim - len(last)
    return (*range(before), *(before + axis for axis in last))


def load(leaf: jax.ShapeDtypeStruct, pieces: list[LazyTensor]) -> tuple[jax.Array, list[str]]:
    """One array of the parameter tree, read straight to its place.

    Args:
      leaf: shape, type, sharding and, where it matters, order in memory; its first axis runs over the pieces
        unless there is one and it is as large.
      pieces: one for each layer.

    Returns:
      the array, and the names of tensors that are not finite.
    """
    stacked, layout = len(leaf.shape) > len(pieces[0].shape), leaf.format.layout
    places: dict[tuple, list[jax.Device]] = {}
    for device, index in leaf.sharding.addressable_devices_indices_map(leaf.shape).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, leaf.shape, strict=True))
        places.setdefault(bounds, []).append(device)
    shards, names = [], set()
    for bounds, devices in places.items():
        index = tuple(slice(start, stop) for start, stop in bounds)
        if not stacked:
            part, non_finite = _part(leaf.dtype, index, pieces[:1])
            shards += [jax.device_put(part, _on(device, layout)) for device in devices]
        elif devices[0].platform == "cpu" and layout is None:
            # jax takes the array over as it is; devices with the same part share it.
            part, non_finite = _part(leaf.dtype, index[1:], pieces[index[0]], stacked=True)
            shards += [jax.device_put(part, device) for device in devices]
        else:
            made, non_finite = _layer_by_layer(leaf.dtype, index[1:], pieces[index[0]], devices, layout)
            shards += made
        names.update(non_finite)
    array = jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)
    # What is not on a device yet would be held on the host together with the next array.
    return jax.block_until_ready(array), sorted(names)


def _on(device: jax.Device, layout: Layout | None) -> Format:
    return Format(layout, jax.sharding.SingleDeviceSharding(device))


def _part(
    dtype: np.dtype, index: Index, pieces: list[LazyTensor], stacked: bool = False
) -> tuple[np.ndarray, list[str]]:
    """The same slice of every piece, one after another where there may be several."""
    shape = tuple(part.stop - part.start for part in index)
    out = _aligned((len(pieces), *shape), dtype)
    names = fill((row, piece, index) for row, piece in zip(out, pieces, strict=True))
    return out if stacked else out[0], names


def _layer_by_layer(
    dtype: np.dtype, index: Index, pieces: list[LazyTensor], devices: list[jax.Device], layout: Layout | None
) -> tuple[list[jax.Array], list[str]]:
    """The same slice of every piece, stacked on each of the devices: the host holds one layer's at a time."""
    shape, names = (len(pieces), *(part.stop - part.start for part in index)), set()
    programs = [_programs(shape, np.dtype(dtype), device, layout) for device in devices]
    made = [zeros() for zeros, _ in programs]
    for row, piece in enumerate(pieces):
        part, non_finite = _part(dtype, index, [piece])
        names.update(non_finite)
        made = [
            with_row(array, jax.device_put(part, device), row)
            for array, device, (_, with_row) in zip(made, devices, programs, strict=True)
        ]
        jax.block_until_ready(made)
    return made, sorted(names)


@functools.cache
def _programs(shape: tuple[int, ...], dtype: np.dtype, device: jax.Device, layout: Layout | None):
    """() -> zeros, and (array, row, index) -> the array with a row in place; both in the order asked for."""
    place = _on(device, layout)

    def with_row(array: jax.Array, row: jax.Array, index: int) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(array, row, index, 0)

    zeros = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=place)
    return zeros, jax.jit(with_row, donate_argnums=0, out_shardings=place)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that jax takes over on CPU as it is: it copies what does not lie at a multiple of 64."""
    dtype = np.dtype(dtype)
    count = math.prod(shape) * dtype.itemsize
    raw = np.empty(count + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + count].view(dtype).reshape(shape)


class DeviceRows:
    """One layer of a stacked array on devices; slices of it come to the host as they are asked for.

    Each is put together from the shards that hold it, device by device: nothing is gathered on a device.
    """

    def __init__(self, array: jax.Array, layer: int | None):
        self._layer = layer
        self.shape = array.shape if layer is None else array.shape[1:]
        self.dtype = np.dtype(array.dtype)
        self._shards = {}
        for shard in array.addressable_shards:
            bounds = tuple(
                part.indices(size)[:2] for part, size in zip(shard.index, array.shape, strict=True)
            )
            self._shards.setdefault(bounds, shard.data)

    def __getitem__(self, index: Index) -> np.ndarray:
        # As of an array, the last axes need not be named.
        whole = (slice(0, size) for size in self.shape[len(index) :])
        wanted = [(part.start, part.stop) for part in (*index, *whole)]
        if self._layer is not None:
            wanted = [(self._layer, self._layer + 1), *wanted]
        out = np.empty([stop - start for start, stop in wanted], self.dtype)
        for bounds, data in self._shards.items():
            common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(wanted, bounds, strict=True)]
            if all(start < stop for start, stop in common):
                starts = [start - first for (start, _), (first, _) in zip(common, bounds, strict=True)]
                part = jax.lax.dynamic_slice(data, starts, [stop - start for start, stop in common])
                into = tuple(
                    slice(start - first, stop - first)
                    for (start, stop), (first, _) in zip(common, wanted, strict=True)
                )
                copy_cast(out[into], np.asarray(part))
        return out if self._layer is None else out[0]


def layer_of(array: jax.Array, layer: int | None) -> np.ndarray | DeviceRows:
    """One layer of an array of the parameter tree (None: all of it): a view where it is host memory
    already."""
    if len(array.sharding.device_set) == 1 and next(iter(array.devices())).platform == "cpu":
        whole = np.asarray(array)
        return whole if layer is None else whole[layer]
    return DeviceRows(array, layer)
