"""Training around packed experts: no program unpacks a layer, and gradients pass through them."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.params import assert_close, unpacked
from helpers.programs import largest_arrays
from helpers.tpu_compiler import BYTES_MADE

from gptoss_jax.config import SLIDING, MeshConfig, ModelConfig
from gptoss_jax.model.parameters import merge_params, split_params
from gptoss_jax.model.transformer import abstract_params, bind, init_params, segment_positions
from gptoss_jax.parallel.mesh import make_mesh
from gptoss_jax.parallel.rules import batch_sharding
from gptoss_jax.training.objectives import LANGUAGE_MODELING
from gptoss_jax.training.state import place_on_mesh

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
B, T, L, D, F, E = 8, 13, 2, 96, 64, 16
MODEL = ModelConfig(
    vocab_size=104,
    hidden_size=D,
    intermediate_size=F,
    num_hidden_layers=L,
    layer_types=(SLIDING,) * L,  # one block, stacked twice
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=10,
    num_local_experts=E,
    num_experts_per_tok=3,
    sliding_window=5,
    rope_theta=1000.0,
    rope_scaling=None,
    initializer_range=0.1,
    compute_dtype="float32",
    expert_format="mxfp4",
)


def is_trained(path):
    """Selects all parameters but the experts' matrices, packed or not."""
    return not path[-1].endswith(("_blocks", "_scales")) and path[-1] not in ("gate_up", "down")


def make_batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, MODEL.vocab_size, (B, T + 1))
    segments = np.where(np.arange(T) < rng.integers(T - 4, T + 1, (B, 1)), 1, 0)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": segments}
    batch = {name: jnp.asarray(value, jnp.int32) for name, value in batch.items()}
    return batch | {"positions": segment_positions(batch["segment_ids"])}


@functools.cache
def start_params():
    return init_params(MODEL, jax.random.key(0))


def loss_and_gradients(model):
    """Returns a jitted function of the trained and the frozen parameters and a batch."""

    def loss(trained, frozen, batch):
        sums, _ = LANGUAGE_MODELING.sums(bind(model, merge_params(trained, frozen)), batch)
        return sums["loss"]

    return jax.jit(jax.value_and_grad(loss))


@functools.cache
def expected():
    """Returns the loss and gradients with plain experts."""
    plain = dataclasses.replace(MODEL, expert_format="plain")
    return loss_and_gradients(plain)(*split_params(unpacked(start_params()), is_trained), make_batch())


@pytest.mark.parametrize("remat", ["none", pytest.param("block", marks=pytest.mark.slow)])
def test_gradients_equal_those_of_plain_experts(cpu_form, remat):
    model = dataclasses.replace(MODEL, remat=remat)
    assert_close(
        loss_and_gradients(model)(*split_params(start_params(), is_trained), make_batch()), expected()
    )


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(data=1, fsdp=8),
        MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
        MeshConfig(data=2, expert=4),
    ],
    ids=["fsdp 8", "fsdp 2 x expert 2 x tensor 2", "data 2 x expert 4"],
)
def test_gradients_on_meshes(mesh):
    mesh = make_mesh(mesh, jax.devices())
    with jax.set_mesh(mesh):
        places = jax.tree.map(lambda leaf: leaf.sharding, place_on_mesh(abstract_params(MODEL), mesh))
        params = jax.device_put(start_params(), places)
        batch = jax.device_put(make_batch(), batch_sharding(mesh))
        found = loss_and_gradients(MODEL)(*split_params(params, is_trained), batch)
    assert_close(found, expected())


def test_no_layer_is_unpacked_or_copied(cpu_form):
    """Kernels read packed layers in their stacks, and plain XLA reads one expert at a time."""
    model = dataclasses.replace(MODEL, num_local_experts=64)
    arguments = *split_params(abstract_params(model), is_trained), jax.eval_shape(make_batch)
    program = loss_and_gradients(model).lower(*arguments).compile()
    text = program.as_text()
    largest = largest_arrays(text)
    assert largest.pop("u8") == L * 64 * 2 * F * D // 2
    # Those of anything else are smaller than the smaller matrices of a layer.
    assert max(largest.values()) < 64 * D * F, largest
    created = [line for line in text.splitlines() if BYTES_MADE.search(line)]
    assert largest_arrays("\n".join(line.split("(")[0] for line in created)).get("u8", 0) <= F * D
