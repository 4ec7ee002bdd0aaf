"""Context parallelism: meshes that split each sequence train like one device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.params import assert_close

from gptoss_jax.config import DataConfig, MeshConfig, ModelConfig, OptimConfig, RopeScaling, TrainConfig
from gptoss_jax.evaluation.logprobs import token_logprobs
from gptoss_jax.kernels.attention.reference import AttentionSpec, attention_mask, reference_attention
from gptoss_jax.model.kv_cache import init_cache
from gptoss_jax.model.parameters import path_names
from gptoss_jax.model.transformer import abstract_params, bind, segment_positions
from gptoss_jax.parallel.context import (
    check_length,
    context_attention,
    join_sequences,
    split_sequences,
)
from gptoss_jax.parallel.linear import shard_map_heads
from gptoss_jax.parallel.mesh import batch_shards, make_mesh
from gptoss_jax.parallel.rules import batch_sharding
from gptoss_jax.parallel.vocabulary import _lookup, split_head
from gptoss_jax.training.objectives import LANGUAGE_MODELING
from gptoss_jax.training.setup import check_devices
from gptoss_jax.training.state import abstract_state, create_state
from gptoss_jax.training.step import make_eval_step, make_train_step

# Chunks of 5 to 20 tokens: the window of 5 crosses every cut.
B, T, D = 4, 80, 48
# With the small vocabulary, the tables are gathered; with the large one, tokens are exchanged.
V, LARGE_V = 104, 1040

CONFIG = TrainConfig(
    model=ModelConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=28,
        num_hidden_layers=2,  # a sliding one, and a full one
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=18,
        num_local_experts=6,
        num_experts_per_tok=3,
        sliding_window=5,
        rope_theta=1000.0,
        rope_scaling=RopeScaling(factor=8.0, beta_fast=2.0, original_max_position_embeddings=24),
        router_aux_loss_coef=0.02,
        router_z_loss_coef=0.01,
        compute_dtype="float32",
    ),
    data=DataConfig(seq_len=T, batch_size=B),
    # With a large epsilon, updates are proportional to gradients, so wrong gradients show.
    optim=OptimConfig(learning_rate=0.01, warmup_steps=0, epsilon=0.05, max_grad_norm=0.0),
    steps=20,
)

MESHES = {
    "context 8": MeshConfig(data=1, context=8),
    "fsdp 2 x context 2 x expert 2": MeshConfig(data=1, fsdp=2, context=2, expert=2),
    "context 4 x tensor 2": MeshConfig(data=1, context=4, tensor=2),
    "data 2 x context 4": MeshConfig(data=2, context=4),
    "fsdp 4 x context 2": MeshConfig(data=1, fsdp=4, context=2),
    "context 4 x expert 2": MeshConfig(data=1, context=4, expert=2),
    "context 2 x expert 2 x tensor 2": MeshConfig(data=1, context=2, expert=2, tensor=2),
}
QUICK = ("context 8", "fsdp 2 x context 2 x expert 2", "context 4 x tensor 2")


def with_vocabulary(size):
    return dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, vocab_size=size))


def make_batch(vocab_size=V):
    """Returns rows of one to three documents, which span the cuts, and some padding."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocab_size, (B, T + 1))
    starts = np.array([[80, 80], [13, 61], [39, 40], [3, 80]])
    segments = 1 + np.sum(np.arange(T) >= starts[:, :, None], axis=1)
    segments = np.where(np.arange(T) < np.array([[80], [77], [80], [48]]), segments, 0)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": segments}
    batch = {name: jnp.asarray(value, jnp.int32) for name, value in batch.items()}
    weights = rng.uniform(0.5, 1.5, (B, T)) * (segments > 0)
    return batch | {
        "positions": segment_positions(batch["segment_ids"]),
        "loss_weights": jnp.asarray(weights, jnp.float32),
    }


