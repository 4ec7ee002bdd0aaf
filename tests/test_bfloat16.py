"""The CPU kernels in bfloat16: float32 math on the same inputs, rounded once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.kernels.attention.api import attention
from gptoss_jax.kernels.attention.reference import AttentionSpec, attention_mask, reference_attention
from gptoss_jax.kernels.cpu import build, decode
from gptoss_jax.kernels.cpu.grouped import cpu_grouped_matmul
from gptoss_jax.kernels.layer_view import LayerView
from gptoss_jax.kernels.mxfp4 import codec
from gptoss_jax.kernels.mxfp4.api import mxfp4_grouped_matmul
from gptoss_jax.model.moe import SwiGLU, swiglu_halves, xla_swiglu_halves
from gptoss_jax.model.rope import apply_rope, xla_rope
from gptoss_jax.model.transformer import bind, init_params

pytestmark = pytest.mark.skipif(not build.is_available(), reason="no C++ compiler here")

TYPES = [(jnp.bfloat16, jnp.bfloat16), (jnp.bfloat16, jnp.float32), (jnp.float32, jnp.bfloat16)]


def normal(seed, *shape, dtype=jnp.bfloat16):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def wide(*arrays, rounded=False):
    """Returns the arrays in float32; with `rounded`, after rounding them to bfloat16."""
    return [(x.astype(jnp.bfloat16) if rounded else x).astype(jnp.float32) for x in arrays]


def assert_rounded(found, expected, dtype):
    """`found` is `expected`, up to the error of a sum in float32, rounded to `dtype`."""
    assert found.dtype == dtype
    found, expected = (np.asarray(x, np.float32) for x in (found, expected))
    half_unit = 2.0**-8 if dtype == jnp.bfloat16 else 0
    np.testing.assert_allclose(found, expected, rtol=half_unit, atol=5e-6 * np.abs(expected).max(initial=1))


def test_rounding_is_to_nearest_ties_to_even():
    """Of a matrix while it is read, and of a result: a sum of zero and a bias."""
    ties = [1.00390625, 1.01171875, -1.00390625, 1.00390637]
    values = jnp.array([[0.0, *ties, 3.4e38, np.inf, -np.inf, np.nan]], jnp.float32)
    one, sizes = jnp.ones((1, 1), jnp.bfloat16), jnp.array([1])
    expected = np.array([[0, 1, 1.015625, -1, 1.0078125, np.inf, np.inf, -np.inf, np.nan]])
    of_matrix = cpu_grouped_matmul(one, values[None], sizes)
    of_result = cpu_grouped_matmul(one, jnp.zeros_like(values)[None], sizes, values)
    for found in (of_matrix, of_result):
        assert found.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(found, np.float32), expected)


@pytest.mark.parametrize(("x_type", "w_type"), TYPES)
@pytest.mark.parametrize("widths", [(1, 1), (31, 33), (100, 530), (1030, 70)], ids=str)
@pytest.mark.parametrize("sizes", [(0, 13, 1, 40), (1600, 0, 5, 0)], ids=str)
def test_grouped_matmul(x_type, w_type, widths, sizes):
    """Sizes around those of its blocks, with a bias; 1,600 rows are two passes."""
    (D, F), E, R = widths, len(sizes), sum(sizes) + 3
    x, g = (normal(seed, R, size, dtype=x_type).at[-3:].set(jnp.nan) for seed, size in ((0, D), (1, F)))
    w, bias = normal(2, E, D, F, dtype=w_type), normal(3, E, F, dtype=w_type)

    @jax.jit
    def found(x, w, bias, g):
        y, back = jax.vjp(
            lambda *arrays: cpu_grouped_matmul(*arrays[:2], jnp.array(sizes), arrays[2]), x, w, bias
        )
        return y, *back(g)

    y, dx, dw, db = found(x, w, bias, g)
    x, g = (np.asarray(part, np.float64) for part in wide(x, g))
    (w32,), (bias32,) = wide(w, rounded=x_type == jnp.bfloat16), wide(bias)
    ends = np.cumsum(sizes)
    for e, (begin, end) in enumerate(zip(ends - sizes, ends, strict=True)):
        rows, matrix = slice(begin, end), np.asarray(w32[e], np.float64)
        assert_rounded(y[rows], x[rows] @ matrix + bias32[e], x_type)
        assert_rounded(dx[rows], g[rows] @ matrix.T, x_type)
        assert_rounded(dw[e], x[rows].T @ g[rows], w_type)
        assert_rounded(db[e], g[rows].sum(0), w_type)
    np.testing.assert_array_equal(y[-3:], 0)
    np.testing.assert_array_equal(dx[-3:], 0)


def test_mxfp4_matmul():
    D, F, sizes = 64, 96, jnp.array([7, 0, 30])
    x, g = normal(0, 40, D), normal(1, 40, F)
    packed = codec.quantize(normal(2, 3, F, D, dtype=jnp.float32))

    def with_gradient(x, g):
        y, back = jax.vjp(lambda x: mxfp4_grouped_matmul(x, *packed, sizes), x)
        return y, *back(g)

    for found, expected in zip(with_gradient(x, g), with_gradient(*wide(x, g)), strict=True):
        assert_rounded(found, expected, jnp.bfloat16)


def test_swiglu():
    h_RF, g_RF = 2 * normal(0, 7, 2 * 37), normal(1, 7, 37)

    def with_gradient(function, h, g):
        value, pull = jax.vjp(functools.partial(function, SwiGLU(1.7, 1.5, 0.25)), h)
        return value, *pull(g)

    text = jax.jit(functools.partial(with_gradient, swiglu_halves)).lower(h_RF, g_RF).as_text()
    assert "gptoss_jax.SwiGLU" in text and "gptoss_jax.SwiGLUGrad" in text
    expected = with_gradient(xla_swiglu_halves, *wide(h_RF, g_RF))
    for x, y in zip(with_gradient(swiglu_halves, h_RF, g_RF), expected, strict=True):
        assert_rounded(x, y, jnp.bfloat16)


def test_rope():
    x_BTNH, g_BTNH, angles_BTJ = normal(0, 2, 7, 3, 22), normal(1, 2, 7, 3, 22), normal(2, 2, 7, 11)
    (angles_BTJ,) = wide(angles_BTJ)
    tables = jnp.cos(angles_BTJ), 1.5 * jnp.sin(angles_BTJ)

    def with_gradient(function, x, g):
        value, pull = jax.vjp(lambda x: function(x, tables), x)
        return value, *pull(g)

    text = jax.jit(functools.partial(with_gradient, apply_rope)).lower(x_BTNH, g_BTNH).as_text()
    assert text.count("gptoss_jax.Rope") == 2
    expected = with_gradient(xla_rope, *wide(x_BTNH, g_BTNH))
    for x, y in zip(with_gradient(apply_rope, x_BTNH, g_BTNH), expected, strict=True):
        assert_rounded(x, y, jnp.bfloat16)


def test_attention():
    B, T, N, K, H = 2, 107, 6, 2, 11
    shapes = (B, T, N, H), (B, T, K, H), (B, T, K, H), (N,), (B, T, N, H)
    *inputs, g = (normal(seed, *shape) for seed, shape in enumerate(shapes))
    segments, positions = jnp.ones((B, T), jnp.int32), jnp.tile(jnp.arange(T), (B, 1))
    spec = AttentionSpec(window=50)

    def fast(q, k, v, sinks):
        return attention(q, k, v, segments, positions, spec, sinks_N=sinks)

    def plain(q, k, v, sinks):
        return reference_attention(q, k, v, attention_mask(segments, positions, spec), sinks_N=sinks)

    def with_gradients(function, inputs, g):
        out, pull = jax.vjp(function, *inputs)
        return out, *pull(g)

    fast = jax.jit(functools.partial(with_gradients, fast))
    assert "gptoss_jax.AttentionGrad" in fast.lower(inputs, g).as_text()
    found, expected = fast(inputs, g), with_gradients(plain, wide(*inputs), *wide(g))
    assert_rounded(found[0], expected[0], jnp.bfloat16)
    for x, y in zip(found[1:], expected[1:], strict=True):
        # The gradients use the rounded result.
        assert x.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(x), y, rtol=0, atol=1e-2 * float(jnp.max(jnp.abs(y))))


@pytest.mark.parametrize(("x_type", "w_type"), TYPES)
@pytest.mark.parametrize("rows", [1, 3, 6])
@pytest.mark.parametrize(("equation", "shape"), [("BTD,DNH->BTNH", (70, 3, 37)), ("BTD,VD->BTV", (77, 70))])
def test_decode_matmul(x_type, w_type, rows, equation, shape):
    x, stack = normal(0, 1, rows, 70, dtype=x_type), normal(1, 2, *shape, dtype=w_type)
    for result_type in (None, jnp.float32):
        (found,) = decode.einsum(equation, x, [LayerView(stack, 1)], result_type)
        (x32,), (w32,) = wide(x), wide(stack[1], rounded=x_type == jnp.bfloat16)
        expected = jnp.einsum(equation, x32, w32, precision="highest")
        assert_rounded(found, expected, result_type or x_type)


@pytest.mark.parametrize(("x_type", "w_type"), TYPES)
def test_decode_experts(x_type, w_type):
    M, X, E, D, F = 3, 2, 5, 67, 41
    x, chosen = normal(0, M, D, dtype=x_type), jnp.array([[4, 0], [2, 4], [1, -1]])
    weights = jnp.abs(normal(1, M, X, dtype=jnp.float32))
    gate_up, down = normal(2, 2, E, D, 2, F, dtype=w_type), normal(3, 2, E, F, D, dtype=w_type)
    views = {"gate_up": LayerView(gate_up, 1), "down": LayerView(down, 1)}
    assert decode.supports_experts(x, views)
    found = decode.experts(x, chosen, weights, views, (1.7, None, 0.5))
    (x32,), (up32, down32) = wide(x), wide(gate_up[1], down[1], rounded=x_type == jnp.bfloat16)
    h = jnp.einsum("MD,MXDPF->PMXF", x32, up32[chosen], precision="highest")
    a = SwiGLU(1.7, None, 0.5)(h[0], h[1])
    expected = jnp.einsum(
        "MXF,MXFD,MX->MD", a, down32[chosen], jnp.where(chosen < 0, 0, weights), precision="highest"
    )
    assert_rounded(found, expected, x_type)


def test_decode_attention():
    B, S, N, K, H = 3, 50, 6, 2, 11
    q, keys, values, sinks = (
        normal(0, B, N, H),
        normal(1, 2, B, K, S, H),
        normal(2, 2, B, K, S, H),
        normal(3, N),
    )
    counts = jnp.array([50, 1, 37])
    found = decode.attention(q, LayerView(keys, 1), LayerView(values, 1), counts, sinks)
    q32, k32, v32, sinks32 = wide(q[:, None], *(x[1].transpose(0, 2, 1, 3) for x in (keys, values)), sinks)
    mask_BTS = (jnp.arange(S) < counts[:, None])[:, None]
    expected = reference_attention(q32, k32, v32, mask_BTS, sinks_N=sinks32)[:, 0]
    assert_rounded(found, expected, jnp.bfloat16)


def test_a_model_is_as_close_to_float32_as_in_plain_xla(tiny_config):
    # With all experts, rounding cannot change the routing.
    config = dataclasses.replace(tiny_config, num_experts_per_tok=5, initializer_range=0.1)
    params = init_params(config, jax.random.key(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 97, (3, 19)), jnp.int32)

    def run(kernels, dtype):
        chosen = dataclasses.replace(config, kernels=kernels, compute_dtype=dtype)

        def loss(params):
            logits = bind(chosen, params)(tokens)
            return jnp.mean(jax.nn.logsumexp(logits, -1) - jnp.sin(logits[..., 0]))

        step = jax.jit(jax.value_and_grad(loss))
        is_kernel = "gptoss_jax.GroupedMatmulWeightGrad" in step.lower(params).as_text()
        assert is_kernel == (kernels == "required")
        value, gradients = step(params)
        return value, jnp.concatenate([x.ravel() for x in jax.tree.leaves(gradients)])

    exact_value, exact = run("required", "float32")
    errors = {}
    for kernels in ("required", "plain"):
        value, gradients = run(kernels, "bfloat16")
        assert abs(value - exact_value) < 0.01 * abs(exact_value)
        errors[kernels] = float(jnp.linalg.norm(gradients - exact) / jnp.linalg.norm(exact))
    assert errors["required"] < min(1.2 * errors["plain"], 0.05), errors
