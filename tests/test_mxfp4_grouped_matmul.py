"""Grouped matmul with MXFP4 weights, in every implementation, against dequantizing and multiplying in
float64; the kernels interpreted, and through the TPU compiler and the lowering for CUDA, which need no such
device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cuda_lowering import kernels_for_cuda
from helpers.grouped_matmul import sizes_within
from helpers.tpu_compiler import BYTES_MADE, TPUS, needs_libtpu, tpu_devices
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.experimental.layout import Format, Layout

from gptoss_jax.kernels import backend, selection
from gptoss_jax.kernels.mxfp4 import codec
from gptoss_jax.kernels.mxfp4.api import mxfp4_grouped_matmul
from gptoss_jax.kernels.mxfp4.pallas_tpu import mosaic_mxfp4_matmul
from gptoss_jax.kernels.mxfp4.pallas_triton import WIDE, WIDE_FLOAT32, triton_mxfp4_matmul
from gptoss_jax.kernels.mxfp4.xla import xla_mxfp4_matmul

R, E, F, G = 37, 4, 7, 3
D = 32 * G


def default_matmul(x, blocks, scales, sizes, transposed=False):
    if not transposed:
        return mxfp4_grouped_matmul(x, blocks, scales, sizes)
    rows = jnp.zeros((x.shape[0], 32 * scales.shape[2]), x.dtype)
    return jax.vjp(lambda rows: mxfp4_grouped_matmul(rows, blocks, scales, sizes), rows)[1](x)[0]


IMPLEMENTATIONS = {
    "xla": xla_mxfp4_matmul,
    "mosaic": functools.partial(mosaic_mxfp4_matmul, interpret=True),
    "triton": functools.partial(triton_mxfp4_matmul, interpret=True),
    "default": default_matmul,
}
either_way = pytest.mark.parametrize("transposed", [False, True])


@functools.partial(jax.jit, static_argnums=(0, 1))
def multiply(implementation, transposed, *inputs):
    return IMPLEMENTATIONS[implementation](*inputs, transposed=transposed)


@functools.cache
def packed(E, F, G, seed=0):
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (E, F, G, 16), np.uint8)
    return blocks, rng.integers(118, 130, (E, F, G), np.uint8)


def by_loop(x, blocks, scales, sizes, transposed):
    w = np.asarray(codec.dequantize(blocks, scales, jnp.float32), np.float64)
    w = w if transposed else w.swapaxes(1, 2)
    y, start = np.zeros((x.shape[0], w.shape[2])), 0
    for e, size in enumerate(sizes):
        y[start : start + size] = x[start : start + size].astype(np.float64) @ w[e]
        start += size
    return y


def check(implementation, transposed, rows, shape, sizes, outside=0.0, dtype=jnp.float32, tolerance=1e-5):
    blocks, scales = packed(*shape)
    rng = np.random.default_rng(sum(sizes) + 31 * sizes[0])
    x = np.array(jnp.asarray(rng.standard_normal((rows, shape[1] if transposed else 32 * shape[2])), dtype))
    expected = by_loop(x, blocks, scales, sizes, transposed)
    # The values of rows of no group must not matter.
    x[sum(sizes) :] = outside
    y = multiply(implementation, transposed, x, blocks, scales, np.array(sizes, np.int32))
    assert y.dtype == dtype
    size = np.abs(expected).max(initial=1)
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=tolerance, atol=tolerance * size)


@either_way
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=30, deadline=None)
@given(sizes=sizes_within(R, E), outside=st.sampled_from([0.0, 3.0, np.nan, np.inf, -np.inf]))
@example(sizes=[R, 0, 0, 0], outside=0.0)
@example(sizes=[0, 0, 0, R], outside=0.0)
@example(sizes=[0, 0, 0, 0], outside=np.nan)
@example(sizes=[1, 1, 1, 1], outside=np.inf)
@example(sizes=[5, 9, 12, 11], outside=0.0)
@example(sizes=[0, 16, 0, 17], outside=np.nan)
def test_any_group_sizes(implementation, transposed, sizes, outside):
    check(implementation, transposed, R, (E, F, G), sizes, outside)


@either_way
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_several_tiles(implementation, transposed):
    """Rows, outputs and inputs of several tiles, the last of which is not full."""
    check(implementation, transposed, 300, (3, 700, 35), [130, 0, 150], np.nan)


@either_way
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16(implementation, transposed):
    # Sums are in float32, and rounded once.
    check(implementation, transposed, R, (E, F, G), [10, 0, 20, 4], np.nan, jnp.bfloat16, tolerance=2.0**-8)


@either_way
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_row_in_one_of_many_groups(implementation, transposed):
    sizes = [0] * 600
    sizes[471] = 1
    check(implementation, transposed, 1, (600, 5, 1), sizes)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_byte_under_every_scale(implementation, dtype):
    """An identity matrix gives the weights of each input. Subnormal ones may be zeros."""
    # Group e has bytes 16e … 16e + 15, and its output f the scale f.
    blocks = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(16, 1, 1, 16), (16, 256, 1, 16))
    scales = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(1, 256, 1), (16, 256, 1))
    x = jnp.tile(jnp.eye(32, dtype=dtype), (16, 1))
    expected = np.asarray(codec.dequantize(blocks, scales, dtype), np.float64).swapaxes(1, 2)
    found = np.asarray(
        multiply(implementation, False, x, blocks, scales, np.full(16, 32, np.int32)), np.float64
    )
    found = found.reshape(16, 32, 256)
    # Infinity times zero is NaN: one such weight spoils all of its output.
    clean = np.broadcast_to(np.isfinite(expected).all(axis=1, keepdims=True), expected.shape)
    normal = np.abs(expected) >= 2.0**-126
    np.testing.assert_array_equal(found[clean & normal], expected[clean & normal])
    assert np.all(np.abs(found[clean & ~normal]) < 2.0**-126)
    assert not np.isfinite(found[~clean]).any()
    assert (~clean).sum() == 16 * 3 * 32


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_code_under_every_scale(implementation, dtype):
    """The mean of 32 equal weights is that weight, also if it is infinite."""
    # Group e has only code e, and its output f the scale f.
    blocks = np.broadcast_to(17 * np.arange(16, dtype=np.uint8).reshape(16, 1, 1, 1), (16, 256, 1, 16))
    scales = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(1, 256, 1), (16, 256, 1))
    expected = np.asarray(codec.dequantize(blocks, scales, dtype), np.float64)[:, :, 0]
    x = jnp.full((16, 32), 1 / 32, dtype)
    found = np.asarray(multiply(implementation, False, x, blocks, scales, np.ones(16, np.int32)), np.float64)
    # A 32nd of smaller ones is subnormal.
    kept = ~(np.abs(expected) < 2.0**-121)
    np.testing.assert_array_equal(found[kept], expected[kept])
    assert np.isinf(expected).sum() == 2 * (2 + 4) and np.isnan(expected).sum() == 16


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradient_of_every_code_under_every_scale(implementation, dtype):
    """One output, whose gradient is 1, gives its weights."""
    # Group e has the scale e, and a row of all codes.
    low = np.arange(16, dtype=np.uint8)
    blocks = np.broadcast_to(low | (15 - low) << 4, (256, 1, 1, 16))
    scales = np.arange(256, dtype=np.uint8).reshape(256, 1, 1)
    inputs = jnp.ones((256, 1), dtype), blocks, scales, np.ones(256, np.int32)
    expected = np.asarray(codec.dequantize(blocks, scales, dtype), np.float64)[:, 0]
    found = np.asarray(multiply(implementation, True, *inputs), np.float64)
    normal = ~(np.abs(expected) < 2.0**-126)
    np.testing.assert_array_equal(found[normal], expected[normal])
    assert np.all(np.abs(found[~normal]) < 2.0**-126)
    assert np.isinf(expected).sum() == 2 * (2 + 4) * 2 and np.isnan(expected).sum() == 32


@either_way
@pytest.mark.parametrize("tiles", [WIDE, WIDE_FLOAT32])
def test_large_tiles_for_gpu(tiles, transposed):
    E, F, G = 3, 300, 11
    blocks, scales = packed(E, F, G)
    x = np.random.default_rng(0).standard_normal((330, F if transposed else 32 * G)).astype(np.float32)
    sizes = np.array([130, 0, 150], np.int32)
    expected = by_loop(x, blocks, scales, sizes, transposed)
    x[280:] = np.nan
    y = triton_mxfp4_matmul(x, blocks, scales, sizes, transposed, interpret=True, tiles=tiles)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("kernels", ["auto", "plain"])
def test_gradients_of_rows_and_bias(kernels):
    sizes = jnp.array([10, 0, 20, 4], jnp.int32)
    blocks, scales = packed(E, F, G)
    x, bias, g = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(R, D), (E, F), (R, F)]))
    w_EFD = codec.dequantize(blocks, scales, jnp.float32)
    group = np.repeat(np.arange(E), sizes)

    def plain(x, bias):
        y = jnp.einsum("rd,rfd->rf", x[:34], w_EFD[group], precision="highest") + bias[group]
        return jnp.pad(y, ((0, 3), (0, 0)))

    def ours(x, bias):
        with selection.using(kernels):
            return mxfp4_grouped_matmul(x, blocks, scales, sizes, bias)

    (y, back), (expected, expected_back) = jax.vjp(jax.jit(ours), x, bias), jax.vjp(plain, x, bias)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-4)
    for found, right in zip(back(g), expected_back(g), strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-4)


def through_layers(implementation, layers, x, blocks, scales, bias, sizes_E):
    """Applies all layers of a stack in sequence; F and D are the same."""
    groups = sizes_E.shape[0]

    def one(x, layer):
        sizes = jax.lax.dynamic_update_slice(
            jnp.zeros(layers * groups, jnp.int32), sizes_E, (layer * groups,)
        )
        return implementation(x, blocks, scales, sizes, *bias), None

    return jax.lax.scan(one, x, jnp.arange(layers))[0]


def test_memory_is_that_of_one_matrix():
    """In plain XLA, for 8 groups in each of 3 layers, forward and backward."""
    layers, groups, width = 3, 8, 512
    S = jax.ShapeDtypeStruct
    stack = (layers * groups, width, width // 32)
    arguments = S((20, width), jnp.float32), S((*stack, 16), jnp.uint8), S(stack, jnp.uint8), ()

    def both(x, *others):
        y, back = jax.vjp(lambda x: through_layers(mxfp4_grouped_matmul, layers, x, *others), x)
        return y, back(y)

    with selection.using("plain"):
        compiled = jax.jit(both).lower(*arguments, S((groups,), jnp.int32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1.5 * 4 * width * width


@needs_libtpu
@either_way
@pytest.mark.parametrize("rows", [16, 4096])
def test_compiles_for_tpus(rows, transposed):
    """`down` of the released sizes, 2 layers of 32 experts: stored as the kernel reads it, and not copied."""
    layers, groups, width = 2, 32, 2880
    stack = (layers * groups, width, width // 32)
    for name in TPUS:
        with tpu_devices(name) as devices:
            place = jax.sharding.SingleDeviceSharding(devices[0])
        stored = [Format(Layout(codec.TPU_LAYOUTS[part]), place) for part in ("blocks", "scales")]
        S = functools.partial(jax.ShapeDtypeStruct, sharding=place)
        for dtype in (jnp.bfloat16, jnp.float32):
            blocks = jax.ShapeDtypeStruct((*stack, 16), jnp.uint8, sharding=stored[0])
            scales = jax.ShapeDtypeStruct(stack, jnp.uint8, sharding=stored[1])
            matmul = functools.partial(mosaic_mxfp4_matmul, transposed=transposed)
            call = functools.partial(through_layers, matmul, layers)
            arguments = S((rows, width), dtype), blocks, scales, (), S((groups,), jnp.int32)
            compiled = jax.jit(call).lower(*arguments).compile()
            text = compiled.as_text()
            assert text.count('custom_call_target="tpu_custom_call"') == 1
            assert not BYTES_MADE.search(text)
            # The rows, a few times over.
            rows_bytes = max(rows, 128) * width * dtype.dtype.itemsize
            assert compiled.memory_analysis().temp_size_in_bytes < 8 * rows_bytes


@either_way
@pytest.mark.parametrize("rows", [16, 4096])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_lowers_for_cuda(dtype, rows, transposed):
    """The released sizes."""
    S, groups, width = jax.ShapeDtypeStruct, 32, 2880
    x = S((rows, 5760 if transposed else width), dtype)
    arguments = x, S((groups, 5760, 90, 16), jnp.uint8), S((groups, 5760, 90), jnp.uint8)
    matmul = functools.partial(triton_mxfp4_matmul, transposed=transposed)
    kernels = kernels_for_cuda(matmul, *arguments, S((groups,), jnp.int32))
    assert [kernel.count("tt.dot") for kernel in kernels] == [1]


@pytest.mark.parametrize(("platform", "num_kernels"), [("tpu", 2), ("gpu", 2), ("cpu", 0)])
def test_each_backend_has_its_implementation(platform, num_kernels, monkeypatch):
    monkeypatch.setattr(backend, "platform", lambda: platform)

    def loss(x, *weights):
        return mxfp4_grouped_matmul(x, *weights).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss))(jnp.zeros((R, D)), *packed(E, F, G), jnp.zeros(E, jnp.int32))
    assert str(jaxpr).count("pallas_call[") == num_kernels
