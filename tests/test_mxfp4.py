"""MXFP4 in both directions against float64 in NumPy: every byte with every scale, and values of all sizes."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gptoss_jax.kernels.mxfp4 import codec

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
CODES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6] + [-0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
INF, NAN = np.inf, np.nan
TINIEST = 2.0**-149  # the smallest float32
LARGEST = float(np.finfo(np.float32).max)

dequantize = jax.jit(codec.dequantize, static_argnames="dtype")
quantize = jax.jit(codec.quantize)


def codes_of(blocks):
    """uint8 [..., G, 16] -> the codes, uint8 [..., G, 32]."""
    return np.stack([blocks % 16, blocks // 16], axis=-1).reshape(*blocks.shape[:-1], 32)


def decode(blocks, scales):
    """Dequantizes to [..., G, 32] in float64, where every value is exact."""
    values = np.ldexp(CODES[codes_of(blocks)], scales.astype(int)[..., None] - 127)
    values = np.where(np.abs(values) >= 2.0**128, np.copysign(INF, values), values)
    return np.where((scales == 255)[..., None], NAN, values)


def encode(values):
    """Quantizes blocks [..., 32] of float64 by the publisher's rule; returns (codes, scales)."""
    values = np.asarray(values, np.float64)
    largest = np.abs(values).max(axis=-1)
    finite = np.isfinite(largest)
    bounds = 6 * np.ldexp(1.0, np.arange(255) - 127)
    scales = np.where(finite, np.searchsorted(bounds, np.where(finite, largest, 0)), 255)
    scaled = np.ldexp(np.abs(np.where(np.isfinite(values), values, 0)), 127 - scales[..., None])
    # argmin returns the first of equals: even codes come first.
    order = np.array([0, 2, 4, 6, 1, 3, 5, 7])
    codes = order[np.abs(scaled[..., None] - CODES[order]).argmin(axis=-1)]
    return (codes + 8 * np.signbit(values)).astype(np.uint8), scales.astype(np.uint8)


def wide(values):
    """Returns a float array as float64, without a conversion that could flush subnormals."""
    values = np.asarray(values)
    if values.dtype == BFLOAT16:
        values = (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float64)


def assert_same_numbers(found, expected):
    """Asserts equal values, including the sign of zero; all NaNs are equal."""
    np.testing.assert_array_equal(found, expected)
    known = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(found)[known], np.signbit(expected)[known])


def assert_packed(values, codes, scales):
    """Asserts that quantizing [..., 32] gives these bytes, on the device and on the host."""
    for blocks, found in (quantize(values), codec.quantize(values, xp=np)):
        assert blocks.dtype == found.dtype == np.uint8
        np.testing.assert_array_equal(found[..., 0], scales)
        known = np.asarray(scales) < 255
        np.testing.assert_array_equal(codes_of(np.asarray(blocks))[..., 0, :][known], codes[known])


def group(*values, dtype=np.float32):
    """Returns one block that starts with these values; the rest is zero."""
    return np.array([*values] + [0.0] * (32 - len(values)), dtype)


EVERY_BYTE = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(16, 16), (256, 16, 16))
EVERY_SCALE = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None], (256, 16))


def test_the_published_example():
    blocks = np.zeros((1, 16), np.uint8)
    blocks[0, :2] = 0x21, 0xF7
    for dtype in (jnp.bfloat16, jnp.float32):
        found = dequantize(blocks, np.array([128], np.uint8), dtype)
        assert found.dtype == dtype and found.shape == (32,)
        np.testing.assert_array_equal(wide(found), group(1, 2, 12, -12))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
def test_every_byte_under_every_scale(dtype):
    expected = decode(EVERY_BYTE, EVERY_SCALE).reshape(256, 512)
    for found in (
        dequantize(EVERY_BYTE, EVERY_SCALE, dtype),
        codec.dequantize(EVERY_BYTE, EVERY_SCALE, dtype),
    ):
        assert found.dtype == dtype
        assert_same_numbers(wide(found), expected)
    # 2, 3, 4 and 6 overflow with scale 254, 4 and 6 with 253.
    assert np.isinf(expected).sum() == 6 * 64 and np.isnan(expected).sum() == 512


