"""Parts of weights on their way between files and devices: copied, cast, packed or unpacked, never whole.

A piece is one parameter of one layer, with our axes, wherever it comes from. It fills an array with any slice
of itself, so that a slice is all that is ever held besides the source and the result.
"""

import dataclasses
import functools
import math
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from gptoss_jax.kernels import mxfp4

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# What one thread works at: small enough for its cache, large enough for numpy's overhead.
TASK_BYTES = 8 << 20
# Rows of a matrix that are turned at a time: their lines stay in the cache.
TURNED_ROWS = 256
# Bytes of codes that are unpacked at a time; as many are worth compiling the unpacking for.
UNPACKED_BYTES = 1 << 18

Index = tuple[slice, ...]


class Piece(Protocol):
    """One parameter of one layer."""

    name: str  # of the tensor it is read from
    shape: tuple[int, ...]

    def fill(self, out: np.ndarray, index: Index) -> bool:
        """Writes `piece[index]`, whose shape `out` has, in the type of `out`; says whether all is finite."""


@dataclasses.dataclass
class Plain:
    """Numbers as they are, or packed bytes that stay packed. `array`: anything with slices and a shape."""

    name: str
    array: np.ndarray
    release: Callable[[np.ndarray], None] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    def fill(self, out: np.ndarray, index: Index) -> bool:
        part = self.array[index]
        if part.ndim > 1 and part.strides[-1] != part.itemsize:
            for i in range(0, part.shape[-1], TURNED_ROWS):
                copy_cast(out[..., i : i + TURNED_ROWS], part[..., i : i + TURNED_ROWS])
        else:
            copy_cast(out, part)
        if self.release is not None:
            self.release(part)
        if out.dtype == np.uint8:
            return not (self.name.endswith("scales") and np.any(out == mxfp4.NAN_SCALE))
        return is_finite(out)


@dataclasses.dataclass
class Constant:
    """One number everywhere: what a model lacks and the published format wants."""

    name: str
    shape: tuple[int, ...]
    value: float

    def fill(self, out: np.ndarray, index: Index) -> bool:
        out[...] = self.value
        return True


