"""The training step: accumulation, loss weights, frozen parameters, nonfinite steps, and meshes."""

import contextlib
import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptoss_jax.config import (
    SLIDING,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RopeScaling,
    TrainConfig,
)
from gptoss_jax.model.parameters import merge_params, path_names, split_params
from gptoss_jax.model.transformer import abstract_params, bind, segment_positions
from gptoss_jax.parallel.mesh import make_mesh
from gptoss_jax.parallel.rules import batch_sharding
from gptoss_jax.training.objectives import LANGUAGE_MODELING, Objective
from gptoss_jax.training.optimizer import make_schedule
from gptoss_jax.training.state import abstract_state, create_state
from gptoss_jax.training.step import make_eval_step, make_train_step

B, T = 8, 13

CONFIG = TrainConfig(
    # Sizes that are divisible by the mesh axes below.
    model=ModelConfig(
        vocab_size=98,
        hidden_size=24,
        intermediate_size=36,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=10,
        num_local_experts=8,
        num_experts_per_tok=3,
        sliding_window=4,
        layer_types=(SLIDING,) * 2,  # one block, stacked twice: half the compilation
        rope_theta=1000.0,
        rope_scaling=RopeScaling(factor=8.0, beta_fast=2.0, original_max_position_embeddings=24),
        router_aux_loss_coef=0.02,
        router_z_loss_coef=0.01,
        compute_dtype="float32",
    ),
    data=DataConfig(seq_len=T, batch_size=B),
    # With a large epsilon, updates are proportional to gradients, so wrong gradients show.
    optim=OptimConfig(learning_rate=0.05, warmup_steps=0, epsilon=0.1, max_grad_norm=0.5),
    steps=20,
)