def start_params(config=CONFIG):
    """Returns random parameters, even norms, biases and sinks, and a router with clear decisions."""
    rng = np.random.default_rng(7)

    def one(path, leaf):
        name = path_names(path)[-1]
        spread = 0.5 if name in ("router", "router_bias", "sinks") else 0.15
        return ((name == "scale") + spread * rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(one, abstract_params(config.model))


def run(mesh_config, vocab_size):
    """Returns metrics and gradients of a step, and parameters and second moments after another one."""
    config = with_vocabulary(vocab_size)
    mesh = make_mesh(mesh_config or MeshConfig(data=1), None if mesh_config else jax.devices()[:1])
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
    params = jax.device_put(start_params(config), shardings.params)
    batch = jax.device_put(make_batch(vocab_size), batch_sharding(mesh))
    with jax.set_mesh(mesh):
        state, step = create_state(config, mesh, params), make_train_step(config)
        state, metrics = step(state, batch)
        # AdamW's first moment is then a tenth of the gradient.
        gradients = jax.device_get(optax.tree.get(state.opt_state, "mu"))
        state, _ = step(state, batch)
    moments = optax.tree.get(state.opt_state, "nu")
    return jax.device_get((metrics, gradients, state.params, moments))


@functools.cache
def one_device(vocab_size):
    return run(None, vocab_size)


def check_training(mesh_config, vocab_size):
    """Asserts that training on a mesh equals that on one device."""
    metrics, *found = run(mesh_config, vocab_size)
    expected, *expected_trees = one_device(vocab_size)
    assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert metrics.keys() == expected.keys()
    for key in expected:
        np.testing.assert_allclose(metrics[key], expected[key], rtol=1e-4, atol=1e-6, err_msg=key)
    for tree, expected_tree, tolerance in zip(found, expected_trees, (1e-5, 1e-5, 2e-5), strict=True):
        assert_close(tree, expected_tree, tolerance)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MESHES]
)
def test_every_mesh_trains_like_one_device(name):
    check_training(MESHES[name], V)


