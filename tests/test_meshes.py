"""Meshes of eight devices: training matches one device, however uneven the routing, and memory is shared."""

import collections as containers
import dataclasses
import functools
import math
import pathlib
import re

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
from gptoss_jax.config.preset import read_preset
from gptoss_jax.model.moe import SwiGLU, expert_outputs
from gptoss_jax.model.parameters import path_names
from gptoss_jax.model.transformer import abstract_params, segment_positions
from gptoss_jax.parallel import all_to_all, expert_parallel
from gptoss_jax.parallel.mesh import AXES, check_model, make_mesh
from gptoss_jax.parallel.rules import batch_sharding
from gptoss_jax.planning.hlo import collectives, shape_bytes
from gptoss_jax.training.state import abstract_state, create_state
from gptoss_jax.training.step import make_train_step

B, T, V, E = 8, 13, 104, 16

CONFIG = TrainConfig(
    model=ModelConfig(
        vocab_size=V,
        hidden_size=40,
        intermediate_size=28,
        num_hidden_layers=2,
        layer_types=(SLIDING,) * 2,  # one block, stacked twice: half the compilation
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=18,
        num_local_experts=E,
        num_experts_per_tok=3,
        sliding_window=5,
        rope_theta=1000.0,
        rope_scaling=RopeScaling(factor=8.0, beta_fast=2.0, original_max_position_embeddings=24),
        router_aux_loss_coef=0.02,
        router_z_loss_coef=0.01,
        compute_dtype="float32",
    ),
    data=DataConfig(seq_len=T, batch_size=B),
    # With a large epsilon, updates are proportional to gradients, so wrong gradients show. With small steps,
    # rounding errors do not grow until they flip a near tie of the router.
    optim=OptimConfig(learning_rate=5e-3, warmup_steps=2, epsilon=0.05, max_grad_norm=0.0),
    steps=20,
)

MESHES = {
    "data 8": MeshConfig(data=8),
    "fsdp 8": MeshConfig(data=1, fsdp=8),
    "expert 8": MeshConfig(data=1, expert=8),
    "tensor 4 x data 2": MeshConfig(data=2, tensor=4),
    "tensor 2 x data 4": MeshConfig(data=4, tensor=2),
    "fsdp 2 x expert 4": MeshConfig(data=1, fsdp=2, expert=4),
    "fsdp 4 x expert 2": MeshConfig(data=1, fsdp=4, expert=2),
    "data 2 x fsdp 4": MeshConfig(data=2, fsdp=4),
    "expert 2 x tensor 4": MeshConfig(data=1, expert=2, tensor=4),
    "fsdp 2 x tensor 4": MeshConfig(data=1, fsdp=2, tensor=4),
    "data 2 x expert 2 x tensor 2": MeshConfig(data=2, expert=2, tensor=2),
    "data 2 x fsdp 2 x expert 2": MeshConfig(data=2, fsdp=2, expert=2),
    "fsdp 2 x expert 2 x tensor 2": MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
}


