"""Parts of weights on their way between files and devices: copied, cast, packed or unpacked, never whole.

A piece is one parameter of one layer, with our axes, wherever it comes from. It fills an array with any slice
of itself, so that a slice is all that is ever held besides the source and the result.
"""

import dataclasses
import functools
import math
import threading
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from gptoss_jax.kernels.mxfp4 import codec

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# Rows of a matrix that are turned at a time: their lines stay in the cache.
TURNED_ROWS = 256
# Bytes of codes that are unpacked at a time; as many are worth compiling the unpacking for.
UNPACKED_BYTES = 1 << 18

Index = tuple[slice, ...]


class LazyTensor(Protocol):
    """One parameter of one layer."""

    name: str  # of the tensor it is read from
    shape: tuple[int, ...]

    def fill(self, out: np.ndarray, index: Index) -> bool:
        """Writes `piece[index]`, whose shape `out` has, in the type of `out`; says whether all is finite."""


@dataclasses.dataclass
class DenseTensor:
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
            return not (self.name.endswith("scales") and np.any(out == codec.NAN_SCALE))
        return is_finite(out)


@dataclasses.dataclass
class ConstantTensor:
    """One number everywhere: what a model lacks and the published format wants."""

    name: str
    shape: tuple[int, ...]
    value: float

    def fill(self, out: np.ndarray, index: Index) -> bool:
        out[...] = self.value
        return True


@dataclasses.dataclass
class DequantizedTensor:
    """Experts that the source holds in MXFP4, as numbers. Groups run along our axis 1, which stands last
    there."""

    name: str
    blocks: np.ndarray  # uint8 [E, rows, G, 16]
    scales: np.ndarray  # uint8 [E, rows, G]
    # Whether rows take turns that have an axis of their own as numbers, the one before the last.
    pairs: bool = False
    release: Callable[[np.ndarray], None] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        experts, rows, groups = self.scales.shape
        apart = (rows // 2, 2) if self.pairs else (rows,)
        return _turned((experts, *apart, codec.GROUP * groups))

    def fill(self, out: np.ndarray, index: Index) -> bool:
        experts, rows, *turns, values = _turned(index)
        if turns:
            rows = slice(2 * rows.start, 2 * rows.stop)
        first, last = values.start // codec.GROUP, -(-values.stop // codec.GROUP)
        held = blocks, scales = [array[experts, rows, first:last] for array in (self.blocks, self.scales)]
        if turns:
            blocks, scales = (
                part.reshape(len(part), -1, 2, *part.shape[2:])[:, :, turns[0]] for part in held
            )
        for e in range(len(blocks)):
            # The bytes are turned, not the numbers, which are four times as much.
            turned = _transposed(blocks[e].reshape(*blocks.shape[1:-2], -1))
            codes = turned.reshape(last - first, codec.BYTES, *turned.shape[1:])
            powers = np.ascontiguousarray(scales[e].T)[:, None]
            step = max(1, UNPACKED_BYTES // max(1, codes[0].nbytes))
            for g in range(0, last - first, step):
                numbers = _numbers(codes[g : g + step], powers[g : g + step])
                start = (first + g) * codec.GROUP
                low, high = max(values.start, start), min(values.stop, start + len(numbers))
                copy_cast(
                    out[e, low - values.start : high - values.start], numbers[low - start : high - start]
                )
        if self.release is not None:
            for part in held:
                self.release(part)
        # Two scales below that of NaN, the largest codes are infinite.
        return scales.size == 0 or int(scales.max()) < codec.NAN_SCALE - 2 or is_finite(out)


@dataclasses.dataclass
class StackedExperts:
    """Experts that the source holds one by one: one array each, or two, gate and up, along our axis P."""

    name: str
    parts: list[list[DenseTensor]]

    @property
    def shape(self) -> tuple[int, ...]:
        each = self.parts[0][0].shape
        pair = (2,) if len(self.parts[0]) == 2 else ()
        return (len(self.parts), *each[:-1], *pair, each[-1])

    @property
    def dtype(self) -> np.dtype:
        kinds = {part.dtype for parts in self.parts for part in parts}
        return kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)

    def fill(self, out: np.ndarray, index: Index) -> bool:
        finite = True
        for row, parts in zip(out, self.parts[index[0]], strict=True):
            if len(parts) == 1:
                finite &= parts[0].fill(row, index[1:])
                continue
            # Gate and up have no axis P of their own.
            for place, part in enumerate(parts[index[-2]]):
                finite &= part.fill(row[..., place, :], (*index[1:-2], index[-1]))
        return finite


@dataclasses.dataclass
class QuantizedTensor:
    """Experts that the source holds as numbers, in MXFP4: the blocks, or the scales."""

    source: DenseTensor | StackedExperts
    want: str  # "blocks" or "scales"

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def shape(self) -> tuple[int, ...]:
        experts, *rows, values = _turned(self.source.shape)
        shape = (experts, math.prod(rows), values // codec.GROUP)
        return (*shape, codec.BYTES) if self.want == "blocks" else shape

    def fill(self, out: np.ndarray, index: Index) -> bool:
        experts, rows, groups = index[:3]
        # Rows that take turns here have an axis of their own there: both of a pair are asked for.
        turns = self.source.shape[2:-1]
        each = math.prod(turns)
        rows = slice(rows.start // each, rows.stop // each)
        values = slice(groups.start * codec.GROUP, groups.stop * codec.GROUP)
        there = _turned((experts, rows, *(slice(0, count) for count in turns), values))
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
    return xp.stack(codec.bfloat16_bits(codes, powers, xp), axis=2)


def _packed_blocks(numbers):
    return codec.pack(numbers, axis=0)[0]


def _packed_scales(numbers):
    return codec.pack_scales(numbers, axis=0)


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
