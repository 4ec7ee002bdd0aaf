"""MXFP4: blocks of 32 values that share a power of two, each a sign and one of eight magnitudes: 4.25 bits.

The format of the released experts (docs/math.md, "Released weights"; OCP Microscaling Formats v1.0, section
5). A block of 32 values along the last axis is 16 bytes of two codes each, the low nibble first, and one byte
of scale: value = code * 2^(scale - 127), and scale 255 is NaN. Everything here is integer arithmetic on the
bits of floats, exact at both ends of their range, regardless of how a backend treats subnormals. With
`xp=numpy`, the same code runs on the host.
"""

from types import ModuleType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

BLOCK_SIZE = 32
BLOCK_BYTES = BLOCK_SIZE // 2  # of codes
# Codes 0 … 7 are the magnitudes 0, 0.5, 1, 1.5, 2, 3, 4 and 6; bit 3 is the sign. Midpoints between them, and
# whether the midpoint rounds down: ties go to even codes.
TIES = ((0.25, True), (0.75, False), (1.25, True), (1.75, False), (2.5, True), (3.5, False), (5.0, True))
NAN_SCALE = 255
# Major-to-minor layout in TPU memory in which pallas_tpu.py reads blocks [E, F, G, 16] and scales [E, F, G];
# additional leading axes come first.
TPU_LAYOUTS = {"blocks": (0, 2, 3, 1), "scales": (0, 2, 1)}

Array = TypeVar("Array", jax.Array, np.ndarray)


