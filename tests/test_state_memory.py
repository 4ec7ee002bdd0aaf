"""The optimizer state in host memory: the same training, and a refusal where it is not possible."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.checkpoints.run import Checkpoints
from gptoss_jax.config import SLIDING, DataConfig, MeshConfig, ModelConfig, OptimConfig, TrainConfig
from gptoss_jax.parallel.mesh import make_mesh
from gptoss_jax.parallel.rules import batch_sharding
from gptoss_jax.training.resume import check_run_dir, checkpoint_items
from gptoss_jax.training.state import abstract_state, check_state_memory, create_state
from gptoss_jax.training.step import make_train_step

CONFIG = TrainConfig(
    model=ModelConfig(
        vocab_size=40, hidden_size=16, intermediate_size=12, num_hidden_layers=1, layer_types=(SLIDING,),
        num_attention_heads=4, num_key_value_heads=2, head_dim=6, num_local_experts=4, num_experts_per_tok=3,
        sliding_window=5, compute_dtype="float32",
    ),
    data=DataConfig(seq_len=7, batch_size=4),
    optim=OptimConfig(warmup_steps=1),
    steps=3,
)  # fmt: skip
ON_HOST = dataclasses.replace(CONFIG, optim=dataclasses.replace(CONFIG.optim, state_memory="host"))


def memories(opt_state):
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(opt_state) if leaf.ndim}


def small_mesh():
    return make_mesh(MeshConfig(data=2, fsdp=2), jax.devices()[:4])


@functools.cache
def trained(config):
    mesh = small_mesh()
    tokens = np.arange(4 * 7).reshape(4, 7).astype(np.int32)
    ones = jnp.ones_like(tokens)
    batch = {"tokens": tokens, "targets": tokens, "segment_ids": ones, "positions": ones * np.arange(7)}
    with jax.set_mesh(mesh):
        state, step = create_state(config, mesh), make_train_step(config)
        batch = jax.device_put(batch, batch_sharding(mesh))
        for _ in range(2):
            state, _ = step(state, batch)
    assert memories(abstract_state(config, mesh).opt_state) == memories(state.opt_state)
    return state


def test_training_is_the_same():
    found, expected = trained(ON_HOST), trained(CONFIG)
    assert memories(found.opt_state) == {"pinned_host"} and memories(expected.opt_state) == {"device"}
    assert memories(found.params) == {"device"}
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get((found.params, expected.params)))
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get((found.opt_state, expected.opt_state)))


@pytest.mark.parametrize(("before", "after"), [(ON_HOST, CONFIG), (CONFIG, ON_HOST)], ids=["host", "device"])
def test_a_run_resumes_in_the_other_memory(tmp_path, before, after):
    state = trained(before)
    before, after = (dataclasses.replace(config, run_dir=str(tmp_path)) for config in (before, after))
    before.save(tmp_path / "config.json")
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, *checkpoint_items(state, {}, {}))
    checkpoints.close()
    check_run_dir(after)
    checkpoints = Checkpoints(tmp_path, read_only=True)
    abstract = abstract_state(after, small_mesh())
    _, params, rest, _ = checkpoints.restore(*checkpoint_items(abstract, {}, {})[:2], print)
    checkpoints.close()
    assert memories(params) == {"device"} and memories(state.opt_state) != memories(rest["opt_state"])
    assert memories(rest["opt_state"]) == memories(abstract.opt_state)
    found, expected = (params, rest["opt_state"]), (state.params, state.opt_state)
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get((found, expected)))


def test_a_device_without_host_memory_is_refused():
    memory = types.SimpleNamespace(kind="device")
    device = types.SimpleNamespace(platform="metal", addressable_memories=lambda: [memory])
    check_state_memory(CONFIG, device)
    check_state_memory(ON_HOST, jax.devices()[0])
    message = "optim.state_memory is 'host': must be 'device': JAX has no pinned_host memory on metal"
    with pytest.raises(ValueError, match=f"^{message}$"):
        check_state_memory(ON_HOST, device)
