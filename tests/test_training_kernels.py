"""The CPU kernels of a training step equal their plain equivalents: AdamW, SwiGLU, RoPE, dense matmuls."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.config import MeshConfig, OptimConfig
from gptoss_jax.kernels import selection
from gptoss_jax.kernels.cpu import build
from gptoss_jax.model.moe import SwiGLU, swiglu_halves, xla_swiglu_halves
from gptoss_jax.model.parameters import parameter_shardings
from gptoss_jax.model.rope import apply_rope, xla_rope
from gptoss_jax.parallel.linear import sharded_einsum
from gptoss_jax.parallel.mesh import make_mesh
from gptoss_jax.training.optimizer import apply_gradients, global_norm, make_optimizer

pytestmark = pytest.mark.skipif(not build.is_available(), reason="no C++ compiler here")

# A matrix of several blocks, with weight decay, and a scale of less than a vector, without.
SHAPES = {"head": {"weight": (74, 984)}, "final_norm": {"scale": (5,)}}


def random_tree(seed):
    rng = np.random.default_rng(seed)

    def values(shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return jax.tree.map(values, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def compile_update(config, kernels):
    def update(params, opt_state, gradients):
        with selection.using(kernels):
            norm = global_norm(gradients)
            return *apply_gradients(
                config, 10, params, opt_state, gradients, norm=norm, finite=jnp.isfinite(norm)
            ), norm

    return jax.jit(update, donate_argnums=(0, 1))


def train(config, kernels, gradients):
    """Returns the parameters and the state after one step for each gradient, as NumPy arrays."""
    params, update = random_tree(0), compile_update(config, kernels)
    opt_state = make_optimizer(config, 10).init(params)
    for gradient in gradients:
        params, opt_state, norm = update(params, opt_state, gradient)
    return jax.tree.map(np.asarray, (params, opt_state, norm))


def assert_equals_optax(config, gradients, moments_rtol):
    found, expected = (train(config, kernels, gradients) for kernels in ("required", "plain"))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    (params, opt_state, norm), (expected_params, expected_state, expected_norm) = found, expected
    compare = np.testing.assert_allclose
    # Absolute because sums can cancel.
    for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(expected_params), strict=True):
        compare(x, y, rtol=2**-22, atol=config.learning_rate * 2**-21)
    jax.tree.map(functools.partial(compare, rtol=moments_rtol, atol=1e-7), opt_state, expected_state)
    compare(norm, expected_norm, rtol=2**-20)


def test_adamw_equals_optax_to_rounding():
    config = OptimConfig(learning_rate=0.1, warmup_steps=2, max_grad_norm=0.0, weight_decay=0.3)
    assert_equals_optax(config, [random_tree(seed) for seed in (1, 2, 3)], moments_rtol=2**-21)


def test_clipped_adamw_equals_optax_to_the_rounding_of_the_norm():
    config = OptimConfig(learning_rate=0.1, warmup_steps=2, max_grad_norm=0.7)
    # One step: later, sums of both signs would cancel.
    assert_equals_optax(config, [random_tree(1)], moments_rtol=2**-19)


def test_the_global_norm_is_exact_in_long_arrays():
    """XLA's sum of the squares of as many ones as a float32 cannot count, on one thread, is 2^24."""
    (norm,) = jax.jit(lambda: [global_norm({"a": jnp.ones(2**24 + 900), "b": jnp.ones(100)})])()
    assert float(norm) == np.float32(np.sqrt(2**24 + 1000))


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.7])
def test_a_gradient_that_is_not_finite_changes_nothing(max_grad_norm):
    config = OptimConfig(warmup_steps=0, max_grad_norm=max_grad_norm)
    bad = random_tree(2)
    bad["head"]["weight"] = bad["head"]["weight"].at[73, 980].set(jnp.inf)
    *expected, _ = train(config, "required", [random_tree(1)])
    *found, norm = train(config, "required", [random_tree(1), bad])
    assert norm == np.inf
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_adamw_updates_in_place():
    config = OptimConfig()
    params = random_tree(0)
    arguments = params, make_optimizer(config, 10).init(params), random_tree(1)
    compiled = compile_update(config, "required").lower(*arguments).compile()
    assert "gptoss_jax.AdamW" in compiled.as_text()
    # Everything but the norm is written to the memory of the arguments.
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 4096
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 256


def test_adamw_on_a_mesh_updates_shards():
    config = OptimConfig(learning_rate=0.1, warmup_steps=0, max_grad_norm=0.7)
    gradients = random_tree(1)
    *expected, _ = train(config, "plain", [gradients])
    params = random_tree(0)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8])
    with jax.set_mesh(mesh):
        arguments = params, make_optimizer(config, 10).init(params), gradients
        shardings = parameter_shardings(arguments, mesh)
        update = compile_update(config, "required")
        arguments = jax.device_put(arguments, shardings)
        text = update.lower(*arguments).compile().as_text()
        *found, _ = update(*arguments)
    # Half of the rows and half of the columns are on each device.
    assert "gptoss_jax.AdamW" in text and "f32[37,492]" in text and "all-gather" not in text
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found, expected)


