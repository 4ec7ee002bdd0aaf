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
from gptoss_jax.kernels.mxfp4.pallas_triton import triton_mxfp4_matmul
from gptoss_jax.kernels.mxfp4.xla import xla_mxfp4_matmul

R, E, F, G = 37, 4, 7, 3
D = 32 * G
IMPLEMENTATIONS = {
    "xla": xla_mxfp4_matmul,
    "mosaic": functools.partial(mosaic_mxfp4_matmul, interpret=True),
    "triton": functools.partial(triton_mxfp4_matmul, interpret=True),
    "default": mxfp4_grouped_matmul,
}


@functools.partial(jax.jit, static_argnums=0)
def multiply(implementation, *inputs):
    return IMPLEMENTATIONS[implementation](*inputs)


@functools.cache
def packed(E, F, G, seed=0):
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (E, F, G, 16), np.uint8)
    return blocks, rng.integers(118, 130, (E, F, G), np.uint8)


def by_loop(x, blocks, scales, sizes):
    w = np.asarray(codec.dequantize(blocks, scales, jnp.float32), np.float64)
    y, start = np.zeros((x.shape[0], w.shape[1])), 0
    for e, size in enumerate(sizes):
        y[start : start + size] = x[start : start + size].astype(np.float64) @ w[e].T
        start += size
    return y


def check(implementation, rows, shape, sizes, outside=0.0, dtype=jnp.float32, tolerance=1e-5):
    blocks, scales = packed(*shape)
    rng = np.random.default_rng(sum(sizes) + 31 * sizes[0])
    x = np.array(jnp.asarray(rng.standard_normal((rows, 32 * shape[2])), dtype))
    expected = by_loop(x, blocks, scales, sizes)
    # The values of rows of no group must not matter.
    x[sum(sizes) :] = outside
    y = multiply(implementation, x, blocks, scales, np.array(sizes, np.int32))
    assert y.dtype == dtype
    size = np.abs(expected).max(initial=1)
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=tolerance, atol=tolerance * size)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=30, deadline=None)
@given(sizes=sizes_within(R, E), outside=st.sampled_from([0.0, 3.0, np.nan, np.inf, -np.inf]))
@example(sizes=[R, 0, 0, 0], outside=0.0)
@example(sizes=[0, 0, 0, R], outside=0.0)
@example(sizes=[0, 0, 0, 0], outside=np.nan)
@example(sizes=[1, 1, 1, 1], outside=np.inf)
@example(sizes=[5, 9, 12, 11], outside=0.0)
@example(sizes=[0, 16, 0, 17], outside=np.nan)
def test_any_group_sizes(implementation, sizes, outside):
    check(implementation, R, (E, F, G), sizes, outside)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_several_tiles(implementation):
    """Rows, outputs and inputs of several tiles, the last of which is not full."""
    check(implementation, 300, (3, 700, 11), [130, 0, 150], np.nan)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16(implementation):
    # Sums are in float32, and rounded once.
    check(implementation, R, (E, F, G), [10, 0, 20, 4], np.nan, jnp.bfloat16, tolerance=2.0**-8)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_row_in_one_of_many_groups(implementation):
    sizes = [0] * 600
    sizes[471] = 1
    check(implementation, 1, (600, 5, 1), sizes)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_byte_under_every_scale(implementation, dtype):
    """An identity matrix gives the weights of each input. Subnormal ones may be zeros."""
    # Group e has bytes 16e … 16e + 15, and its output f the scale f.
    blocks = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(16, 1, 1, 16), (16, 256, 1, 16))
    scales = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(1, 256, 1), (16, 256, 1))
    x = jnp.tile(jnp.eye(32, dtype=dtype), (16, 1))
    expected = np.asarray(codec.dequantize(blocks, scales, dtype), np.float64).swapaxes(1, 2)
    found = np.asarray(multiply(implementation, x, blocks, scales, np.full(16, 32, np.int32)), np.float64)
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
    found = np.asarray(multiply(implementation, x, blocks, scales, np.ones(16, np.int32)), np.float64)
    # A 32nd of smaller ones is subnormal.
    kept = ~(np.abs(expected) < 2.0**-121)
    np.testing.assert_array_equal(found[kept], expected[kept])
    assert np.isinf(expected).sum() == 2 * (2 + 4) and np.isnan(expected).sum() == 16


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
@pytest.mark.parametrize("rows", [16, 4096])
def test_compiles_for_tpus(rows):
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
            call = functools.partial(through_layers, mosaic_mxfp4_matmul, layers)
            arguments = S((rows, width), dtype), blocks, scales, (), S((groups,), jnp.int32)
            compiled = jax.jit(call).lower(*arguments).compile()
            text = compiled.as_text()
            assert text.count('custom_call_target="tpu_custom_call"') == 1
            assert not BYTES_MADE.search(text)
            # The rows, a few times over.
            rows_bytes = max(rows, 128) * width * dtype.dtype.itemsize
            assert compiled.memory_analysis().temp_size_in_bytes < 8 * rows_bytes


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_lowers_for_cuda(dtype):
    """The released sizes."""
    S, groups, width = jax.ShapeDtypeStruct, 32, 2880
    arguments = S((16, width), dtype), S((groups, 5760, 90, 16), jnp.uint8), S((groups, 5760, 90), jnp.uint8)
    kernels = kernels_for_cuda(triton_mxfp4_matmul, *arguments, S((groups,), jnp.int32))
    assert [kernel.count("tt.dot") for kernel in kernels] == [2]


@pytest.mark.parametrize(
    ("platform", "rows", "is_kernel"),
    [("tpu", 16, True), ("gpu", 16, True), ("gpu", 2048, False), ("cpu", 16, False)],
)
def test_each_backend_has_its_implementation(platform, rows, is_kernel, monkeypatch):
    monkeypatch.setattr(backend, "platform", lambda: platform)
    x = jnp.zeros((rows, D))
    # A new function, because JAX caches traces.
    jaxpr = jax.make_jaxpr(lambda *inputs: mxfp4_grouped_matmul(*inputs))(
        x, *packed(E, F, G), jnp.zeros(E, jnp.int32)
    )
    assert ("pallas_call" in str(jaxpr)) == is_kernel