def test_the_host_and_the_device_give_the_same_bits():
    found = codec.bfloat16_bits(EVERY_BYTE, EVERY_SCALE[..., None], np)
    on_device = jax.jit(codec.bfloat16_bits)(EVERY_BYTE, EVERY_SCALE[..., None])
    for host, device in zip(found, on_device, strict=True):
        assert host.dtype == device.dtype == np.uint16
        np.testing.assert_array_equal(host, device)
    values = wide(np.stack(found, axis=-1).view(BFLOAT16)).reshape(256, 16, 32)
    assert_same_numbers(values, decode(EVERY_BYTE, EVERY_SCALE))


def test_leading_axes_are_kept():
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (3, 5, 2, 16), np.uint8)
    scales = rng.integers(100, 140, (3, 5, 2), np.uint8)
    expected = decode(blocks, scales).reshape(3, 5, 64)
    np.testing.assert_array_equal(dequantize(blocks, scales, jnp.float32), expected)
    again, powers = quantize(expected.astype(np.float32))
    assert again.shape == blocks.shape and powers.shape == scales.shape


def test_quantizing_dequantized_values_gives_the_same_values():
    # Each byte fills a block, so that every magnitude is the largest once; then all bytes in order.
    alone = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None], (256, 256, 16))
    for blocks in (alone, EVERY_BYTE):
        scales = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None], blocks.shape[:2])
        values = np.asarray(dequantize(blocks, scales, jnp.float32))
        finite = np.isfinite(values).reshape(*scales.shape, 32).all(axis=-1)
        assert finite.mean() > 0.98
        for found, powers in (quantize(values), codec.quantize(values, xp=np)):
            again = np.asarray(dequantize(found, powers, jnp.float32)).reshape(*scales.shape, 32)
            assert_same_numbers(again[finite], values.reshape(again.shape)[finite])
            # A block that overflowed cannot be recovered.
            np.testing.assert_array_equal(np.asarray(powers)[~finite], 255)
            twice, powers_of_twice = quantize(again.reshape(values.shape))
            np.testing.assert_array_equal(np.asarray(twice)[finite], np.asarray(found)[finite])
            np.testing.assert_array_equal(powers_of_twice, powers)


@pytest.mark.parametrize("exponent", [-126, -40, -3, 0, 1, 60, 124])
def test_the_scale_is_the_smallest_that_clips_nothing(exponent):
    full = np.float32(6 * 2.0**exponent)
    above, below = np.nextafter(full, np.float32(INF)), np.nextafter(full, np.float32(0))
    half_above = np.nextafter(full / 2, np.float32(INF))
    values = np.stack([group(value) for value in (full, -full, above, -above, below, half_above)])
    scale = 127 + exponent
    assert_packed(
        values,
        np.stack([group(code, dtype=np.uint8) for code in (7, 15, 5, 13, 7, 5)]),
        [scale, scale, scale + 1, scale + 1, scale, scale],
    )
    # The last is slightly above 3, which the next lower scale would clip.
    assert encode(wide(values))[1].tolist() == [scale, scale, scale + 1, scale + 1, scale, scale]


TIES = [
    (0.25, 0.0),
    (0.75, 1.0),
    (1.25, 1.0),
    (1.75, 2.0),
    (2.5, 2.0),
    (3.5, 4.0),
    (5.0, 4.0),
]