def dequantize(blocks: jax.Array, scales: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Returns the values, which are exact in both bfloat16 and float32.

    Args:
      blocks: uint8 [..., G, 16].
      scales: uint8 [..., G].
      dtype: bfloat16 or float32.

    Returns:
      [..., 32 * G]. Magnitudes of 2^128 and more become infinite; a block with scale 255 is NaN.
    """
    bits = jnp.stack(bfloat16_bits(blocks, scales[..., None]), axis=-1)
    if dtype != jnp.bfloat16:
        # A bfloat16 is the upper half of a float32; a conversion might flush subnormals.
        bits = bits.astype(jnp.uint32) << 16
    values = jax.lax.bitcast_convert_type(bits, jnp.bfloat16 if dtype == jnp.bfloat16 else jnp.float32)
    return values.reshape(*scales.shape[:-1], BLOCK_SIZE * scales.shape[-1]).astype(dtype)


def bfloat16_bits(blocks: Array, scales: Array, xp: ModuleType = jnp) -> tuple[Array, Array]:
    """Returns the values of the low and the high nibbles as bfloat16 bits: two uint16 arrays of the shape of
    `blocks`, to which `scales` must broadcast."""
    scale, byte = scales.astype(np.int16), blocks.astype(np.int16)

    def bits(code):
        size = code & 7
        # Magnitudes from 1 are (1 + half / 2) * 2^k; 0.5 is 2^-1.
        exponent = scale + (size >> 1) - 1
        half = xp.where(size > 1, size & 1, 0).astype(np.int16)
        normal = (exponent << 7) | (half << 6)
        subnormal = (128 + 64 * half) >> xp.clip(1 - exponent, 0, 8)
        magnitude = xp.where(exponent > 0, xp.where(exponent < 255, normal, 0x7F80), subnormal)
        magnitude = xp.where(size == 0, 0, magnitude)
        magnitude = xp.where(scale == NAN_SCALE, 0x7FC0, magnitude)
        return magnitude.astype(np.uint16) | ((code & 8).astype(np.uint16) << 12)

    return bits(byte & 15), bits(byte >> 4)


def kernel_scales(scales: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns float32 factors for `kernel_values`: a power of two, and 1 or, for the smallest scale, 0.5."""
    scales = scales.astype(jnp.int32)
    # The smallest scale is subnormal: double it, and halve each code.
    power = jax.lax.bitcast_convert_type(jnp.maximum(scales, 1) << 23, jnp.float32)
    return jnp.where(scales == NAN_SCALE, jnp.nan, power), jnp.where(scales == 0, 0.5, 1.0)


def kernel_values(blocks: jax.Array, power: jax.Array, one: jax.Array) -> list[jax.Array]:
    """Returns the values of the low and the high nibbles, float32, with fewer operations than `dequantize`.

    Values that are subnormal in float32, below 2^-126, may become zero. `power` and `one` come from
    `kernel_scales`, and must broadcast to the shape of `blocks`.
    """
    byte, values = blocks.astype(jnp.int32), []
    half = jax.lax.bitcast_convert_type(one, jnp.int32) - (1 << 23)
    for top in (byte << 28, byte << 24):
        # The magnitude as exponent and significand, which is correct from 1 on. Below, 0 and 0.5 become 0.5
        # and 0.75, half as far from 1 as they should be.
        size = jax.lax.bitcast_convert_type(((top >> 6) & 0x1C00000) + half, jnp.float32)
        size = jnp.minimum(size, size + size - one) * power
        bits = jax.lax.bitcast_convert_type(size, jnp.int32) | (top & -0x80000000)
        values.append(jax.lax.bitcast_convert_type(bits, jnp.float32))
    return values


def quantize(
    values: Array, axis: int = -1, xp: ModuleType = jnp, scales: Array | None = None
) -> tuple[Array, Array]:
    """Quantizes to MXFP4 like the publisher: the smallest scale that clips nothing, 2^ceil(log2(largest /
    6)), then round to nearest, ties to even.

    `quantize(dequantize(...))` preserves the values, though not always their codes.

    Args:
      values: float32 or bfloat16, [..., 32 * G].
      axis: the axis that is split into blocks; it is replaced with axes G and 16.
      scales: uint8 scales to use instead; values beyond the largest code are clipped to it.

    Returns:
      blocks, uint8 [..., G, 16], and scales, uint8 [..., G]. A block of zeros has scale 0; one with inf or
      NaN has scale 255.

    Raises ValueError if the size of the axis is not a multiple of 32.
    """
    axis %= values.ndim
    bits = _float32_bits(values, axis, xp)
    magnitude = bits & 0x7FFFFFFF
    if scales is None:
        largest = xp.max(magnitude, axis=axis + 1)
        # 6 is 1.5 * 2^2: the scale's exponent is two less up to a significand of 1.5, and one less above.
        scales = (largest >> 23) - 2 + ((largest & 0x7FFFFF) > 0x400000)
        scales = xp.where(largest >= 0x7F800000, NAN_SCALE, xp.maximum(scales, 0)).astype(np.uint8)
    exponent = xp.expand_dims(scales, axis + 1).astype(np.int32) - 127
    code = xp.zeros(magnitude.shape, np.uint8)
    for tie, rounds_down in TIES:
        bound = _scaled_bits(tie, exponent, xp)
        code = code + (magnitude > bound if rounds_down else magnitude >= bound).astype(np.uint8)
    code = code | ((bits >> 28) & 8).astype(np.uint8)
    before: tuple[slice, ...] = (slice(None),) * (axis + 1)
    return code[(*before, slice(0, None, 2))] | (code[(*before, slice(1, None, 2))] << 4), scales


def add_delta(blocks: jax.Array, scales: jax.Array, delta: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the blocks and scales of packed values plus `delta`, float32 [..., 32 * G].

    Each block uses its scale s, s/2 or 2s, whichever has the smallest squared error (s if tied), because the
    smallest scale that clips nothing would round a small delta away (docs/weights.md). Blocks without a delta
    keep their bytes; blocks that overflow become NaN.
    """
    wanted = dequantize(blocks, scales, jnp.float32) + delta
    best, error = (blocks, scales), jnp.full(scales.shape, jnp.inf)
    for step in (0, -1, 1):
        tried = jnp.clip(scales.astype(jnp.int16) + step, 0, NAN_SCALE - 1).astype(jnp.uint8)
        codes, _ = quantize(wanted, scales=tried)
        loss = _block_sums((dequantize(codes, tried, jnp.float32) - wanted) ** 2)
        better = loss < error
        best = jnp.where(better[..., None], codes, best[0]), jnp.where(better, tried, best[1])
        error = jnp.where(better, loss, error)
    best = best[0], jnp.where(_block_sums(~jnp.isfinite(wanted)) > 0, NAN_SCALE, best[1])
    kept = (_block_sums(delta != 0) == 0) | (scales == NAN_SCALE)
    return jnp.where(kept[..., None], blocks, best[0]), jnp.where(kept, scales, best[1])


def _block_sums(values: jax.Array) -> jax.Array:
    return jnp.sum(values.reshape(*values.shape[:-1], -1, BLOCK_SIZE), axis=-1)


def _float32_bits(values: Array, axis: int, xp: ModuleType) -> Array:
    size = values.shape[axis]
    if size % BLOCK_SIZE:
        raise ValueError(f"axis {axis} has {size} values: must be a multiple of {BLOCK_SIZE}")
    shape = (*values.shape[:axis], size // BLOCK_SIZE, BLOCK_SIZE, *values.shape[axis + 1 :])
    # Widen the bits of a bfloat16: a conversion may flush subnormals.
    is_narrow = values.dtype == jnp.bfloat16
    values, kind = (values, np.int16) if is_narrow else (values.astype(np.float32), np.int32)
    values = values.reshape(shape)
    bits: Any = values.view(kind) if xp is np else jax.lax.bitcast_convert_type(values, kind)
    return bits.astype(np.int32) << 16 if is_narrow else bits


def _scaled_bits(value: float, exponent: Array, xp: ModuleType) -> Array:
    """Returns the float32 bits of value * 2^exponent, for a value with at most three significant bits."""
    bits = int(np.float32(value).view(np.int32))
    field = (bits >> 23) + exponent
    subnormal = ((bits & 0x7FFFFF) | 0x800000) >> xp.clip(1 - field, 0, 24)
    return xp.where(field > 0, (field << 23) | (bits & 0x7FFFFF), subnormal)
