"""Training adapters: meshes match one device, every adapter that is used learns, and frozen weights cost
nothing."""

import contextlib
import dataclasses
import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.params import assert_close, random_params
from helpers.programs import carried_arrays, largest_arrays
from helpers.tpu_compiler import BYTES_MADE, needs_libtpu, tpu_devices

from gptoss_jax.checkpoints.load import load_target
from gptoss_jax.config import (
    SLIDING,
    DataConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from gptoss_jax.config.model import LORA_TARGETS
from gptoss_jax.config.preset import read_preset
from gptoss_jax.data.batches import abstract_batch
from gptoss_jax.model import lora
from gptoss_jax.model.parameters import split_params
from gptoss_jax.model.transformer import abstract_params, init_params, segment_positions
from gptoss_jax.parallel.mesh import make_mesh
from gptoss_jax.parallel.rules import batch_sharding
from gptoss_jax.training.state import abstract_state, create_state, place_on_mesh
from gptoss_jax.training.step import make_train_step

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
B, T, V, D, F, E = 8, 13, 104, 32, 64, 16
MODEL = ModelConfig(
    vocab_size=V,
    hidden_size=D,
    intermediate_size=F,
    num_hidden_layers=2,
    layer_types=(SLIDING,) * 2,  # one block, stacked twice
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=18,
    num_local_experts=E,
    num_experts_per_tok=3,
    sliding_window=5,
    rope_scaling=None,
    compute_dtype="float32",
    lora=LoraConfig(rank=7, expert_rank=5, alpha=20.0, targets=LORA_TARGETS),
)
CONFIG = TrainConfig(
    model=MODEL,
    data=DataConfig(seq_len=T, batch_size=B),
    # With a large epsilon, updates are proportional to gradients, so wrong gradients show.
    optim=OptimConfig(learning_rate=5e-3, warmup_steps=0, epsilon=0.05, max_grad_norm=0.0),
    steps=20,
)
FORMATS = ["plain", "mxfp4"]
MESHES = {
    "data 8": MeshConfig(data=8),
    "fsdp 8": MeshConfig(data=1, fsdp=8),
    "expert 8": MeshConfig(data=1, expert=8),
    "data 2 x tensor 4": MeshConfig(data=2, tensor=4),
    "fsdp 2 x expert 2 x tensor 2": MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
    "fsdp 2 x context 2 x expert 2": MeshConfig(data=1, fsdp=2, context=2, expert=2),
}
COMBINED = "fsdp 2 x expert 2 x tensor 2"


def with_model(**changes):
    return dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, **changes))


