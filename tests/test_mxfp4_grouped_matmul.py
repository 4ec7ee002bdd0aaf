"""The product with packed experts, in every form, against unpacking and multiplying in float64; the kernels
interpreted, and through the TPU compiler and the lowering for CUDA, which need no such device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grouped import sizes_within
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax._src.pallas.triton import lowering
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from tpu_compiler import TPUS, needs_libtpu

from gptoss_jax.kernels import mxfp4
from gptoss_jax.kernels.mosaic_mxfp4_matmul import mosaic_mxfp4_matmul
from gptoss_jax.kernels.mxfp4_grouped_matmul import looped_mxfp4_matmul, mxfp4_grouped_matmul, visits
from gptoss_jax.kernels.triton_mxfp4_matmul import triton_mxfp4_matmul

R, E, F, G = 37, 4, 7, 3
D = 32 * G
FORMS = {
    "looped": looped_mxfp4_matmul,
    "mosaic": functools.partial(mosaic_mxfp4_matmul, interpret=True),
    "triton": functools.partial(triton_mxfp4_matmul, interpret=True),
    "chosen": mxfp4_grouped_matmul,
}


@functools.partial(jax.jit, static_argnums=0)
def multiply(form, *inputs):
    return FORMS[form](*inputs)


@functools.cache
def packed(E, F, G, seed=0):
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (E, F, G, 16), np.uint8)
    return blocks, rng.integers(118, 130, (E, F, G), np.uint8)


def by_loop(x, blocks, scales, sizes):
    w = np.asarray(mxfp4.unpack(blocks, scales, jnp.float32), np.float64)
    y, start = np.zeros((x.shape[0], w.shape[1])), 0
    for e, size in enumerate(sizes):
        y[start : start + size] = x[start : start + size].astype(np.float64) @ w[e].T
        start += size
    return y


def check(form, rows, shape, sizes, outside=0.0, dtype=jnp.float32, tolerance=1e-5):
    blocks, scales = packed(*shape)
    rng = np.random.default_rng(sum(sizes) + 31 * sizes[0])
    x = np.array(jnp.asarray(rng.standard_normal((rows, 32 * shape[2])), dtype))
    expected = by_loop(x, blocks, scales, sizes)
    # What stands past the groups must not matter.
    x[sum(sizes) :] = outside
    y = multiply(form, x, blocks, scales, np.array(sizes, np.int32))
    assert y.dtype == dtype
    size = np.abs(expected).max(initial=1)
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=tolerance, atol=tolerance * size)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=30, deadline=None)
@given(sizes=sizes_within(R, E), outside=st.sampled_from([0.0, 3.0, np.nan, np.inf, -np.inf]))
@example(sizes=[R, 0, 0, 0], outside=0.0)
@example(sizes=[0, 0, 0, R], outside=0.0)
@example(sizes=[0, 0, 0, 0], outside=np.nan)
@example(sizes=[1, 1, 1, 1], outside=np.inf)
@example(sizes=[5, 9, 12, 11], outside=0.0)
@example(sizes=[0, 16, 0, 17], outside=np.nan)
def test_any_group_sizes(form, sizes, outside):
    check(form, R, (E, F, G), sizes, outside)


@pytest.mark.parametrize("form", FORMS)
def test_several_tiles(form):
    """Of rows, outputs and inputs, with edges: wider than any tile, and no multiple of one."""
    check(form, 300, (3, 700, 11), [130, 0, 150], np.nan)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16(form):
    # Sums are in float32, and rounded once.
    check(form, R, (E, F, G), [10, 0, 20, 4], np.nan, jnp.bfloat16, tolerance=2.0**-8)


@pytest.mark.parametrize("form", FORMS)
def test_one_row_in_one_of_many_groups(form):
    sizes = [0] * 600
    sizes[471] = 1
    check(form, 1, (600, 5, 1), sizes)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_byte_under_every_scale(form, dtype):
    """Row d of an identity brings out the weights of input d. Those that are no normal floats may be zero."""
    blocks = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16), (1, 256, 16, 16))
    # 16 groups of one output have all bytes; a scale for each output. One group at a time, because not a
    # number times zero is not zero.
    scales = np.broadcast_to(np.arange(256, dtype=np.uint8)[None, :, None], (1, 256, 16))
    blocks, scales = (a.transpose(0, 2, 1, *range(3, a.ndim)).reshape(16, 256, 1, -1) for a in (blocks, scales))
    scales = scales[..., 0]
    expected = np.asarray(mxfp4.unpack(blocks, scales, dtype), np.float64).swapaxes(1, 2).reshape(512, 256)
    x = jnp.tile(jnp.eye(32, dtype=dtype), (16, 1))
    found = np.asarray(multiply(form, x, blocks, scales, np.full(16, 32, np.int32)), np.float64)
    clean = np.isfinite(expected.reshape(16, 32, 256)).all(axis=1, keepdims=True)
    clean = np.broadcast_to(clean, (16, 32, 256)).reshape(512, 256)
    normal = np.abs(expected) >= 2.0**-126
    np.testing.assert_array_equal(found[clean & normal], expected[clean & normal])
    assert np.all(np.abs(found[clean & ~normal]) < 2.0**-126)
    # Where one of a group's numbers is not finite, all rows meet it.
    assert not np.isfinite(found[~clean]).any()
    assert clean.mean() > 0.98
