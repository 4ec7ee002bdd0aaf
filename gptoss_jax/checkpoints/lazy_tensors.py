"""Lazy tensors: read any slice of one layer's parameter, casting, transposing and (de)quantizing on the fly.

A lazy tensor presents one layer's parameter with the model's axes, regardless of how it is stored. Besides
the source and the result, only the slice being read is in memory.
"""

import dataclasses
import functools
import math
import mmap
import threading
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, Literal, Protocol, TypeVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from gptoss_jax.kernels.cpu import unpack
from gptoss_jax.kernels.mxfp4 import codec

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# Matrix rows transposed at a time: few enough for their cache lines to stay in the cache.
TRANSPOSE_ROWS = 256
# Bytes of codes dequantized at a time. Below a sixteenth of this, compiling does not pay off.
DEQUANTIZE_BYTES = 1 << 18

Index = tuple[slice, ...]
Axis = TypeVar("Axis")


class LazyTensor(Protocol):
    """One layer's parameter, readable in slices."""

    @property
    def name(self) -> str:
        """Name of the checkpoint tensor that it is read from."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read_into(self, out: np.ndarray, index: Index) -> bool:
        """Copies `tensor[index]` to `out`, an array of the same shape, casting to its dtype.

        Returns whether all values are finite.
        """


class DenseLazyTensor(LazyTensor, Protocol):
    """A lazy tensor that is stored dense."""

    @property
    def dtype(self) -> np.dtype: ...


@dataclasses.dataclass(frozen=True)
class DenseTensor:
    """An array in memory or in a memory-mapped file; also packed bytes that stay packed."""

    name: str
    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    def read_into(self, out: np.ndarray, index: Index) -> bool:
        part = self.array[index]
        if part.ndim > 1 and part.strides[-1] != part.itemsize:
            for i in range(0, part.shape[-1], TRANSPOSE_ROWS):
                copy_cast(out[..., i : i + TRANSPOSE_ROWS], part[..., i : i + TRANSPOSE_ROWS])
        else:
            copy_cast(out, part)
        release_pages(part)
        if out.dtype == np.uint8:
            return not (self.name.endswith("scales") and np.any(out == codec.NAN_SCALE))
        return is_finite(out)


@dataclasses.dataclass(frozen=True)
class DequantizedTensor:
    """Expert weights stored in MXFP4, dequantized to [E, in, out] or [E, in, 2, out].

    Args:
      name: the name of the scales tensor.
      blocks: uint8 [E, rows, in / 32, 16].
      scales: uint8 [E, rows, in / 32].
      interleaved: rows alternate between gate and up, which become a separate axis.
    """

    name: str
    blocks: np.ndarray
    scales: np.ndarray
    interleaved: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        experts, rows, groups = self.scales.shape
        outputs = (rows // 2, 2) if self.interleaved else (rows,)
        return _swap_in_out((experts, *outputs, codec.BLOCK_SIZE * groups))

    def packed(self, index: Index) -> tuple[np.ndarray, np.ndarray, int]:
        """Returns views of the blocks [E, F, (P,) G, 16] and scales [E, F, (P,) G] that contain a slice, and
        the first value of the slice in each row of blocks."""
        experts, rows, *pair, inputs = _swap_in_out(index)
        if pair:
            rows = slice(2 * rows.start, 2 * rows.stop)
        first, last = inputs.start // codec.BLOCK_SIZE, -(-inputs.stop // codec.BLOCK_SIZE)
        blocks, scales = (array[experts, rows, first:last] for array in (self.blocks, self.scales))
        if pair:
            blocks, scales = (
                part.reshape(len(part), -1, 2, *part.shape[2:])[:, :, pair[0]] for part in (blocks, scales)
            )
        return blocks, scales, inputs.start - codec.BLOCK_SIZE * first

    def read_into(self, out: np.ndarray, index: Index) -> bool:
        blocks, scales, start = self.packed(index)
        read_expert = _unpack if unpack.is_supported() else _unpack_plain
        for e in range(len(blocks)):
            read_expert(blocks[e], scales[e], start, out[e])
        # With the two scales below NaN's, the largest codes overflow.
        finite = scales.size == 0 or int(scales.max()) < codec.NAN_SCALE - 2 or is_finite(out)
        for part in (blocks, scales):
            release_pages(part)
        return finite


@dataclasses.dataclass(frozen=True)
class StackedExperts:
    """Experts stored as separate tensors: one per expert, or two (gate and up), stacked along axis P."""

    name: str
    experts: list[list[DenseTensor]]

    @property
    def shape(self) -> tuple[int, ...]:
        first, *others = self.experts[0]
        pair = (2,) if others else ()
        return (len(self.experts), *first.shape[:-1], *pair, first.shape[-1])

    @property
    def dtype(self) -> np.dtype:
        return common_dtype(part.dtype for parts in self.experts for part in parts)

    def read_into(self, out: np.ndarray, index: Index) -> bool:
        finite = True
        for row, parts in zip(out, self.experts[index[0]], strict=True):
            if len(parts) == 1:
                finite &= parts[0].read_into(row, index[1:])
                continue
            # Separate gate and up tensors lack axis P, the second to last.
            for i, part in enumerate(parts[index[-2]]):
                finite &= part.read_into(row[..., i, :], (*index[1:-2], index[-1]))
        return finite


@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """The MXFP4 blocks or scales of experts that are stored dense, quantized when read."""

    source: DenseLazyTensor
    part: Literal["blocks", "scales"]

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def shape(self) -> tuple[int, ...]:
        experts, *rows, inputs = _swap_in_out(self.source.shape)
        shape = (experts, math.prod(rows), inputs // codec.BLOCK_SIZE)
        return (*shape, codec.BLOCK_BYTES) if self.part == "blocks" else shape

    def read_into(self, out: np.ndarray, index: Index) -> bool:
        experts, rows, groups = index[:3]
        # Interleaved rows are a separate axis in the source; requests always cover both rows of a pair.
        pair = self.source.shape[2:-1]
        rows = slice(rows.start // math.prod(pair), rows.stop // math.prod(pair))
        inputs = slice(groups.start * codec.BLOCK_SIZE, groups.stop * codec.BLOCK_SIZE)
        dense_index = _swap_in_out((experts, rows, *(slice(0, size) for size in pair), inputs))[1:]
        dtype = BFLOAT16 if self.source.dtype == BFLOAT16 else np.float32
        values = np.empty((1, *(part.stop - part.start for part in dense_index)), dtype)
        finite = True
        for row, e in zip(out, range(experts.start, experts.stop), strict=True):
            finite &= self.source.read_into(values, (slice(e, e + 1), *dense_index))
            packed = on_cpu(_quantize, self.part)(values[0])
            row[...] = _transpose(packed.reshape(-1, *values.shape[2:])).reshape(row.shape)
        return finite


def common_dtype(dtypes: Iterable[np.dtype]) -> np.dtype:
    """Returns the dtype if all are equal, otherwise float32."""
    found = set(dtypes)
    return found.pop() if len(found) == 1 else np.dtype(np.float32)


def _swap_in_out(axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
    """Swaps axis 1 with the last one: [E, in, …, out] to the layout of packed experts, and back."""
    return (axes[0], axes[-1], *axes[2:-1], axes[1])


def copy_cast(out: np.ndarray, values: np.ndarray) -> None:
    """Copies values to an array of the same shape, rounding to nearest even if its dtype is narrower."""
    if out.dtype == values.dtype:
        # Copy as integers: NumPy copies extension dtypes element by element.
        integer = f"u{out.itemsize}"
        out.view(integer)[...] = values.view(integer)
    elif out.dtype == np.float32 and values.dtype == BFLOAT16:
        bits = out.view(np.uint32)
        bits[...] = values.view(np.uint16)
        np.left_shift(bits, 16, out=bits)
    else:
        out[...] = values.astype(out.dtype)


def is_finite(values: np.ndarray) -> bool:
    """Returns True if a contiguous float array has no infinite or NaN values."""
    # For either sign, only NaNs have larger bit patterns than infinity: two maxima, no temporary array.
    infinity = np.array(np.inf, values.dtype)
    signed, unsigned = values.view(f"i{values.itemsize}"), values.view(f"u{values.itemsize}")
    limits = infinity.view(signed.dtype), (-infinity).view(unsigned.dtype)
    return values.size == 0 or bool(signed.max() < limits[0] and unsigned.max() < limits[1])


def release_pages(view: np.ndarray) -> None:
    """Releases the pages under a view of a memory-mapped file, which otherwise count as resident memory.

    The system reads them again when needed. Other arrays are unaffected.
    """
    base: Any = view
    first = view
    while isinstance(base, np.ndarray):
        base, first = base.base, base
    mapped = base.obj if isinstance(base, memoryview) else None
    if isinstance(mapped, mmap.mmap):
        start = first.ctypes.data
        low, high = (address - start for address in np.lib.array_utils.byte_bounds(view))
        low, high = -(-low // mmap.PAGESIZE) * mmap.PAGESIZE, high // mmap.PAGESIZE * mmap.PAGESIZE
        if high > low:
            mapped.madvise(mmap.MADV_DONTNEED, low, high - low)


def _unpack(blocks: np.ndarray, scales: np.ndarray, start: int, out: np.ndarray) -> None:
    """`_unpack_plain` with the compiled kernel."""
    if out.ndim == 2:
        unpack.unpack(blocks, scales, start, out)
        return
    for p in range(out.shape[1]):
        unpack.unpack(blocks[:, p], scales[:, p], start, out[:, p])


def _unpack_plain(blocks: np.ndarray, scales: np.ndarray, start: int, out: np.ndarray) -> None:
    """Dequantizes one expert, blocks [F, (2,) G, 16] with scales [F, (2,) G], to [D, (2,) F]: the values of
    each row from `start` on."""
    groups = scales.shape[-1]
    # Transpose the packed bytes: the values are four times as large.
    transposed = _transpose(blocks.reshape(*blocks.shape[:-2], -1))
    codes = transposed.reshape(groups, codec.BLOCK_BYTES, *transposed.shape[1:])
    exponents = np.ascontiguousarray(scales.T)[:, None]
    step = max(1, DEQUANTIZE_BYTES // max(1, codes[0].nbytes))
    for g in range(0, groups, step):
        values = _dequantize(codes[g : g + step], exponents[g : g + step])
        first = g * codec.BLOCK_SIZE - start
        low, high = max(0, first), min(len(out), first + len(values))
        copy_cast(out[low:high], values[low - first : high - first])


_scratch = threading.local()


def _transpose(array: np.ndarray) -> np.ndarray:
    """Reverses the axes, into a thread-local buffer that the next call reuses."""
    # Allocating for each matrix would cost more than transposing, because of page faults.
    if getattr(_scratch, "raw", np.empty(0)).nbytes < array.nbytes:
        _scratch.raw = np.empty(array.nbytes, np.uint8)
    out = _scratch.raw[: array.nbytes].view(array.dtype).reshape(array.shape[::-1])
    for i in range(0, len(array), TRANSPOSE_ROWS):
        out[..., i : i + TRANSPOSE_ROWS] = array[i : i + TRANSPOSE_ROWS].T
    return out


def _dequantize(codes: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    """Dequantizes codes [g, 16, ...] with scales [g, 1, ...] to bfloat16 [32 * g, ...]."""
    is_small = codes.nbytes < DEQUANTIZE_BYTES // 16
    bits = _value_bits(codes, exponents, np) if is_small else on_cpu(_value_bits)(codes, exponents)
    return bits.reshape(-1, *codes.shape[2:]).view(BFLOAT16)


def _value_bits(codes: codec.Array, exponents: codec.Array, xp: ModuleType = jnp) -> codec.Array:
    return xp.stack(codec.bfloat16_bits(codes, exponents, xp), axis=2)


def _quantize(values: jax.Array, part: str) -> jax.Array:
    blocks, scales = codec.quantize(values, axis=0)
    return blocks if part == "blocks" else scales


@functools.cache
def on_cpu(function: Callable, *static: str) -> Callable[..., Any]:
    """Jits a function of arrays, followed by static arguments, for the CPU; it returns NumPy arrays."""
    compiled = jax.jit(lambda *arrays: function(*arrays, *static))
    return lambda *arrays: jax.tree.map(np.asarray, compiled(*jax.device_put(arrays, host_device())))


def host_device() -> jax.Device:
    """Returns a CPU device, or the first device if jax has no CPU backend (JAX_PLATFORMS)."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]
