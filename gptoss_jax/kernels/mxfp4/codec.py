"""MXFP4: 32 weights share one power of two, each is a sign and one of eight magnitudes: 4.25 bits a weight.

The format of the released experts (docs/math.md, "Released weights"; OCP Microscaling Formats v1.0, section
5). A group of 32 values along the last axis is 16 bytes of two codes each, the low nibble first, and one byte
of scale: value = code * 2^(scale - 127), where scale 255 stands for not-a-number. Everything here is integer
arithmetic on the bits of floats, exact at both ends of their range whatever a backend makes of subnormal
numbers. With `xp=numpy` the same lines run on the host.
"""

import jax
import jax.numpy as jnp
import numpy as np

BLOCK_SIZE = 32
BLOCK_BYTES = BLOCK_SIZE // 2  # of codes, in one group
# Code c (0 … 7) stands for MAGNITUDES[c]; bit 3 is the sign.
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Half-way between neighbours: where a value of such a size goes to the lower code, the tie is to even.
TIES = ((0.25, True), (0.75, False), (1.25, True), (1.75, False), (2.5, True), (3.5, False), (5.0, True))
NAN_SCALE = 255
# Axes in memory on TPU, from major to minor, as pallas_tpu.py reads blocks [E, F, G, 16] and scales [E, F,
# G]; further leading axes stay in front.
TPU_LAYOUTS = {"blocks": (0, 2, 3, 1), "scales": (0, 2, 1)}


def dequantize(blocks: jax.Array, scales: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Packed weights as numbers, exact in bfloat16 and float32 alike.

    Args:
      blocks: uint8 [..., G, 16].
      scales: uint8 [..., G].
      dtype: bfloat16 or float32.

    Returns:
      [..., 32 * G]. Sizes of 2^128 and more are infinite; a group of scale 255 is NaN.
    """
    low, high = bfloat16_bits(blocks, scales[..., None])
    if dtype == jnp.bfloat16:
        bits = jnp.stack([low, high], axis=-1)
    else:
        # A bfloat16 is the upper half of a float32; a conversion might flush what is subnormal.
        bits = jnp.stack([low, high], axis=-1).astype(jnp.uint32) << 16
    kind = jnp.bfloat16 if dtype == jnp.bfloat16 else jnp.float32
    values = jax.lax.bitcast_convert_type(bits, kind)
    return values.reshape(*scales.shape[:-1], BLOCK_SIZE * scales.shape[-1]).astype(dtype)


def bfloat16_bits(blocks, scales, xp=jnp):
    """The two numbers of each byte as the bits of bfloat16: two uint16 arrays of the shape of `blocks`.

    `scales` must broadcast against `blocks`; the axes may stand in any order.
    """
    scale, byte = scales.astype(np.int16), blocks.astype(np.int16)

    def bits(code):
        size = code & 7
        # Sizes of 1 and more are (1 + half / 2) * 2^k; one half is 2^-1.
        exponent = scale + (size >> 1) - 1
        half = xp.where(size > 1, size & 1, 0).astype(np.int16)
        normal = (exponent << 7) | (half << 6)
        subnormal = (128 + 64 * half) >> xp.clip(1 - exponent, 0, 8)
        magnitude = xp.where(exponent > 0, xp.where(exponent < 255, normal, 0x7F80), subnormal)
        magnitude = xp.where(size == 0, 0, magnitude)
        magnitude = xp.where(scale == NAN_SCALE, 0x7FC0, magnitude)
        return magnitude.astype(np.uint16) | ((code & 8).astype(np.uint16) << 12)

    return bits(byte & 15), bits(byte >> 4)


def quantize(values, axis=-1, xp=jnp):
    """The nearest packed weights, with the publisher's rule: the smallest scale under which nothing is
    clipped, 2^ceil(log2(largest / 6)), then round to nearest, ties to even.

    `quantize(dequantize(x))` gives the values of x again, in codes that need not be those of x.

    Args:
      values: float32 or bfloat16, [..., 32 * G].
      axis: the one that groups run along, if it is not the last; G, and 16 after it, then stand in its place.

    Returns:
      blocks, uint8 [..., G, 16], and scales, uint8 [..., G]. A group of zeros has scale 0; one that holds
      something infinite or not a number has scale 255.
    """
    axis %= values.ndim
    bits = _float32_bits(values, axis, xp)
    magnitude = bits & 0x7FFFFFFF
    scales = _scales(magnitude, axis, xp)
    exponent = xp.expand_dims(scales, axis + 1).astype(np.int32) - 127
    code = xp.zeros(magnitude.shape, np.uint8)
    for tie, goes_down in TIES:
        bound = _scaled_bits(tie, exponent, xp)
        code = code + (magnitude > bound if goes_down else magnitude >= bound).astype(np.uint8)
    code = code | ((bits >> 28) & 8).astype(np.uint8)
    before = (slice(None),) * (axis + 1)
    return code[(*before, slice(0, None, 2))] | (code[(*before, slice(1, None, 2))] << 4), scales


def _float32_bits(values, axis, xp):
    size = values.shape[axis]
    if size % BLOCK_SIZE:
        raise ValueError(f"axis {axis} has {size} values: must be a multiple of {BLOCK_SIZE}")
    groups = values.reshape(*values.shape[:axis], size // BLOCK_SIZE, BLOCK_SIZE, *values.shape[axis + 1 :])
    if values.dtype == jnp.bfloat16:
        # By its bits: a conversion may flush what is subnormal.
        narrow = groups.view(np.int16) if xp is np else jax.lax.bitcast_convert_type(groups, np.int16)
        return narrow.astype(np.int32) << 16
    wide = groups.astype(np.float32)
    return wide.view(np.int32) if xp is np else jax.lax.bitcast_convert_type(wide, np.int32)


def _scales(magnitude, axis, xp):
    """ceil(log2(largest / 6)) + 127 of each group, from the bits of the magnitudes."""
    largest = xp.max(magnitude, axis=axis + 1)
    # 6 is 1.5 * 2^2: up to a significand of 1.5 the exponent is two less, above it one less.
    scale = (largest >> 23) - 2 + ((largest & 0x7FFFFF) > 0x400000)
    scale = xp.where(largest >= 0x7F800000, NAN_SCALE, xp.maximum(scale, 0))
    return scale.astype(np.uint8)


def _scaled_bits(value, exponent, xp):
    """The float32 bits of value * 2^exponent, for a value of at most three significant bits."""
    bits = int(np.float32(value).view(np.int32))
    field = (bits >> 23) + exponent
    subnormal = ((bits & 0x7FFFFF) | 0x800000) >> xp.clip(1 - field, 0, 24)
    return xp.where(field > 0, (field << 23) | (bits & 0x7FFFFF), subnormal)