def make_batch(seed, config=CONFIG):
    """Returns rows of one or two documents and some padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, config.model.vocab_size, (B, T + 1))
    ends = rng.integers(T - 4, T + 1, (B, 1))
    segments = 1 + (np.arange(T) >= rng.integers(1, T, (B, 1)))
    segments = np.where(np.arange(T) < ends, segments, 0)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": segments}
    batch = {name: jnp.asarray(value, jnp.int32) for name, value in batch.items()}
    return batch | {"positions": segment_positions(batch["segment_ids"])}


def start_params(config, router_bias=None):
    """Random parameters, even norms, biases and sinks, and a router with clear decisions."""
    rng = np.random.default_rng(7)

    def one(path, leaf):
        name = path_names(path)[-1]
        if name == "router_bias" and router_bias is not None:
            return np.broadcast_to(np.asarray(router_bias, np.float32), leaf.shape)
        spread = 0.5 if name in ("router", "router_bias", "sinks") else 0.15
        return ((name == "scale") + spread * rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(one, abstract_params(config.model))


@functools.cache
def alone_with(config, steps, router_bias):
    return run(config, None, steps, router_bias)


def run(config, mesh_config, steps, router_bias=None):
    """Returns the metrics of some steps, the gradients of the first, and the parameters after the last."""
    devices = jax.devices()[:1] if mesh_config is None else None
    mesh = make_mesh(mesh_config or MeshConfig(data=1), devices)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
    params = jax.device_put(start_params(config, router_bias), shardings.params)
    rows, gradients = [], None
    with jax.set_mesh(mesh):
        state, step = create_state(config, mesh, params), make_train_step(config)
        for seed in range(steps):
            state, metrics = step(state, jax.device_put(make_batch(seed % 4, config), batch_sharding(mesh)))
            rows.append(jax.device_get(metrics))
            if seed == 0:  # AdamW's first moment is then a tenth of the gradient
                gradients = jax.device_get(optax.tree.get(state.opt_state, "mu"))
    return rows, gradients, jax.device_get(state.params)


def furthest(found, expected):
    """Returns the largest difference in a leaf, relative to its largest value, and the name of that leaf."""
    worst = (0.0, "")
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        assert np.abs(b).max() > 0, path
        worst = max(worst, (float(np.abs(a - b).max() / np.abs(b).max()), ".".join(path_names(path))))
    return worst


@pytest.fixture(scope="module")
def alone():
    return run(CONFIG, None, 20)


# Together these use every axis; the other meshes are slow tests.
QUICK = ("data 8", "fsdp 8", "expert 8", "fsdp 2 x expert 2 x tensor 2")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MESHES]
)
def test_every_mesh_trains_like_one_device(alone, name):
    rows, gradients, params = run(CONFIG, MESHES[name], 20)
    expected_rows, expected_gradients, expected_params = alone
    assert rows[0]["loss"] == pytest.approx(expected_rows[0]["loss"], rel=1e-5)
    error, leaf = furthest(gradients, expected_gradients)
    assert error <= 1e-5, leaf
    assert all(expected_rows[16 + i]["loss"] < expected_rows[i]["loss"] - 0.02 for i in range(4))
    for row, expected in zip(rows, expected_rows, strict=True):
        assert row.keys() == expected.keys()
        for key in expected:
            np.testing.assert_allclose(row[key], expected[key], rtol=1e-4, atol=1e-6, err_msg=key)
    error, leaf = furthest(params, expected_params)
    assert error <= 1e-4, leaf


def uneven_config(**changes):
    model = dataclasses.replace(CONFIG.model, **changes)
    return dataclasses.replace(CONFIG, model=model)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MeshConfig(data=1, expert=8), MeshConfig(data=2, expert=2, tensor=2)])
@pytest.mark.parametrize(("favourites", "ragged"), [(1, True), (3, False)])
def test_no_token_is_dropped_when_all_go_to_one_device(monkeypatch, mesh, favourites, ragged):
    """The fullest device receives all rows of its group, in eight or two rounds of its buffer."""
    monkeypatch.setattr(all_to_all, "MIN_BUFFER_ROWS", 1)
    monkeypatch.setattr(all_to_all, "BUFFER_PERCENT", {"ragged": 100, "padded": 100})
    if ragged:
        monkeypatch.setattr(all_to_all, "has_ragged", lambda: True)
        monkeypatch.setattr(all_to_all, "ragged_all_to_all", all_to_all.reference_all_to_all)
    config = uneven_config(num_experts_per_tok=favourites, router_aux_loss_coef=0.0)
    bias = tuple(60.0 * (expert // 2 == 3) + 60.0 * (expert == 6) for expert in range(E))
    expected_rows, expected_gradients, _ = alone_with(config, 2, bias)
    load = expected_rows[0]["expert_load"][:, 6:8].sum(axis=1)
    np.testing.assert_allclose(load, 1.0 if favourites == 1 else 2 / 3, rtol=1e-6)
    rows, gradients, _ = run(config, mesh, 2, bias)
    for row, expected in zip(rows, expected_rows, strict=True):
        assert row["dropped"] == expected["dropped"] == 0
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)

    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(expected_gradients), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max(), rtol=0, err_msg=str(path))


@pytest.mark.parametrize("room", [1, 3, 16, 57, 200])
@pytest.mark.parametrize("transport", [all_to_all.RaggedAllToAll, all_to_all.PaddedAllToAll])
def test_any_buffer_size_gives_the_same_result(transport, room):
    """Four devices send rows to eight experts, some to none; compared with each row times its own
    matrices."""
    rows, width, n, experts = 29, 5, 4, 8
    swiglu = SwiGLU(1.702, 0.9, 1.0)
    rng = np.random.default_rng(room)
    mesh = make_mesh(MeshConfig(data=1, expert=n), jax.devices()[:n])
    sorted_experts = np.sort(rng.choice([0, 1, 1, 1, 5, 7, 8], (n, rows)), axis=1)
    counts = np.stack([np.bincount(row, minlength=experts + 1)[:experts] for row in sorted_experts])
    x = rng.standard_normal((n, rows, width)).astype(np.float32)
    parameters = {
        "gate_up": rng.standard_normal((experts, width, 2, 3)).astype(np.float32),
        "down": rng.standard_normal((experts, 3, width)).astype(np.float32),
    }
    weight = rng.standard_normal((n, rows, width)).astype(np.float32)

    def travelled(x, parameters, counts, weight):
        def one(x, parameters, counts, weight):
            counts_nE = jax.lax.all_gather(counts[0], "expert")
            function = functools.partial(expert_outputs, swiglu)
            plan = transport(room, max_rounds=n * rows)
            y = expert_parallel._on_expert_devices(x[0], parameters, counts_nE, function, plan)
            return y[None], jnp.sum(y * weight[0])[None]

        spec = jax.sharding.PartitionSpec("expert")
        y, total = jax.shard_map(one, in_specs=spec, out_specs=spec, check_vma=False)(
            x, parameters, counts, weight
        )
        return jnp.sum(total), y

    def in_place(x, parameters, weight):
        padded = jax.tree.map(lambda w: jnp.pad(w, [(0, 1)] + [(0, 0)] * (w.ndim - 1)), parameters)
        gate_up, down = padded["gate_up"][sorted_experts], padded["down"][sorted_experts]
        h = jnp.einsum("nRD,nRDgF->gnRF", x, gate_up)
        y = jnp.einsum("nRF,nRFD->nRD", swiglu(*h), down)
        return jnp.sum(y * weight), y

    with jax.set_mesh(mesh):
        found = jax.jit(jax.value_and_grad(travelled, (0, 1), has_aux=True))(x, parameters, counts, weight)
    expected = jax.value_and_grad(in_place, (0, 1), has_aux=True)(x, parameters, weight)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), found, expected)


@pytest.mark.slow
def test_capacity_drops_and_counts_the_last_rows():
    """All tokens choose one of two experts, which accepts 1.5 times its even share of a group's rows."""
    config = uneven_config(num_experts_per_tok=2, num_local_experts=8, expert_capacity_factor=1.5)
    bias = np.where(np.arange(8) == 2, 60.0, 0)
    rows, *_ = run(config, None, 1, bias)
    real = int((make_batch(0)["segment_ids"] > 0).sum())
    most = math.ceil(1.5 * B * T * 2 / 8)
    asked = rows[0]["expert_load"] * 2 * real
    np.testing.assert_allclose(asked[:, 2], real, rtol=1e-6)
    beyond = np.maximum(asked - most, 0).sum(axis=1).mean()
    assert rows[0]["dropped"] == pytest.approx(beyond / (2 * real), rel=1e-5)
    assert beyond >= real - most
    # If all devices exchange tokens, they drop the same ones as one device.
    spread, gradients, _ = run(config, MeshConfig(data=1, expert=8), 1, bias)
    assert spread[0]["dropped"] == pytest.approx(rows[0]["dropped"], rel=1e-6)
    assert spread[0]["loss"] == pytest.approx(rows[0]["loss"], rel=1e-5)
    error, leaf = furthest(gradients, run(config, None, 1, bias)[1])
    assert error <= 1e-5, leaf
    # Each of two groups has half of the rows and half of the capacity.
    halves, *_ = run(config, MeshConfig(data=2, expert=4), 1, bias)
    assert halves[0]["dropped"] == pytest.approx(rows[0]["dropped"], rel=0.2)
    plain, *_ = run(uneven_config(num_experts_per_tok=2, num_local_experts=8), None, 1, bias)
    assert plain[0]["dropped"] == 0 and plain[0]["loss"] != rows[0]["loss"]