def make_batch(seed=0):
    """Returns rows of one to three documents and padding, with different numbers of tokens."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 98, (B, T + 1))
    cuts = np.sort(rng.integers(0, T + 1, (B, 3)), axis=1)
    segments = 1 + (np.arange(T) >= cuts[:, :1]) + (np.arange(T) >= cuts[:, 1:2])
    segments = np.where(np.arange(T) >= np.maximum(cuts[:, 2:], 3), 0, segments)
    assert len(set((segments > 0).sum(axis=1))) > 3
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": segments}
    batch = {name: jnp.asarray(value, jnp.int32) for name, value in batch.items()}
    return batch | {"positions": segment_positions(batch["segment_ids"])}


@functools.cache
def start_params():
    """Returns parameters that give steep logits; none are zero."""
    rng = np.random.default_rng(5)

    def one(path, leaf):
        name = path_names(path)[-1]
        return ((name == "scale") + 0.3 * rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(one, abstract_params(CONFIG.model))


def on_host(tree):
    return jax.tree.map(np.array, tree)


@functools.cache
def start_state():
    """Returns a new state with those parameters, on the host."""
    state = create_state(CONFIG, make_mesh(MeshConfig(data=1), jax.devices()[:1]))
    return dataclasses.replace(on_host(state), params=start_params())


def start():
    return jax.tree.map(jnp.array, start_state())


train_step_of = functools.cache(make_train_step)


def take_steps(config, mesh, batches):
    """Returns the metrics of each step and the last state, on the host; without a mesh, on one device."""
    if mesh is None:
        state, put = start(), lambda batch: batch
    else:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
        state = jax.device_put(start_state(), shardings)
        put = functools.partial(jax.device_put, device=batch_sharding(mesh))
    step, all_metrics = train_step_of(config), []
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        for batch in batches:
            state, metrics = step(state, put(batch))
            all_metrics.append(on_host(metrics))
    return all_metrics, on_host(state)


@pytest.fixture(scope="module")
def single():
    """Two steps on one device."""
    return take_steps(CONFIG, None, [make_batch(0), make_batch(1)])


@pytest.fixture(scope="module")
def train_step():
    return train_step_of(CONFIG)


def test_every_parameter_is_updated(single):
    (first, second), state = single
    assert state.step == 2 and state.skipped == 0
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.params, start_params())
    for path, value in jax.tree_util.tree_leaves_with_path(moved):
        assert value > 1e-5, path
    assert first["tokens"] == int((make_batch(0)["segment_ids"] > 0).sum())
    assert first["grad_norm"] > CONFIG.optim.max_grad_norm
    assert first["learning_rate"] == pytest.approx(0.05)
    assert second["learning_rate"] < 0.05
    assert first["expert_load"].shape == (2, 8)
    np.testing.assert_allclose(first["expert_load"].sum(axis=1), 1, rtol=1e-5)
    assert first["load_balance_loss"] > 1 and first["router_z_loss"] > 0
    assert {first[name].dtype for name in ("loss", "grad_norm", "learning_rate")} == {np.dtype("float32")}


def test_training_on_one_batch_lowers_the_loss(train_step):
    state, losses = start(), []
    for _ in range(12):
        state, metrics = train_step(state, make_batch(0))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.3


def without_router_losses(grad_accum_steps):
    # The load-balance loss is not a mean over tokens: microbatches give a slightly different one.
    model = dataclasses.replace(CONFIG.model, router_aux_loss_coef=0.0, router_z_loss_coef=0.0)
    optim = dataclasses.replace(CONFIG.optim, grad_accum_steps=grad_accum_steps)
    return dataclasses.replace(CONFIG, model=model, optim=optim)


@pytest.fixture(scope="module")
def whole():
    return take_steps(without_router_losses(1), None, [make_batch(0)])


@pytest.mark.parametrize(
    ("grad_accum_steps", "mesh"),
    [
        (4, None),
        (2, MeshConfig(data=2, expert=2, tensor=2)),
        (2, MeshConfig(data=1, fsdp=2, context=2, expert=2)),
    ],
)
def test_gradient_accumulation_matches_the_whole_batch(whole, grad_accum_steps, mesh):
    (expected,), expected_state = whole
    batch = make_batch(0)
    if mesh is not None and mesh.context > 1:
        # The context axis splits sequences of 16 tokens, with padding.
        batch = {name: jnp.pad(rows, ((0, 0), (0, 16 - T))) for name, rows in batch.items()}
    mesh = None if mesh is None else make_mesh(mesh)
    (metrics,), state = take_steps(without_router_losses(grad_accum_steps), mesh, [batch])
    for key in ("loss", "grad_norm", "tokens", "learning_rate"):
        np.testing.assert_allclose(metrics[key], expected[key], rtol=2e-5, err_msg=key)
    chex.assert_trees_all_close(state.params, expected_state.params, rtol=1e-5, atol=1e-5)
    # The first moment is the gradient times 0.1.
    chex.assert_trees_all_close(state.opt_state, expected_state.opt_state, rtol=1e-4, atol=1e-6)


def test_state_is_sharded_by_its_letters():
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    state = create_state(CONFIG, mesh)
    abstract = abstract_state(CONFIG, mesh)
    jax.tree.map(lambda a, s: chex.assert_equal(a.sharding, s.sharding), abstract, state)
    gate_up = state.params["blocks"]["0"]["moe"]["gate_up"]
    assert gate_up.shape == (2, 8, 24, 2, 36)
    assert {shard.data.shape for shard in gate_up.addressable_shards} == {(2, 4, 12, 2, 18)}
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == gate_up.shape]
    assert len(moments) == 2
    assert all(leaf.sharding == gate_up.sharding for leaf in moments)
    query = state.params["blocks"]["0"]["attention"]["q"]
    assert {shard.data.shape for shard in query.addressable_shards} == {(2, 6, 3, 10)}
    # The same values as on one device, up to rounding.
    alone = create_state(CONFIG, make_mesh(MeshConfig(data=1), jax.devices()[:1]))
    chex.assert_trees_all_close(on_host(state.params), on_host(alone.params), atol=1e-7)


def test_an_axis_that_does_not_divide_a_parameter_is_named():
    expected = r"mesh\.tensor is 4: must divide 2, a size of attention\.k; valid sizes: 1, 2$"
    with pytest.raises(ValueError, match=expected):
        create_state(CONFIG, make_mesh(MeshConfig(tensor=4)))


@pytest.mark.parametrize("where", ["params", "gradient"])
def test_a_nonfinite_step_changes_nothing_and_is_counted(train_step, where):
    state = start()
    state, _ = train_step(state, make_batch(0))
    good = on_host(state)
    bad_params = jax.tree.map(np.array, good.params)
    if where == "params":
        bad_params["final_norm"]["scale"][3] = np.inf
    else:
        # Weights so large that squares overflow, but only in the backward pass.
        bad_params["head"]["weight"] *= np.float32(1e37)
    state = dataclasses.replace(state, params=jax.tree.map(jnp.asarray, bad_params))
    for count in (1, 2):
        state, metrics = train_step(state, make_batch(count))
        assert not (np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"]))
        assert int(state.skipped) == int(state.skipped_in_a_row) == count
        assert int(metrics["skipped"]) == int(metrics["skipped_in_a_row"]) == count
        assert int(state.step) == 1 + count
        chex.assert_trees_all_equal(on_host(state.params), bad_params)
        chex.assert_trees_all_equal(on_host(state.opt_state), good.opt_state)
    # With finite parameters again, the next step is what the skipped one would have been.
    state = dataclasses.replace(state, params=jax.tree.map(jnp.asarray, good.params))
    state, metrics = train_step(state, make_batch(1))
    assert int(state.skipped) == 2 and int(state.skipped_in_a_row) == 0
    assert int(state.step) == 4
    schedule = make_schedule(CONFIG.optim, CONFIG.steps)
    assert float(metrics["learning_rate"]) == pytest.approx(float(schedule(1)), rel=1e-6)


def test_training_continues_exactly_after_a_nonfinite_step(train_step, single):
    state, _ = train_step(start(), make_batch(0))
    kept = on_host(state)
    bad = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), state.params)
    state, _ = train_step(dataclasses.replace(state, params=bad), make_batch(2))
    state, _ = train_step(
        dataclasses.replace(state, params=jax.tree.map(jnp.asarray, kept.params)), make_batch(1)
    )
    chex.assert_trees_all_close(on_host(state.params), single[1].params, rtol=1e-6, atol=1e-6)


def test_state_is_donated(train_step):
    state = start()
    new, _ = train_step(state, make_batch(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.opt_state)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))


def test_a_batch_of_only_padding(train_step):
    batch = make_batch(0)
    batch["segment_ids"] = jnp.zeros_like(batch["segment_ids"])
    state, metrics = train_step(start(), batch)
    assert int(metrics["tokens"]) == 0 and float(metrics["loss"]) == 0
    assert int(state.skipped) == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(on_host(state.params)))


def test_evaluation_matches_training(single):
    batch = make_batch(0)
    sums, weight = make_eval_step(CONFIG.model)(start_params(), batch)
    assert sums.keys() == {"loss"} and float(weight) == int((batch["segment_ids"] > 0).sum())
    assert float(sums["loss"] / weight) == pytest.approx(float(single[0][0]["loss"]), rel=1e-5)


def loss_of(params, batch):
    """-log p of each target, float64 [B, T]."""
    logits = bind(CONFIG.model, params)(batch["tokens"], batch["segment_ids"], batch["positions"])
    log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
    return -np.take_along_axis(log_p, np.asarray(batch["targets"])[..., None], axis=-1)[..., 0]


def test_loss_weights_scale_the_loss_of_targets(train_step):
    batch = make_batch(0)
    weights = np.random.default_rng(3).choice([0.0, 0.25, 1.0], (B, T)) * np.asarray(batch["segment_ids"] > 0)
    assert {0.0, 0.25, 1.0} == set(weights[np.asarray(batch["segment_ids"]) > 0])
    batch["loss_weights"] = jnp.asarray(weights, jnp.float32)
    expected = (loss_of(start_params(), batch) * weights).sum() / weights.sum()
    state, metrics = train_step(start(), batch)
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-5)
    assert int(metrics["tokens"]) == int((batch["segment_ids"] > 0).sum())
    sums, weight = make_eval_step(CONFIG.model)(start_params(), batch)
    assert float(weight) == weights.sum()
    assert float(sums["loss"] / weight) == pytest.approx(expected, rel=1e-5)
    # A target of weight 0 has no effect; scaling all weights has none, either.
    batch["targets"] = jnp.where(weights == 0, -100, batch["targets"])
    other, _ = train_step(start(), batch)
    chex.assert_trees_all_equal(on_host(other), on_host(state))
    doubled, metrics = train_step(start(), batch | {"loss_weights": 2 * batch["loss_weights"]})
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-5)
    chex.assert_trees_all_close(on_host(doubled.params), on_host(state.params), rtol=1e-5, atol=1e-6)


def test_microbatches_count_by_the_sum_of_their_loss_weights():
    config, batch = without_router_losses(4), make_batch(0)
    # In the second microbatch, every fourth row, only one target is trained.
    weights = np.array(batch["segment_ids"] > 0, np.float32)
    weights[1::4] = 0
    weights[1, 0] = 1
    batch["loss_weights"] = jnp.asarray(weights)
    (metrics,), _ = take_steps(config, None, [batch])
    expected = (loss_of(start_params(), batch) * weights).sum() / weights.sum()
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-5)


def is_router(path):
    return path[-1] in ("router", "router_bias")


@pytest.mark.parametrize(
    ("optim", "mesh"),
    [
        ({}, None),
        pytest.param({"name": "muon", "grad_accum_steps": 2}, None, marks=pytest.mark.slow),
        ({}, MeshConfig(data=1, fsdp=2, expert=2, tensor=2)),
    ],
)
def test_only_the_router_is_trained(optim, mesh):
    config = dataclasses.replace(CONFIG, optim=dataclasses.replace(CONFIG.optim, **optim))
    mesh = make_mesh(mesh or MeshConfig(data=1), None if mesh else jax.devices()[:1])
    batch = jax.device_put(make_batch(0), batch_sharding(mesh))
    with jax.set_mesh(mesh):
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh).params)
        params = jax.device_put(start_params(), shardings)
        trainable, frozen = split_params(params, is_router)
        shapes = [leaf.shape for leaf in jax.tree.leaves(trainable)]
        state, abstract = create_state(config, mesh, trainable), abstract_state(config, mesh, is_router)
        jax.tree.map(lambda a, s: chex.assert_equal(a.sharding, s.sharding), abstract, state)
        step = make_train_step(config)
        for _ in range(2):
            state, metrics = step(state, batch, frozen)
        whole_state = create_state(config, mesh, jax.device_put(start_params(), shardings))
        _, whole_metrics = step(whole_state, batch)
    # Two moments for each of the two parameters, besides counters and constants.
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape in shapes]
    assert len(shapes) == 2 and len(moments) == 4
    assert all(leaf.ndim < 2 for leaf in jax.tree.leaves(state.opt_state) if leaf.shape not in shapes)
    # Frozen parameters are neither donated nor changed; the gradient norm is that of the router only.
    after = on_host(merge_params(state.params, frozen))
    for path, before in jax.tree_util.tree_leaves_with_path(start_params()):
        changed = not np.array_equal(before, leaf_at(after, path))
        assert changed == is_router(path_names(path)), path
    assert int(state.step) == 2 and float(metrics["grad_norm"]) < float(whole_metrics["grad_norm"])


def leaf_at(tree, path):
    return functools.reduce(lambda node, name: node[name], path_names(path), tree)


def test_selecting_no_parameter_is_an_error():
    with pytest.raises(ValueError, match="selects no parameter"):
        split_params(start_params(), lambda path: False)


def test_another_objective():
    def sums(model, batch, **options):
        sums, stats = LANGUAGE_MODELING.sums(model, batch, **options)
        return {"loss": 3 * sums["loss"], "nats": sums["loss"]}, stats

    objective = Objective(sums, weight=lambda batch: 2 * LANGUAGE_MODELING.weight(batch))
    config = without_router_losses(2)
    _, metrics = make_train_step(config, objective)(start(), make_batch(0))
    evaluated, weight = make_eval_step(config.model, objective)(start_params(), make_batch(0))
    expected = loss_of(start_params(), make_batch(0))[np.asarray(make_batch(0)["segment_ids"]) > 0].mean()
    for found in (metrics, {name: total / weight for name, total in evaluated.items()}):
        assert float(found["loss"]) == pytest.approx(1.5 * expected, rel=1e-5)
        assert float(found["nats"]) == pytest.approx(0.5 * expected, rel=1e-5)


def test_large_gradients_are_clipped(single):
    (metrics,), state = take_steps(CONFIG, None, [make_batch(0)])
    assert metrics["grad_norm"] == single[0][0]["grad_norm"] > 1
    # Adam's first moment is then a tenth of the clipped gradient, whose norm is the limit.
    mean = optax.tree.get(state.opt_state, "mu")
    assert float(optax.tree.norm(mean)) == pytest.approx(0.1 * 0.5, rel=1e-5)