@pytest.mark.parametrize("limit", [None, 1.5])
def test_swiglu_equals_xla_with_its_gradient(limit):
    rng = np.random.default_rng(0)
    h_RF, g_RF = (jnp.asarray(rng.normal(size=(7, size)), jnp.float32) for size in (2 * 37, 37))
    # Values at and beyond the limits, saturated ones, and one that is not a number.
    h_RF = (
        h_RF.at[2, :4].set(jnp.array([1.5, -1.5, 300.0, -300.0])).at[3, 37:40].set(jnp.array([1.5, -1.5, -9]))
    )
    h_RF = h_RF.at[6, 36].set(jnp.nan)
    activation = SwiGLU(1.7, limit, 0.25)

    def with_gradient(function):
        value, pull = jax.vjp(functools.partial(function, activation), h_RF)
        return value, pull(g_RF)[0]

    text = jax.jit(lambda: with_gradient(swiglu_halves)).lower().as_text()
    assert "gptoss_jax.SwiGLU" in text and "gptoss_jax.SwiGLUGrad" in text
    found, expected = (jax.jit(lambda f=f: with_gradient(f))() for f in (swiglu_halves, xla_swiglu_halves))
    assert np.isnan(found[0][6, 36]) and np.isnan(found[1][6, 36])
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("kernels", ["plain", "plain:swiglu"])
def test_swiglu_can_be_turned_off(kernels):
    with selection.using(kernels):
        text = jax.jit(lambda h: swiglu_halves(SwiGLU(1.7, 7.0, 1.0), h)).lower(jnp.ones((3, 8))).as_text()
    assert "gptoss_jax." not in text


def test_rope_equals_xla_with_its_gradient():
    rng = np.random.default_rng(0)
    # Eleven pairs: one vector and a part of one.
    x_BTNH, g_BTNH = (jnp.asarray(rng.normal(size=(2, 7, 3, 22)), jnp.float32) for _ in range(2))
    angles_BTJ = jnp.asarray(rng.normal(size=(2, 7, 11)), jnp.float32)
    tables = jnp.cos(angles_BTJ), 1.5 * jnp.sin(angles_BTJ)

    def with_gradient(function):
        value, pull = jax.vjp(lambda x: function(x, tables), x_BTNH)
        return value, pull(g_BTNH)[0]

    found, expected = (jax.jit(lambda f=f: with_gradient(f))() for f in (apply_rope, xla_rope))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6), found, expected)


def test_the_kernel_of_rope_is_for_one_device():
    """The compiler cannot partition the call."""

    def text(x_BTNH):
        return jax.jit(lambda x, *tables: apply_rope(x, tables)).lower(x_BTNH, *tables).as_text()

    tables = jnp.ones((8, 7, 11)), jnp.ones((8, 7, 11))
    assert text(jnp.ones((8, 7, 3, 22))).count("gptoss_jax.Rope") == 1
    with jax.set_mesh(make_mesh(MeshConfig(data=8), jax.devices()[:8])):
        assert "gptoss_jax.Rope" not in text(jnp.ones((8, 7, 3, 22)))


@pytest.mark.parametrize(
    ("equation", "x_shape", "w_shapes"),
    [
        ("BTD,DNH->BTNH", (2, 5, 37), ((37, 3, 7), (37, 1, 40))),
        ("BTNH,NHD->BTD", (2, 5, 3, 7), ((3, 7, 33),)),
        ("BTD,DE->BTE", (1, 3, 19), ((19, 4),)),
    ],
)
def test_dense_matmuls_and_gradients_equal_xla(equation, x_shape, w_shapes):
    rng = np.random.default_rng(0)
    x, *weights = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in (x_shape, *w_shapes))

    @functools.partial(jax.jit, static_argnums=0)
    def run(kernels, x, weights):
        def loss(x, weights):
            # As in the model, where the choice of kernels ends before the backward pass is traced.
            with selection.using(kernels):
                results = sharded_einsum(equation, x, weights)
            return sum(jnp.sum(jnp.sin(y)) for y in results)

        return jax.value_and_grad(loss, (0, 1))(x, weights)

    fast, plain = (run.lower(kernels, x, weights).as_text() for kernels in ("required", "plain"))
    assert "GroupedMatmulWeightGrad" in fast and "dot_general" not in fast
    assert "gptoss_jax." not in plain
    found, expected = (run(kernels, x, weights) for kernels in ("required", "plain"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)