def make_batch(seed):
    """Returns rows of one or two documents and some padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, V, (B, T + 1))
    segments = 1 + (np.arange(T) >= rng.integers(1, T, (B, 1)))
    segments = np.where(np.arange(T) < rng.integers(T - 4, T + 1, (B, 1)), segments, 0)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": segments}
    batch = {name: jnp.asarray(value, jnp.int32) for name, value in batch.items()}
    return batch | {"positions": segment_positions(batch["segment_ids"])}


@functools.cache
def start_params(model):
    """Random parameters, those of adapters too, and a router with clear decisions.

    With these spreads, changes of one unit in the last place of all parameters change gradients by up to 3e-6
    of the largest; with 0.5 and 0.15 by 1.2e-5, which is more than the tolerance below.
    """
    wide = ("router", "router_bias", "sinks")
    return random_params(model, lambda name: 0.3 if name in wide else 0.1, seed=7)


def run(config, mesh_config, steps, params=None):
    """Returns the metrics of some steps, the gradients of the first, and the adapters after the last."""
    devices = jax.devices()[:1] if mesh_config is None else None
    mesh = make_mesh(mesh_config or MeshConfig(data=1), devices)
    places = jax.tree.map(lambda leaf: leaf.sharding, place_on_mesh(abstract_params(config.model), mesh))
    params = jax.device_put(start_params(config.model) if params is None else params, places)
    rows, gradients = [], None
    with jax.set_mesh(mesh):
        adapters, frozen = split_params(params, lora.is_adapter)
        state, step = create_state(config, mesh, adapters), make_train_step(config)
        for seed in range(steps):
            batch = make_batch(seed)
            if mesh.shape["context"] > 1:
                # The context axis splits sequences of 16 tokens, with padding.
                batch = {name: jnp.pad(x, ((0, 0), (0, 16 - T))) for name, x in batch.items()}
            batch = jax.device_put(batch, batch_sharding(mesh))
            state, metrics = step(state, batch, frozen)
            rows.append(jax.device_get(metrics))
            if seed == 0:  # AdamW's first moment is then a tenth of the gradient
                gradients = jax.device_get(optax.tree.get(state.opt_state, "mu"))
    return rows, gradients, jax.device_get(state.params)


@functools.cache
def alone(expert_format):
    return run(with_model(expert_format=expert_format), None, 3)


@pytest.mark.parametrize(
    ("name", "expert_format"),
    [
        pytest.param(name, form, marks=() if name == COMBINED else pytest.mark.slow)
        for name in MESHES
        for form in FORMATS
    ],
)
def test_every_mesh_trains_adapters_like_one_device(name, expert_format):
    rows, gradients, adapters = run(with_model(expert_format=expert_format), MESHES[name], 3)
    expected_rows, expected_gradients, expected_adapters = alone(expert_format)
    for row, expected in zip(rows, expected_rows, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert_close(gradients, expected_gradients, 1e-5)
    assert_close(adapters, expected_adapters, 1e-5)


@pytest.mark.parametrize("expert_format", [pytest.param("plain", marks=pytest.mark.slow), "mxfp4"])
def test_every_expert_adapter_that_got_tokens_changes_in_ten_steps(expert_format):
    config = with_model(expert_format=expert_format, num_local_experts=256)
    # Weight decay would change the adapters of all experts.
    config = dataclasses.replace(config, optim=OptimConfig(warmup_steps=0, weight_decay=0.0))
    start = jax.device_get(init_params(config.model, jax.random.key(0)))
    rows, _, adapters = run(config, None, 10, start)
    steps_LE = sum((row["expert_load"] > 0).astype(int) for row in rows)
    assert {0, 1, 2} <= set(steps_LE.flat)
    before, _ = split_params(start, lora.is_adapter)
    (block,), (block_before,) = adapters["blocks"].values(), before["blocks"].values()
    for name in ("gate_up_lora_a", "gate_up_lora_b", "down_lora_a", "down_lora_b"):
        now, then = block["moe"][name], block_before["moe"][name]
        changed_LE = np.any(now != then, axis=tuple(range(2, now.ndim)))
        # B starts at zero, so A has no gradient until B has changed.
        least = 2 if name.endswith("a") else 1
        np.testing.assert_array_equal(changed_LE, steps_LE >= least, err_msg=name)
    for name, leaf in block["attention"].items():
        assert not np.array_equal(leaf, block_before["attention"][name]), name


@pytest.mark.parametrize("expert_format", [pytest.param("plain", marks=pytest.mark.slow), "mxfp4"])
@pytest.mark.parametrize("remat", ["none", pytest.param("dots", marks=pytest.mark.slow), "block"])
@pytest.mark.parametrize("fsdp", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_frozen_weights_have_no_gradient_no_state_and_no_copies(fsdp, remat, expert_format):
    layers = 6
    config = with_model(
        expert_format=expert_format, remat=remat, num_hidden_layers=layers, layer_types=(SLIDING,) * layers
    )
    mesh = make_mesh(MeshConfig(data=1, fsdp=fsdp), jax.devices()[:fsdp])
    state = abstract_state(config, mesh, lora.is_adapter)
    _, frozen = split_params(place_on_mesh(abstract_params(config.model), mesh), lora.is_adapter)
    trained = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    # Two moments and a few scalars.
    assert sum(leaf.size for leaf in jax.tree.leaves(state.opt_state)) < 2 * trained + 10
    batch = jax.eval_shape(lambda: make_batch(0))
    if fsdp > 1:
        batch = abstract_batch(B, T, batch_sharding(mesh))
    with jax.set_mesh(mesh) if fsdp > 1 else contextlib.nullcontext():
        program = make_train_step(config).lower(state, batch, frozen).compile()
    arrays = carried_arrays(program.as_text())
    # Each stack of weights is read by the loops over layers, and no loop carries another one of its size.
    for name, leaf in frozen["blocks"]["0"]["moe"].items():
        if leaf.ndim > 3:
            kind = "u8" if leaf.dtype == jnp.uint8 else "f32"
            assert arrays[kind, math.prod(leaf.sharding.shard_shape(leaf.shape))] == 1, name
    if expert_format == "mxfp4":
        # Neither the stack nor a layer of it is unpacked.
        unpacked = {stack * size for stack in (1, layers) for size in (E * D * 2 * F, E * F * D)}
        assert not unpacked & {size for kind, size in arrays if kind != "u8"}


def test_no_layer_is_unpacked(cpu_form):
    config = with_model(expert_format="mxfp4", num_local_experts=64)
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    _, frozen = split_params(abstract_params(config.model), lora.is_adapter)
    arguments = abstract_state(config, mesh, lora.is_adapter), jax.eval_shape(lambda: make_batch(0)), frozen
    largest = largest_arrays(make_train_step(config).lower(*arguments).compile().as_text())
    layers, packed = config.model.num_hidden_layers, 64 * 2 * F * D // 2
    assert largest.pop("u8") == layers * packed
    # Those of anything else are smaller than the smaller matrices of a layer.
    assert max(largest.values()) < 64 * D * F, largest


@needs_libtpu
def test_two_layers_of_20b_on_tpu():
    """A step of QLoRA on 1,024 tokens takes less memory, beside parameters and state, than the experts of a
    layer would unpacked."""
    config = read_preset(CONFIGS / "finetune/sft_qlora_20b.py")
    model = dataclasses.replace(
        config.model,
        num_hidden_layers=2,
        layer_types=(SLIDING,) * 2,
        vocab_size=1024,
        compute_dtype="bfloat16",
    )
    config = dataclasses.replace(config, model=model, optim=OptimConfig())
    with tpu_devices("v5e:2x2") as devices:
        mesh = make_mesh(MeshConfig(), devices[:1])
    with jax.set_mesh(mesh):
        state = abstract_state(config, mesh, lora.is_adapter)
        _, frozen = split_params(load_target(model, mesh, "bfloat16"), lora.is_adapter)
        batch = abstract_batch(1, 1024, batch_sharding(mesh))
        program = make_train_step(config).lower(state, batch, frozen).compile()
    text, layer = program.as_text(), 3 * model.num_local_experts * model.hidden_size * model.intermediate_size
    assert not BYTES_MADE.search(text)
    largest = largest_arrays(text)
    assert max(largest["bf16"], largest["f32"]) < layer / 3
    memory = program.memory_analysis()
    arguments = memory.argument_size_in_bytes
    assert arguments < memory.peak_memory_in_bytes < arguments + 2 * layer
