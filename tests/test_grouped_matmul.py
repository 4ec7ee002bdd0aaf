"""Grouped matmul, in every backend of a CPU, against a loop in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.grouped_matmul import by_loop, sizes_within
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptoss_jax.kernels.cpu import build, grouped
from gptoss_jax.kernels.cpu.grouped import cpu_grouped_matmul
from gptoss_jax.kernels.grouped_matmul.api import add_group_bias, grouped_matmul, reference_grouped_matmul
from gptoss_jax.kernels.grouped_matmul.xla import xla_grouped_matmul
from gptoss_jax.kernels.layer_view import LayerView

E, D, F = 4, 5, 7
BACKENDS = {"xla": xla_grouped_matmul, "reference": reference_grouped_matmul, "default": grouped_matmul}
needs_compiler = pytest.mark.skipif(not build.is_available(), reason="needs a C++ compiler")
if build.is_available():
    BACKENDS["cpu"] = cpu_grouped_matmul


@functools.partial(jax.jit, static_argnums=0)
def with_gradients(backend, x, w, g, sizes):
    y, vjp = jax.vjp(lambda x, w: BACKENDS[backend](x, w, sizes), x, w)
    return y, *vjp(g)


def check(backend, rows, sizes, outside):
    rng = np.random.default_rng(sum(sizes) + 31 * sizes[0])
    x, w, g = (rng.standard_normal(shape).astype(np.float32) for shape in ((rows, D), (E, D, F), (rows, F)))
    expected = by_loop(*(a.astype(np.float64) for a in (x, w, g)), sizes)
    # The values of rows of no group must not matter.
    x[sum(sizes) :] = outside
    g[sum(sizes) :] = outside
    found = with_gradients(backend, x, w, g, jnp.array(sizes, jnp.int32))
    for name, f, e in zip(("y", "dx", "dw"), found, expected, strict=True):
        np.testing.assert_allclose(f, e, rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(sizes=sizes_within(37, E), outside=st.sampled_from([0.0, 3.0, np.nan, np.inf, -np.inf]))
@example(sizes=[37, 0, 0, 0], outside=0.0)
@example(sizes=[0, 0, 0, 37], outside=0.0)
@example(sizes=[0, 0, 0, 0], outside=np.nan)
@example(sizes=[1, 1, 1, 1], outside=np.inf)
@example(sizes=[0, 16, 0, 17], outside=np.nan)
def test_any_group_sizes(backend, sizes, outside):
    check(backend, 37, sizes, outside)


# All sizes differ. With two threads, the rows of the second and the last are split into two tasks, and the
# columns of the fourth.
EINSUMS = {
    "BTD,DNH->BTNH": ((2, 3, 5), (5, 4, 7)),
    "BTNH,NHD->BTD": ((3, 150, 2, 5), (2, 5, 7)),
    "BCD,VD->BCV": ((2, 3, 5), (11, 5)),
    "BCD,ND->BCN": ((3, 150, 5), (500, 5)),
    "BCV,BCD->VD": ((2, 3, 450), (2, 3, 5)),
}


@needs_compiler
@pytest.mark.parametrize("equation", EINSUMS)
def test_einsums_of_one_group(equation):
    rng = np.random.default_rng(len(equation))
    x, w = (rng.standard_normal(shape).astype(np.float32) for shape in EINSUMS[equation])
    assert grouped.supports_einsum(equation, x, jnp.float32)
    stack = jnp.stack([jnp.full_like(w, np.nan), w])

    def product(x, stack):
        return grouped.einsum(equation, x, LayerView(stack, 1))

    found = product(x, stack)
    np.testing.assert_allclose(found, np.einsum(equation, x, w, dtype=np.float64), rtol=1e-5, atol=1e-5)
    if equation == "BCV,BCD->VD":
        return  # not differentiable
    g = rng.standard_normal(found.shape).astype(np.float32)
    d_x, d_stack = jax.vjp(product, x, stack)[1](g)
    x_letters, w_letters, y_letters = equation.replace("->", ",").split(",")
    expected = np.einsum(f"{y_letters},{w_letters}->{x_letters}", g, w, dtype=np.float64)
    np.testing.assert_allclose(d_x, expected, rtol=1e-5, atol=1e-4)
    expected = np.einsum(f"{x_letters},{y_letters}->{w_letters}", x, g, dtype=np.float64)
    np.testing.assert_allclose(d_stack[1], expected, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(d_stack[0], 0)


@pytest.mark.parametrize("equation", ["BTD,NDH->BTNH", "BTD,DNH->BNTH", "BTD,NH->BTNH"])
def test_other_einsums_are_not_of_one_group(equation):
    assert not grouped.supports_einsum(equation, jnp.ones((2, 3, 5)), None)


@pytest.mark.parametrize("rows", [130, 300, 600])
@pytest.mark.parametrize(
    "shares", [(0.25, 0.25, 0.25, 0.25), (0.9, 0.0, 0.05, 0.05), (0, 0, 1, 0), (0.5, 0.3, 0, 0)]
)
def test_larger_blocks(rows, shares):
    check("xla", rows, [int(share * rows) for share in shares], np.nan)


@needs_compiler
@pytest.mark.parametrize("widths", [(1, 1), (31, 33), (100, 530), (1030, 70)], ids=str)
@pytest.mark.parametrize("sizes", [(0, 13, 1, 40), (600, 0, 5, 0), (12, 24, 8, 4)], ids=str)
def test_every_edge_of_the_cpu_kernel(widths, sizes):
    """Sizes around those of its blocks (32 and 480 columns, 512 inner, 12 rows), with a bias."""
    (D, F), E = widths, len(sizes)
    rng = np.random.default_rng(D + sum(sizes))
    shapes = ((sum(sizes) + 3, D), (E, D, F), (E, F), (sum(sizes) + 3, F))
    x, w, b, g = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    x[-3:] = g[-3:] = np.nan

    @jax.jit
    def found(x, w, b, g):
        y, back = jax.vjp(lambda x, w, b: cpu_grouped_matmul(x, w, jnp.array(sizes), b), x, w, b)
        return y, *back(g)

    y, dx, dw, db = found(x, w, b, g)
    ends = np.cumsum(sizes)
    for e, (begin, end) in enumerate(zip(ends - sizes, ends, strict=True)):
        x64, w64, g64 = (a.astype(np.float64) for a in (x[begin:end], w[e], g[begin:end]))
        expected = {"y": x64 @ w64 + b[e], "dx": g64 @ w64.T, "dw": x64.T @ g64, "db": g64.sum(0)}
        for name, part in {"y": y[begin:end], "dx": dx[begin:end], "dw": dw[e], "db": db[e]}.items():
            scale = np.abs(expected[name]).max(initial=1)
            np.testing.assert_allclose(part, expected[name], rtol=0, atol=1e-5 * scale, err_msg=name)
    np.testing.assert_array_equal(y[-3:], 0)
    np.testing.assert_array_equal(dx[-3:], 0)


def test_plain_xla_without_a_compiler(monkeypatch):
    monkeypatch.setattr(build, "is_available", lambda: False)
    x, w, sizes = jnp.ones((5, 2)), jnp.ones((2, 2, 3)), jnp.array([2, 3])
    text = jax.jit(lambda x, w: grouped_matmul(x, w, sizes, jnp.ones((2, 3)))).lower(x, w).as_text()
    assert "custom_call" not in text
    np.testing.assert_array_equal(grouped_matmul(x, w, sizes, jnp.ones((2, 3))), 3)


def test_a_failing_compiler_is_a_warning(monkeypatch, tmp_path):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'x.cc:1: error: no such thing' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    message = "cannot compile the kernels in kernels/cpu/, or .*; falling back to plain XLA: x.cc:1: error"
    with pytest.warns(UserWarning, match=message):
        assert not build.is_available.__wrapped__()
    assert [path for path in tmp_path.rglob("*") if path.suffix == ".so"] == []


def test_by_hand():
    x = jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])
    w = jnp.array([[[1.0], [0.0]], [[9.0], [9.0]], [[0.0], [10.0]]])
    for matmul in BACKENDS.values():
        np.testing.assert_array_equal(matmul(x, w, jnp.array([2, 0, 1]))[:, 0], [1, 3, 60, 0])


def test_bfloat16_in_and_out():
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((37, D), (E, D, F)))
    sizes = jnp.array([5, 0, 20, 9])
    g = jnp.ones((37, F), jnp.bfloat16)
    found = with_gradients("xla", x, w, g, sizes)
    expected = by_loop(*(np.asarray(a, np.float64) for a in (x, w, g)), [5, 0, 20, 9])
    for name, f, e in zip(("y", "dx", "dw"), found, expected, strict=True):
        assert f.dtype == jnp.bfloat16, name
        np.testing.assert_allclose(np.asarray(f, np.float64), e, rtol=0.02, atol=0.05, err_msg=name)


def test_bfloat16_weight_gradients_of_large_groups():
    rows = 5000
    rng = np.random.default_rng(0)
    x, g = (jnp.asarray(rng.uniform(0.5, 1.5, (rows, size)), jnp.bfloat16) for size in (D, F))
    w, sizes = jnp.ones((E, D, F), jnp.bfloat16), jnp.array([60, 0, 4900, 40])
    dw = with_gradients("xla", x, w, g, sizes)[2]
    expected = np.asarray(x, np.float64)[60:4960].T @ np.asarray(g, np.float64)[60:4960]
    np.testing.assert_allclose(np.asarray(dw, np.float64)[2], expected, rtol=2**-8)


@needs_compiler
def test_the_view_of_a_layer_equals_the_layer():
    rng = np.random.default_rng(0)
    shapes = (37, D), (3, E, D, F), (E, F), (37, F)
    x, stack, bias, g = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
    sizes = jnp.array([5, 0, 20, 9])

    def with_gradients(w):
        y, vjp = jax.vjp(lambda x, w, bias: grouped_matmul(x, w, sizes, bias), x, w, bias)
        return y, *vjp(g)

    y, dx, dw, db = with_gradients(stack[1])
    found_y, found_dx, found_dw, found_db = with_gradients(LayerView(stack, 1))
    for found, expected in ((found_y, y), (found_dx, dx), (found_dw.stack[1], dw), (found_db, db)):
        np.testing.assert_array_equal(found, expected)
    assert not np.any(found_dw.stack[::2])


@pytest.mark.parametrize("sizes", [(3, 0, 9, 2), (0, 0, 0, 0), (17, 0, 0, 0), (0, 0, 0, 16)])
def test_group_bias_and_its_gradients(sizes):
    rows, groups, width = 17, 4, 5
    x = jax.random.normal(jax.random.key(0), (rows, width))
    bias = jax.random.normal(jax.random.key(1), (groups, width))
    group = np.concatenate([np.repeat(np.arange(groups), sizes), np.full(rows - sum(sizes), groups)])

    def plain(x, bias):
        return jnp.sum(jnp.sin(x + jnp.concatenate([bias, jnp.zeros((1, width))])[group]))

    def ours(x, bias):
        return jnp.sum(jnp.sin(add_group_bias(x, bias, jnp.array(sizes, jnp.int32))))

    expected, expected_grads = jax.value_and_grad(plain, (0, 1))(x, bias)
    found, found_grads = jax.value_and_grad(ours, (0, 1))(x, bias)
    assert found == pytest.approx(float(expected), abs=1e-5)
    for one, other in zip(found_grads, expected_grads, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)
