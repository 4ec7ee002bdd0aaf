"""Grouped matmul on TPUs, in interpret mode against a loop, and through the TPU compiler."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.grouped_matmul import by_loop
from helpers.tpu_compiler import needs_libtpu, on_tpus

from gptoss_jax.kernels.grouped_matmul.pallas_tpu import _even_parts, _tiles, megablox_grouped_matmul

E = 4


@functools.partial(jax.jit, static_argnums=4)
def with_gradients(x, w, g, sizes, interpret=True):
    y, vjp = jax.vjp(lambda x, w: megablox_grouped_matmul(x, w, sizes, interpret), x, w)
    return y, *vjp(g)


def check(rows, D, F, sizes, outside):
    rng = np.random.default_rng(sum(sizes) + 31 * sizes[0])
    x, w, g = (rng.standard_normal(s).astype(np.float32) for s in ((rows, D), (E, D, F), (rows, F)))
    expected, start = by_loop(x, w, g, sizes), sum(sizes)
    # The values of rows of no group must not matter.
    x[start:], g[start:] = outside, outside
    found = with_gradients(x, w, g, jnp.array(sizes, jnp.int32))
    for name, f, e in zip(("y", "dx", "dw"), found, expected, strict=True):
        np.testing.assert_allclose(f, e, rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    ("sizes", "outside"),
    [
        ((10, 0, 20, 7), 0.0),
        ((10, 0, 3, 0), np.nan),
        ((0, 0, 0, 0), np.inf),
        ((0, 37, 0, 0), 0.0),
        ((1, 16, 16, 4), 0.0),
        ((5, 5, 5, 21), np.nan),
    ],
)
def test_equals_a_loop(sizes, outside):
    check(37, 5, 7, sizes, outside)


def test_several_tiles():
    # Three tiles of rows, one of them of three groups; widths that are no multiples of a tile's.
    check(300, 200, 900, (130, 0, 20, 140), np.nan)


@pytest.mark.parametrize(("width", "outputs"), [(200, 2), (2, 200)])
def test_factors_of_adapters(width, outputs):
    check(300, width, outputs, (130, 0, 20, 140), np.nan)


def test_gradients_of_gate_and_up():
    rng = np.random.default_rng(11)
    x, w, g = (rng.standard_normal(s).astype(np.float32) for s in ((37, 5), (E, 5, 2, 7), (37, 14)))
    sizes = jnp.array((10, 0, 20, 7), jnp.int32)
    found = with_gradients(x, w, g, sizes)
    for f, expected in zip(found, with_gradients(x, w.reshape(E, 5, 14), g, sizes), strict=True):
        np.testing.assert_allclose(f.reshape(expected.shape), expected, rtol=1e-5, atol=1e-5)
    assert found[2].shape == w.shape


def test_tiles():
    # gpt-oss: gate and up, their gradient, and down; then one expert with few rows, and float32.
    assert _tiles(2048, 2880, 5760, 2) == (256, 2880, 768)
    assert _tiles(2048, 5760, 2880, 2) == (128, 5760, 512)
    assert _tiles(2048, 2880, 2880, 2) == (256, 2880, 768)
    assert _tiles(512, 2880, 5760, 2) == (128, 2880, 768)
    assert _tiles(2048, 2880, 2880, 4) == (128, 1024, 512)
    assert _tiles(2048, 20000, 2880, 2) == (128, 1024, 512)
    assert [_even_parts(size, 1024) for size in (7, 1024, 1025, 2880)] == [7, 1024, 640, 1024]


@needs_libtpu
def test_compiles_for_tpus():
    def three(x, w, g, sizes):
        return with_gradients(x, w, g, sizes, False)

    # Widths that are multiples of 64 but not of 128, as in gpt-oss.
    for dtype in (jnp.bfloat16, jnp.float32):
        shapes = [((100, 192), dtype), ((E, 192, 320), dtype), ((100, 320), dtype), ((E,), jnp.int32)]
        with jax.default_matmul_precision("highest"):
            for text in on_tpus(three, shapes):
                assert text.count('custom_call_target="tpu_custom_call"') == 3


@needs_libtpu
def test_no_narrow_matrix_is_padded():
    def gradients(x, w, g, sizes):
        def one_layer(_, w):
            return None, with_gradients(x, w, g, sizes, False)[2]

        return jax.lax.scan(one_layer, None, w.astype(x.dtype))[1].astype(w.dtype)

    shapes = [((100, 192), jnp.bfloat16), ((3, E, 192, 2), jnp.float32), ((100, 2), jnp.bfloat16)]
    for text in on_tpus(gradients, [*shapes, ((E,), jnp.int32)]):
        assert not re.findall(r"\[\S*192,2\]\{(?:3,)?2,1,0", text)