@pytest.mark.parametrize("name", ["context 8", "fsdp 2 x context 2 x expert 2"])
def test_training_exchanges_the_tokens_of_a_large_vocabulary(name):
    mesh = make_mesh(MESHES[name])
    axes = {axis for axis, size in mesh.shape.items() if size > 1}
    stored = abstract_state(with_vocabulary(LARGE_V), mesh).params["head"]["weight"].sharding.spec
    with jax.set_mesh(mesh):
        for size, is_exchanged in ((V, False), (LARGE_V, True)):
            head = split_head((stored,), size, B * T // batch_shards(mesh.shape))
            assert (set(head.exchanged) == axes) == is_exchanged
            lookup = _lookup((size, D), B * T, jnp.dtype("float32"))
            rows = tuple(axes & {"expert"})
            assert (lookup.exchanged, lookup.gathered) == ((rows, ()) if is_exchanged else ((), rows))
            assert set(lookup.columns) == axes - {"expert"}
    check_training(MESHES[name], LARGE_V)


def test_each_device_has_an_early_and_a_late_chunk():
    mesh = make_mesh(MeshConfig(data=2, context=4))
    tokens = jnp.arange(32).reshape(2, 16)
    with jax.set_mesh(mesh):
        rows = jax.jit(split_sequences)({"tokens": tokens})["tokens"]
        joined = jax.jit(join_sequences)(rows)
    expected = [[0, 1, 14, 15], [2, 3, 12, 13], [4, 5, 10, 11], [6, 7, 8, 9]]
    np.testing.assert_array_equal(rows, np.concatenate([np.array(expected), 16 + np.array(expected)]))
    assert rows.sharding.shard_shape(rows.shape) == (1, 4)
    np.testing.assert_array_equal(joined, tokens)
    assert joined.sharding.shard_shape(joined.shape) == (1, 16)
    # On one device, and on a mesh without the axis, rows are sequences.
    assert split_sequences(tokens) is tokens and join_sequences(tokens) is tokens


@pytest.mark.parametrize(
    "spec",
    # Chunks have 10 tokens: the last window reaches into the chunk before the previous one.
    [AttentionSpec(window) for window in (None, 1, 5, 11, 12)] + [AttentionSpec(5, 2)],
    ids=str,
)
def test_attention_to_whole_sequences(spec):
    rng = np.random.default_rng(3)
    q, k, v, d_out = (jnp.asarray(rng.standard_normal((B, T, n, 6)), jnp.float32) for n in (4, 2, 2, 4))
    sinks = jnp.asarray(rng.standard_normal(4), jnp.float32)
    ids, positions = (make_batch()[name] for name in ("segment_ids", "positions"))

    def results(attend):
        out, vjp = jax.vjp(attend, q, k, v, sinks)
        return out, *vjp(d_out)

    @jax.jit
    def split(q, k, v, sinks):
        *heads, rows, places = split_sequences((q, k, v, ids, positions))
        return join_sequences(
            shard_map_heads(
                lambda q, k, v, sinks, key, *tokens: context_attention(
                    q, k, v, *tokens, spec, sinks_N=sinks, dropout_key=key
                ),
                tuple(heads), sinks, None, rows, places,
            )
        )  # fmt: skip

    mask = attention_mask(ids, positions, spec)
    plain = results(lambda q, k, v, sinks: reference_attention(q, k, v, mask, sinks_N=sinks))
    with jax.set_mesh(make_mesh(MeshConfig(data=1, context=4, tensor=2))):
        found = results(split)
    for name, f, p in zip(("out", "dq", "dk", "dv", "ds"), found, plain, strict=True):
        np.testing.assert_allclose(f, p, rtol=0, atol=1e-5 * np.abs(p).max(), err_msg=name)


def test_dropout_differs_between_chunks_and_devices():
    mesh = make_mesh(MeshConfig(data=1, context=4, tensor=2))
    values, ids, positions = jnp.ones((1, 16, 2, 3)), jnp.ones((1, 16), jnp.int32), jnp.arange(16)[None]
    # Each token sees only itself, and is kept or dropped.
    spec = AttentionSpec(1, dropout=0.5)

    @jax.jit
    def attend(key):
        x, *rows = split_sequences((values, ids, positions))
        return join_sequences(
            shard_map_heads(
                lambda q, k, v, sinks, key, *tokens: context_attention(
                    q, k, v, *tokens, spec, dropout_key=key
                ),
                (x, x, x), None, key, *rows,
            )
        )  # fmt: skip

    with jax.set_mesh(mesh):
        # One program at a time: many at once would exhaust the threads of simulated devices.
        kept = np.stack([np.asarray(attend(jax.random.key(seed)))[0, :, :, 0] > 0 for seed in range(16)])
    patterns = kept.reshape(16, 8, 2 * 2).transpose(1, 0, 2).reshape(8, -1)
    assert 0.4 < kept.mean() < 0.6
    assert len({tuple(pattern) for pattern in patterns}) == 8


def test_scores_and_logits_of_any_length():
    # 77 tokens are padded to 80.
    mesh, batch = make_mesh(MeshConfig(data=1, fsdp=2, context=4)), make_batch()
    batch = {name: batch[name][:, :77] for name in ("tokens", "targets", "segment_ids")}
    expected = token_logprobs(CONFIG.model, start_params(), batch)
    logits = jax.jit(lambda params: bind(CONFIG.model, params)(batch["tokens"]))
    expected_logits = logits(start_params())
    with jax.set_mesh(mesh):
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(CONFIG, mesh)).params
        params = jax.device_put(start_params(), shardings)
        found, found_logits = token_logprobs(CONFIG.model, params, batch), logits(params)
        with pytest.raises(ValueError, match="positions_BT is None: must be given if mesh.context splits"):
            bind(CONFIG.model, params).hidden_states(batch["tokens"])
    is_real = np.asarray(batch["segment_ids"]) > 0
    np.testing.assert_allclose(found[0][is_real], expected[0][is_real], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found[1][is_real], expected[1][is_real])
    np.testing.assert_allclose(found_logits, expected_logits, rtol=0, atol=1e-4)