@pytest.mark.parametrize("exponent", [-127, -126, -30, 0, 100, 125])
def test_ties_go_to_the_even_code(exponent):
    power = 2.0**exponent
    ties = np.array([tie for tie, _ in TIES]) * power
    exact = ties.astype(np.float32)
    np.testing.assert_array_equal(exact.astype(np.float64), ties)
    above, below = (np.nextafter(exact, np.float32(towards)) for towards in (INF, 0))
    upper = np.array([0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]) * power
    lower = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0]) * power
    even = np.array([even for _, even in TIES]) * power
    for sign in (1, -1):
        for values, expected in ((exact, even), (above, upper), (below, lower)):
            # The first value of the block determines the scale.
            numbers = group(6 * power, *(sign * values))
            blocks, scales = quantize(numbers)
            assert np.asarray(scales).tolist() == [127 + exponent]
            assert_same_numbers(wide(dequantize(blocks, scales, jnp.float32))[1:8], sign * expected)
            np.testing.assert_array_equal(codec.quantize(numbers, xp=np)[0], blocks)


@pytest.mark.parametrize(
    ("values", "codes", "scale"),
    [
        ([], [], 0),
        ([-0.0, 0.0], [8, 0], 0),
        ([1.0, -0.0], [6, 8], 125),
        # The limits of float32: values below a quarter of the smallest scale become zero.
        ([TINIEST, -TINIEST], [0, 8], 0),
        ([2.0**-129, 2.0**-129 + TINIEST, 2.0**-128], [0, 1, 1], 0),
        ([2.0**-126, -(2.0**-127)], [4, 10], 0),
        ([6 * 2.0**-127, 5 * 2.0**-127], [7, 6], 0),
        ([LARGEST], [6], 253),
        ([1.5 * 2.0**127, -LARGEST / 4], [7, 12], 252),
        ([INF, 1.0], [], 255),
        ([1.0, -INF], [], 255),
        ([0.0, NAN], [], 255),
        ([LARGEST, -NAN], [], 255),
    ],
)
def test_the_ends_of_the_range(values, codes, scale):
    assert_packed(group(*values), group(*codes, dtype=np.uint8), scale)
    assert int(encode(group(*values))[1]) == scale
    found = dequantize(*quantize(group(*values)), jnp.float32)
    assert np.isnan(found).all() == (scale == 255)


def test_the_largest_float32_rounds_to_infinity_as_it_does_in_bfloat16():
    # 2^128 is the nearest code with its scale, but not a finite float.
    assert np.isposinf(dequantize(*quantize(group(LARGEST)), jnp.float32)[0])
    assert np.isposinf(np.float32(np.array(LARGEST).astype(BFLOAT16)))
    largest = float(ml_dtypes.finfo(BFLOAT16).max)
    assert_packed(group(largest, dtype=BFLOAT16), group(6, dtype=np.uint8), 253)
    assert_packed(group(1.75 * 2.0**127, dtype=BFLOAT16), group(6, dtype=np.uint8), 253)
    below = np.nextafter(np.float32(1.75 * 2.0**127), np.float32(0))
    assert_packed(group(below), group(5, dtype=np.uint8), 253)


def test_subnormal_bfloat16():
    # The smallest is 2^-133, less than a quarter of the smallest scale.
    values = np.arange(32, dtype=np.uint16).view(BFLOAT16)
    codes, scale = encode(wide(values))
    assert scale == 0 and codes.tolist() == [0] * 17 + [1] * 15
    assert_packed(values, codes, scale)


@pytest.mark.parametrize("order", ["neighbours", "mixed"])
def test_every_bfloat16_is_quantized_like_the_same_float32(order):
    bits = np.arange(65536, dtype=np.uint16)
    if order == "mixed":
        bits = np.random.default_rng(0).permutation(bits)
    narrow = bits.reshape(64, 1024).view(BFLOAT16)
    same = (bits.astype(np.uint32) << 16).reshape(64, 1024).view(np.float32)
    expected = [np.asarray(part) for part in quantize(same)]
    assert 0 < (expected[1] == 255).sum() < expected[1].size
    for found in (quantize(narrow), codec.quantize(narrow, xp=np), codec.quantize(same, xp=np)):
        for part, values in zip(found, expected, strict=True):
            np.testing.assert_array_equal(part, values)