@dataclasses.dataclass
class Unpacked:
    """Experts that the source holds in MXFP4, as numbers. Groups run along our axis 1, which stands last
    there."""

    name: str
    blocks: np.ndarray  # uint8 [*rows, G, 16]
    scales: np.ndarray  # uint8 [*rows, G]
    release: Callable[[np.ndarray], None] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return _turned((*self.scales.shape[:-1], mxfp4.GROUP * self.scales.shape[-1]))

    def fill(self, out: np.ndarray, index: Index) -> bool:
        *rows, values = _turned(index)
        first, last = values.start // mxfp4.GROUP, -(-values.stop // mxfp4.GROUP)
        blocks, scales = (array[(*rows, slice(first, last))] for array in (self.blocks, self.scales))
        for e in range(len(blocks)):
            # The bytes are turned, not the numbers, which are four times as much.
            turned = _transposed(blocks[e].reshape(*blocks.shape[1:-2], -1))
            codes = turned.reshape(last - first, mxfp4.BYTES, *turned.shape[1:])
            powers = np.ascontiguousarray(scales[e].T)[:, None]
            step = max(1, UNPACKED_BYTES // max(1, codes[0].nbytes))
            for g in range(0, last - first, step):
                numbers = _numbers(codes[g : g + step], powers[g : g + step])
                start = (first + g) * mxfp4.GROUP
                low, high = max(values.start, start), min(values.stop, start + len(numbers))
                copy_cast(
                    out[e, low - values.start : high - values.start], numbers[low - start : high - start]
                )
        if self.release is not None:
            self.release(blocks)
            self.release(scales)
        # Two scales below that of NaN, the largest codes are infinite.
        return scales.size == 0 or int(scales.max()) < mxfp4.NAN_SCALE - 2 or is_finite(out)


@dataclasses.dataclass
class Packed:
    """Experts that the source holds as numbers, in MXFP4: the blocks, or the scales."""

    source: Plain
    want: str  # "blocks" or "scales"

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def shape(self) -> tuple[int, ...]:
        *rows, values = _turned(self.source.shape)
        groups = values // mxfp4.GROUP
        return (*rows, groups, mxfp4.BYTES) if self.want == "blocks" else (*rows, groups)

    def fill(self, out: np.ndarray, index: Index) -> bool:
        rows, groups = index[: len(self.source.shape) - 1], index[len(self.source.shape) - 1]
        values = slice(groups.start * mxfp4.GROUP, groups.stop * mxfp4.GROUP)
        there = _turned((*rows, values))
        # Narrower than bfloat16 is not known; what is wider is packed from float32.
        kind = BFLOAT16 if self.source.dtype == BFLOAT16 else np.float32
        finite = True
        for e in range(there[0].start, there[0].stop):
            index = (slice(e, e + 1), *there[1:])
            numbers = np.empty(tuple(part.stop - part.start for part in index), kind)
            finite &= self.source.fill(numbers, index)
            packed = _on_host(_packed_blocks if self.want == "blocks" else _packed_scales)(numbers[0])
            turned = _transposed(packed.reshape(-1, *numbers.shape[2:]))
            out[e - there[0].start] = turned.reshape(out.shape[1:])
        return finite


def _turned(axes):
    """Axis 1 and the last one exchanged: from our order to that of packed experts, and back."""
    axes = list(axes)
    axes[1], axes[-1] = axes[-1], axes[1]
    return tuple(axes)


def copy_cast(out: np.ndarray, values: np.ndarray) -> None:
    """Copies into an array of the same shape; exact where the type is as wide or wider, else to nearest
    even."""
    if out.dtype == values.dtype:
        # As integers: numpy copies a foreign type number by number.
        kind = f"u{out.itemsize}"
        out.view(kind)[...] = values.view(kind)
    elif out.dtype == np.float32 and values.dtype == BFLOAT16:
        bits = out.view(np.uint32)
        bits[...] = values.view(np.uint16)
        np.left_shift(bits, 16, out=bits)
    else:
        out[...] = values.astype(out.dtype)


def is_finite(numbers: np.ndarray) -> bool:
    """Whether none is infinite or not a number; `numbers` must be contiguous."""
    # Above the bits of infinity there are only NaNs, with either sign: two maxima, and no array besides.
    infinity = np.array(np.inf, numbers.dtype)
    signed, unsigned = numbers.view(f"i{numbers.itemsize}"), numbers.view(f"u{numbers.itemsize}")
    limits = infinity.view(signed.dtype), (-infinity).view(unsigned.dtype)
    return numbers.size == 0 or bool(signed.max() < limits[0] and unsigned.max() < limits[1])


_scratch = threading.local()


def _transposed(array: np.ndarray) -> np.ndarray:
    """All axes in reverse order, in memory of this thread's that the next call takes again."""
    # New memory for each matrix would cost more than the work: the system hands it over page by page.
    if getattr(_scratch, "raw", np.empty(0)).nbytes < array.nbytes:
        _scratch.raw = np.empty(array.nbytes, np.uint8)
    out = _scratch.raw[: array.nbytes].view(array.dtype).reshape(array.shape[::-1])
    for i in range(0, len(array), TURNED_ROWS):
        out[..., i : i + TURNED_ROWS] = array[i : i + TURNED_ROWS].T
    return out


def _numbers(codes: np.ndarray, powers: np.ndarray) -> np.ndarray:
    """Codes [g, 16, ...] and scales [g, 1, ...] -> bfloat16 [32 * g, ...]."""
    small = codes.nbytes < UNPACKED_BYTES // 16
    bits = _bits(codes, powers, np) if small else _on_host(_bits)(codes, powers)
    return bits.reshape(-1, *codes.shape[2:]).view(BFLOAT16)


def _bits(codes, powers, xp=jnp):
    return xp.stack(mxfp4.bfloat16_bits(codes, powers, xp), axis=2)


def _packed_blocks(numbers):
    return mxfp4.pack(numbers, axis=0)[0]


def _packed_scales(numbers):
    return mxfp4.pack_scales(numbers, axis=0)


@functools.cache
def _on_host(function: Callable) -> Callable[..., np.ndarray]:
    """The function compiled for this machine's processor, or for the first device where jax was told of no
    other."""
    compiled = jax.jit(function)
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        device = jax.local_devices()[0]
    return lambda *arrays: np.asarray(compiled(*jax.device_put(arrays, device)))


def fill(jobs: Iterable[tuple[np.ndarray, Piece, Index]]) -> list[str]:
    """Fills each array with a slice of its piece, on all cores.

    Returns the names of the tensors in which something infinite or not a number was met.
    """
    tasks = []
    for out, piece, index in jobs:
        index = tuple(slice(*part.indices(size)) for part, size in zip(index, piece.shape, strict=True))
        step = max(1, TASK_BYTES * len(out) // max(out.nbytes, 1))
        # What the source holds in another order is read best as a whole.
        whole = (
            isinstance(piece, Plain) and isinstance(piece.array, np.ndarray) and not _rows_first(piece.array)
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


def load(leaf: jax.ShapeDtypeStruct, pieces: list[Piece]) -> tuple[jax.Array, list[str]]:
    """One array of the parameter tree, read straight to its place.

    Args:
      leaf: shape, type and sharding; its first axis runs over the pieces unless there is one and it is as
        large.
      pieces: one for each layer.

    Returns:
      the array, and the names of tensors that are not finite.
    """
    stacked = len(leaf.shape) > len(pieces[0].shape)
    places: dict[tuple, list[jax.Device]] = {}
    for device, index in leaf.sharding.addressable_devices_indices_map(leaf.shape).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, leaf.shape, strict=True))
        places.setdefault(bounds, []).append(device)
    shards, names = [], set()
    for bounds, devices in places.items():
        index = tuple(slice(start, stop) for start, stop in bounds)
        if not stacked:
            part, unsound = _part(leaf.dtype, index, pieces[:1])
            shards += [jax.device_put(part, device) for device in devices]
        elif devices[0].platform == "cpu":
            # jax takes the array over as it is; devices with the same part share it.
            part, unsound = _part(leaf.dtype, index[1:], pieces[index[0]], stacked=True)
            shards += [jax.device_put(part, device) for device in devices]
        else:
            made, unsound = _layer_by_layer(leaf.dtype, index[1:], pieces[index[0]], devices)
            shards += made
        names.update(unsound)
    array = jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)
    # What is not on a device yet would be held on the host together with the next array.
    return jax.block_until_ready(array), sorted(names)