def test_an_evaluation_of_any_length():
    # 77 tokens are padded to 80.
    mesh, eval_step = make_mesh(MeshConfig(data=1, fsdp=2, context=4)), make_eval_step(CONFIG.model)
    batch = {name: rows[:, :77] for name, rows in make_batch().items()}
    sums, weight = eval_step(start_params(), batch)
    with jax.set_mesh(mesh):
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(CONFIG, mesh)).params
        found, found_weight = eval_step(
            jax.device_put(start_params(), shardings), jax.device_put(batch, batch_sharding(mesh))
        )
    assert found.keys() == sums.keys() == {"loss"}
    np.testing.assert_allclose(found["loss"], sums["loss"], rtol=1e-5)
    np.testing.assert_allclose(found_weight, weight, rtol=1e-6)


def test_an_objective_of_whole_sequences_is_refused():
    objective = dataclasses.replace(LANGUAGE_MODELING, is_per_token=False)
    mesh, batch = make_mesh(MeshConfig(data=2, context=4)), make_batch()
    with jax.set_mesh(mesh):
        for step, state in (
            (make_train_step(CONFIG, objective), abstract_state(CONFIG, mesh)),
            (make_eval_step(CONFIG.model, objective), abstract_state(CONFIG, mesh).params),
        ):
            with pytest.raises(ValueError, match="^mesh.context is 4: must be 1: the objective needs whole"):
                step.lower(state, batch)


def test_prefill_splits_each_prompt():
    """Two chunks of 16 tokens for each of two prompts, one of them padded; the window's ring wraps around."""
    tokens, counts = make_batch()["tokens"][:2, :32], jnp.array([[32], [27]])
    ids = (jnp.arange(32) < counts).astype(jnp.int32)

    @jax.jit
    def run(params):
        model, cache, outs = bind(CONFIG.model, params), init_cache(CONFIG.model, 2, 64, jnp.float32), []
        for chunk in (slice(16), slice(16, 32)):
            hidden, cache, _ = model.hidden_states(tokens[:, chunk], ids[:, chunk], cache=cache)
            outs.append(hidden)
        return jnp.where(ids[..., None] > 0, jnp.concatenate(outs, axis=1), 0), cache

    expected = run(start_params())
    mesh = make_mesh(MeshConfig(data=1, context=4, tensor=2))
    with jax.set_mesh(mesh):
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(CONFIG, mesh)).params
        params = jax.device_put(start_params(), shardings)
        found, text = run(params), run.lower(params).compile().as_text()
    jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, rtol=1e-4, atol=1e-4), found, expected)
    # A device has the queries of 4 of 16 tokens of both prompts, and half of the heads.
    assert "f32[2,4,4,18]" in text and "f32[2,16,4,18]" not in text


def test_lengths_that_cannot_be_split_are_rejected():
    message = r"^data.seq_len is 84: must be a multiple of 16, twice mesh.context \(8\)$"
    with pytest.raises(ValueError, match=message):
        check_length(84, 8)
    check_length(83, 1)
    config = dataclasses.replace(CONFIG, data=DataConfig(seq_len=84, batch_size=B))
    with pytest.raises(ValueError, match=message):
        check_devices(config, make_mesh(MeshConfig(data=1, context=8)))
    # The context axis does not split the batch.
    check_devices(CONFIG, make_mesh(MeshConfig(data=2, context=4)))
    mesh, message = make_mesh(MeshConfig(data=4, context=2)), "batch size is 6: must be a multiple of 4"
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=message):
        split_sequences(jnp.zeros((6, 8)))
    message = "^sequence length is 10: must be a multiple of 4, twice mesh.context"
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=message):
        split_sequences(jnp.zeros((8, 10)))