@pytest.mark.parametrize("axis", [0, 1, 2, -2])
@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16], ids=["float32", "bfloat16"])
def test_blocks_run_along_any_axis(axis, dtype):
    values = np.random.default_rng(0).standard_normal((64, 96, 32)).astype(dtype)
    place = axis % 3
    last = np.ascontiguousarray(np.moveaxis(values, place, -1))
    blocks, scales = codec.quantize(last, xp=np)
    blocks = np.moveaxis(blocks, (-2, -1), (place, place + 1))
    scales = np.moveaxis(scales, -1, place)
    # Another memory order gives the same.
    turned = np.moveaxis(last, -1, place)
    pack_along = jax.jit(codec.quantize, static_argnames="axis")
    for found in (
        pack_along(values, axis=axis),
        codec.quantize(values, axis, np),
        codec.quantize(turned, axis, np),
    ):
        np.testing.assert_array_equal(found[0], blocks)
        np.testing.assert_array_equal(found[1], scales)


@pytest.mark.parametrize("size", [1, 31, 33, 48])
def test_sizes_that_are_not_multiples_of_32_are_rejected(size):
    for values in (np.ones((2, size), np.float32), np.ones((2, size), BFLOAT16)):
        for xp in (jnp, np):
            with pytest.raises(ValueError, match=f"axis 1 has {size} values: must be a multiple of 32"):
                codec.quantize(values, xp=xp)
            with pytest.raises(ValueError, match=f"axis 0 has {size} values: must be a multiple of 32"):
                codec.quantize(values.T, axis=-2, xp=xp)


GROUPS = (6, 32)
any_bits = arrays(np.uint32, GROUPS, elements=st.integers(0, 2**32 - 1))


@st.composite
def of_like_size(draw):
    """Blocks whose values are within a few powers of two, many at a tie or one step beside it."""
    exponents = draw(st.integers(0, 254)) - draw(arrays(np.int64, GROUPS, elements=st.integers(0, 5)))
    signs = draw(arrays(np.uint32, GROUPS, elements=st.integers(0, 1)))
    eighths = draw(arrays(np.uint32, GROUPS, elements=st.integers(0, 7)))
    steps = draw(arrays(np.int64, GROUPS, elements=st.integers(-1, 1)))
    sizes = (np.clip(exponents, 0, 254) << 23) + (eighths.astype(np.int64) << 20) + steps
    return np.maximum(sizes, 0).astype(np.uint32) | signs << 31


@settings(deadline=None, max_examples=150)
@given(any_bits | of_like_size())
def test_any_values_are_quantized_by_the_rule(bits):
    assert_packed(bits.view(np.float32), *encode(wide(bits.view(np.float32))))
    # All bytes are equal, even in blocks with NaN.
    values = bits.reshape(2, -1).view(np.float32)
    for host, device in zip(codec.quantize(values, xp=np), quantize(values), strict=True):
        np.testing.assert_array_equal(host, device)


@settings(deadline=None, max_examples=150)
@given(of_like_size())
def test_the_error_is_at_most_half_a_step_and_a_fifth_of_the_largest(bits):
    values = wide(bits.view(np.float32))
    largest = np.abs(values).max(axis=-1, keepdims=True)
    # From here on the nearest code may not be a finite float.
    usual = (largest < 1.75 * 2.0**127)[:, 0]
    blocks, scales = quantize(bits.view(np.float32))
    error = np.abs(wide(dequantize(blocks, scales, jnp.float32)) - values)[usual]
    power = np.ldexp(1.0, np.asarray(scales)[usual].astype(int) - 127)
    values, largest = values[usual], largest[usual]
    size = np.abs(values) / power
    gap = np.where(size <= 2, 0.5, np.where(size <= 4, 1.0, 2.0)) * power
    assert (error <= gap / 2).all()
    # At the smallest scale, the step does not shrink with the values.
    assert (error <= np.maximum(largest / 5, 2.0**-129)).all()


def test_the_error_bound_is_met():
    # 5 is halfway between 4 and 6, and the largest of its block.
    assert wide(dequantize(*quantize(group(5.0)), jnp.float32))[0] == 4.0