def _part(
    dtype: np.dtype, index: Index, pieces: list[Piece], stacked: bool = False
) -> tuple[np.ndarray, list[str]]:
    """The same slice of every piece, one after another where there may be several."""
    shape = tuple(part.stop - part.start for part in index)
    out = _aligned((len(pieces), *shape), dtype)
    names = fill((row, piece, index) for row, piece in zip(out, pieces, strict=True))
    return out if stacked else out[0], names


def _layer_by_layer(
    dtype: np.dtype, index: Index, pieces: list[Piece], devices: list[jax.Device]
) -> tuple[list[jax.Array], list[str]]:
    """The same slice of every piece, stacked on each of the devices: the host holds one layer's at a time."""
    shape, names = (len(pieces), *(part.stop - part.start for part in index)), set()
    made = [jnp.zeros(shape, dtype, device=device) for device in devices]
    for row, piece in enumerate(pieces):
        part, unsound = _part(dtype, index, [piece])
        names.update(unsound)
        made = [
            _with_row(array, jax.device_put(part, device), row)
            for array, device in zip(made, devices, strict=True)
        ]
        jax.block_until_ready(made)
    return made, sorted(names)


@functools.partial(jax.jit, donate_argnums=0)
def _with_row(array: jax.Array, row: jax.Array, index: int) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(array, row, index, 0)


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
        wanted = [(part.start, part.stop) for part in index]
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