# A model whose norms and biases are a small part.
QUICKSTART = read_preset(pathlib.Path(__file__).parent.parent / "configs" / "quickstart.py")


@pytest.mark.parametrize(
    ("mesh", "parts"),
    [
        (MeshConfig(data=8), 1),
        (MeshConfig(data=1, fsdp=8), 8),
        (MeshConfig(data=1, expert=8), 8),
        (MeshConfig(data=2, fsdp=2, expert=2), 4),
        (MeshConfig(data=1, fsdp=2, expert=4), 8),
        (MeshConfig(data=1, fsdp=2, expert=2, tensor=2), 8),
    ],
    ids=str,
)
def test_each_device_holds_its_share_of_bytes(mesh, parts):
    model = dataclasses.replace(
        QUICKSTART.model, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    config = dataclasses.replace(QUICKSTART, optim=OptimConfig(), model=model)
    mesh = make_mesh(mesh)
    state = create_state(config, mesh)
    held = (state.params, state.opt_state)
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(held))
    for device in jax.devices():
        here = sum(
            shard.data.nbytes
            for leaf in jax.tree.leaves(held)
            for shard in leaf.addressable_shards
            if shard.device == device
        )
        assert here == pytest.approx(whole / parts, rel=0.05)


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param("expert 8", marks=pytest.mark.slow),
        pytest.param("fsdp 2 x expert 4", marks=pytest.mark.slow),
        "data 2 x expert 2 x tensor 2",
    ],
)
def test_experts_are_not_gathered_over_the_expert_axis(mesh):
    """No all-gather of the compiled step gives a device more experts than it holds."""
    mesh = make_mesh(MESHES[mesh])
    batch = make_batch(0)
    batch = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(mesh))
        for name, x in batch.items()
    }
    with jax.set_mesh(mesh):
        text = make_train_step(CONFIG).lower(abstract_state(CONFIG, mesh), batch).compile().as_text()
    # Output sizes of the all-gathers, in values, by mesh axes.
    sizes = containers.defaultdict(list)
    for one in collectives(text):
        if one.kind == "all-gather":
            sizes[one.axes(mesh.shape)] += [shape_bytes(shape) // 4 for shape in one.shapes]
    # Recognized by their sizes, which no other array here has.
    D, F, here = 40, 28 // mesh.shape["tensor"], E // mesh.shape["expert"]
    if mesh.shape["fsdp"] > 1:
        # Local experts are gathered over FSDP in both passes, so none are kept.
        gathered = sizes["fsdp",]
        assert gathered.count(here * D * 2 * F) >= 2 and gathered.count(here * D * F) >= 2
    along_expert = [size for axes, found in sizes.items() if "expert" in axes for size in found]
    assert along_expert, "rows and attention's weights are gathered"
    assert not {experts * D * F for experts in range(here, 2 * E + 1)}.intersection(along_expert)


@pytest.mark.parametrize(
    ("mesh", "allowed"),
    [
        (MeshConfig(data=3), "data 3 x fsdp 1 .* multiply to 8, the number of devices; valid sizes: data 8"),
        (MeshConfig(data=2, expert=2), r"valid sizes: data 4 or fsdp 2 or context 2 or expert 4 or tensor 2"),
        (MeshConfig(data=-1, tensor=3), r"valid sizes: tensor 1, 2, 4, 8"),
        (MeshConfig(data=3, tensor=3), r"valid sizes: 1, 2, 4, 8 for each axis"),
    ],
    ids=str,
)
def test_mesh_must_match_the_number_of_devices(mesh, allowed):
    with pytest.raises(ValueError, match=rf"^mesh is .*{allowed}$"):
        make_mesh(mesh)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (
            {"expert": 8},
            "mesh.expert is 8: must divide model.num_local_experts (12); valid sizes: 1, 2, 3, 4, 6",
        ),
        ({"tensor": 8}, "mesh.tensor is 8: must divide model.num_key_value_heads (4); valid sizes: 1, 2, 4"),
        ({"fsdp": 16}, "mesh.fsdp is 16: must divide model.hidden_size (40); valid sizes: 1, 2, 4, 5, 8, 10"),
        ({"tensor": 4}, None),
    ],
)
def test_mesh_must_divide_the_model(axes, message):
    model = dataclasses.replace(CONFIG.model, num_local_experts=12)
    axes = dict.fromkeys(AXES, 1) | axes
    if message is None:
        return check_model(model, axes)
    with pytest.raises(ValueError, match=re.escape(message)):
        check_model(model, axes)
