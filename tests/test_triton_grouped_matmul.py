"""Grouped matmul on GPUs: the kernels, interpreted, against a loop in float64; and lowered for CUDA to Triton
programs that are well formed, which needs no GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cuda_lowering import kernels_for_cuda
from helpers.grouped_matmul import by_loop, sizes_within
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptoss_jax.kernels.grouped_matmul.pallas_triton import Blocks, triton_grouped_matmul

R, E, D, F = 57, 4, 37, 50
SMALL = Blocks(rows=16, columns=32, inner=16, warps=4, stages=2)


@functools.partial(jax.jit, static_argnums=0)
def with_gradients(blocks, x, w, g, sizes):
    y, vjp = jax.vjp(lambda x, w: triton_grouped_matmul(x, w, sizes, interpret=True, blocks=blocks), x, w)
    return y, *vjp(g)


def check(sizes, outside=0.0, blocks=SMALL, dtype=np.float32, tolerance=1e-5):
    rng = np.random.default_rng(sum(sizes) + 31 * sizes[0])
    x, w, g = (rng.standard_normal(shape).astype(dtype) for shape in ((R, D), (E, D, F), (R, F)))
    expected = by_loop(*(a.astype(np.float64) for a in (x, w, g)), sizes)
    # The values of rows of no group must not matter.
    x[sum(sizes) :] = outside
    g[sum(sizes) :] = outside
    found = with_gradients(blocks, x, w, g, jnp.array(sizes, jnp.int32))
    for name, f, e in zip(("y", "dx", "dw"), found, expected, strict=True):
        assert f.dtype == dtype, name
        np.testing.assert_allclose(
            np.asarray(f, np.float64), e, rtol=tolerance, atol=10 * tolerance, err_msg=name
        )


@settings(max_examples=60, deadline=None)
@given(sizes=sizes_within(R, E), outside=st.sampled_from([0.0, 3.0, np.nan, np.inf, -np.inf]))
@example(sizes=[R, 0, 0, 0], outside=0.0)
@example(sizes=[0, 0, 0, R], outside=0.0)
@example(sizes=[0, 0, 0, 0], outside=np.nan)
@example(sizes=[1, 1, 1, 1], outside=np.inf)
@example(sizes=[17, 1, 16, 23], outside=0.0)
@example(sizes=[0, 16, 0, 17], outside=np.nan)
def test_any_group_sizes(sizes, outside):
    check(sizes, outside)


def test_by_hand():
    x = jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])
    w = jnp.array([[[1.0], [0.0]], [[9.0], [9.0]], [[0.0], [10.0]]])
    y = triton_grouped_matmul(x, w, jnp.array([2, 0, 1]), interpret=True)
    np.testing.assert_array_equal(y[:, 0], [1, 3, 60, 0])


def test_default_blocks():
    """Larger than all the arrays here, so that every edge is masked."""
    check([20, 0, 30, 3], np.nan, blocks=None)


def test_bfloat16():
    check([20, 0, 30, 3], np.nan, dtype=jnp.bfloat16, tolerance=0.01)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("rows", [65536, 64])
def test_lowers_for_cuda(dtype, rows):
    """The released sizes."""
    groups, width = 32, 2880
    x = jax.ShapeDtypeStruct((rows, width), dtype)
    w = jax.ShapeDtypeStruct((groups, width, width), dtype)
    sizes = jax.ShapeDtypeStruct((groups,), jnp.int32)

    def both(x, w, sizes):
        y, vjp = jax.vjp(lambda x, w: triton_grouped_matmul(x, w, sizes), x, w)
        return y, *vjp(y)

    kernels = kernels_for_cuda(both, x, w, sizes)
    assert [kernel.count("tt.dot") for kernel in kernels] == [1, 1, 1]
