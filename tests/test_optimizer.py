"""Optimizers: learning-rate schedules, weight decay, clipping and Muon."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.config import (
    OptimConfig,
)
from gptoss_jax.model.parameters import path_names
from gptoss_jax.model.transformer import abstract_params
from gptoss_jax.training.optimizer import decay_mask, make_optimizer, make_schedule, muon_dimensions


def test_decay_mask(tiny_config):
    mask = decay_mask(abstract_params(tiny_config))
    block = {
        "attention": {
            "q": True, "k": True, "v": True, "out": True, "sinks": False,
            "q_bias": False, "k_bias": False, "v_bias": False, "out_bias": False,
        },
        "attention_norm": {"scale": False},
        "moe": {
            "router": True, "gate_up": True, "down": True,
            "router_bias": False, "gate_up_bias": False, "down_bias": False,
        },
        "moe_norm": {"scale": False},
    }  # fmt: skip
    assert mask == {
        "embedding": {"weight": True},
        "head": {"weight": True},
        "final_norm": {"scale": False},
        "blocks": {"0": block, "1": block},
    }


def schedule_values(steps, **options):
    schedule = make_schedule(OptimConfig(learning_rate=1.0, **options), steps)
    return [float(schedule(step)) for step in range(steps)]


def test_cosine_by_hand():
    found = schedule_values(9, warmup_steps=4, min_lr_ratio=0.2)
    fall = [0.2 + 0.8 * (1 + math.cos(math.pi * i / 4)) / 2 for i in range(5)]
    np.testing.assert_allclose(found, [0.25, 0.5, 0.75, 1.0, *fall], rtol=1e-6)
    assert fall[-1] == pytest.approx(0.2)


def test_wsd_by_hand():
    found = schedule_values(12, schedule="wsd", warmup_steps=2, decay_fraction=0.25, min_lr_ratio=0.1)
    np.testing.assert_allclose(found, [0.5, *[1.0] * 8, 0.7, 0.4, 0.1], rtol=1e-6)


def test_constant_by_hand():
    found = schedule_values(6, schedule="constant", warmup_steps=2, min_lr_ratio=0.1)
    np.testing.assert_allclose(found, [0.5, 1.0, 1.0, 1.0, 1.0, 1.0], rtol=1e-6)
    assert schedule_values(2, schedule="constant", warmup_steps=0) == [1.0, 1.0]


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
def test_schedules_at_the_edges(kind):
    found = schedule_values(5, schedule=kind, warmup_steps=0, min_lr_ratio=0.0, decay_fraction=1.0)
    assert found[0] == 1.0 and found[-1] == pytest.approx(0.0, abs=1e-7)
    assert found == sorted(found, reverse=True)
    # Warmup is shortened to the length of the run.
    found = schedule_values(4, schedule=kind, warmup_steps=100)
    np.testing.assert_allclose(found[:3], [1 / 3, 2 / 3, 1.0], rtol=1e-6)
    assert schedule_values(1, schedule=kind, warmup_steps=100) == [1.0]


def first_update(gradient, **options):
    """Returns the update of a 2 in a matrix and of a 2 in a norm by the first step."""
    options = {"learning_rate": 0.1, "warmup_steps": 0, "epsilon": 1.0} | options
    optimizer = make_optimizer(OptimConfig(**options), 100)
    params = {"head": {"weight": jnp.full((1,), 2.0)}, "final_norm": {"scale": jnp.full((1,), 2.0)}}
    grads = {"head": {"weight": jnp.array([gradient[0]])}, "final_norm": {"scale": jnp.array([gradient[1]])}}
    updates, _ = optimizer.update(grads, optimizer.init(params), params, finite=True)
    return [float(updates["head"]["weight"][0]), float(updates["final_norm"]["scale"][0])]


def test_first_update_by_hand():
    # Norm 5, clipped to 1: gradients 0.6 and 0.8. Adam's first step is g / (g + epsilon); decay is 0.5 * 2.
    found = first_update((3.0, 4.0), weight_decay=0.5, max_grad_norm=1.0)
    np.testing.assert_allclose(found, [-0.1 * (0.6 / 1.6 + 1.0), -0.1 * 0.8 / 1.8], rtol=1e-5)


def test_gradients_are_not_clipped_below_the_limit_or_without_one():
    expected = [-0.1 * 3 / 4, -0.1 * 4 / 5]
    np.testing.assert_allclose(
        first_update((3.0, 4.0), weight_decay=0.0, max_grad_norm=5.5), expected, rtol=1e-5
    )
    np.testing.assert_allclose(
        first_update((3.0, 4.0), weight_decay=0.0, max_grad_norm=0.0), expected, rtol=1e-5
    )


def test_muon_updates_only_the_matrices_of_the_blocks(tiny_config):
    params = abstract_params(tiny_config)
    dimensions = muon_dimensions(params)["blocks"]["0"]
    chosen = {
        path_names(path)[-1]: (value.reduction_axis, value.output_axis)
        for path, value in jax.tree_util.tree_leaves_with_path(
            dimensions, is_leaf=lambda x: hasattr(x, "output_axis")
        )
    }
    assert chosen == {
        "q": ((-3,), (-2, -1)),  # D, N H
        "k": ((-3,), (-2, -1)),
        "v": ((-3,), (-2, -1)),
        "out": ((-3, -2), (-1,)),  # N H, D
        "gate_up": ((-3,), (-1,)),  # of E D 2 F: D, F
        "down": ((-2,), (-1,)),  # of E F D: F, D
    }
    assert muon_dimensions(params)["embedding"] == {"weight": None}


def test_muon_updates_are_nearly_orthogonal_and_as_large_as_those_of_adam():
    rate, D, F = 0.5, 24, 40
    config = OptimConfig(name="muon", learning_rate=rate, warmup_steps=0, weight_decay=0.0, max_grad_norm=0.0)
    rng = np.random.default_rng(0)
    grads = {
        "moe": {
            "gate_up": jnp.asarray(rng.normal(size=(3, D, 2, F)), jnp.float32),
            "router_bias": jnp.ones(5),
        }
    }
    params = jax.tree.map(jnp.zeros_like, grads)
    optimizer = make_optimizer(config, 10)
    updates, _ = optimizer.update(grads, optimizer.init(params), params, finite=True)
    update = np.asarray(updates["moe"]["gate_up"])[1, :, 0]
    singular = np.linalg.svd(update, compute_uv=False)
    assert singular.max() / singular.min() < 2  # that of the gradient is far above
    assert np.sqrt(np.mean(update**2)) == pytest.approx(0.2 * rate, rel=0.25)
    # AdamW's first step with Nesterov momentum: 1 + 0.9 * 0.1 / (1 - 0.9^2).
    np.testing.assert_allclose(updates["moe"]["router_bias"], -rate * 28 / 19, rtol=1e-4)
