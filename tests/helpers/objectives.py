"""For objectives of fine-tuning: a small model with adapters, steps on meshes, and a run to start from."""

import dataclasses
import functools
import json

import jax
import optax
from helpers.params import random_params

from gptoss_jax.config import (
    SLIDING,
    CheckpointConfig,
    EvalConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from gptoss_jax.model import lora
from gptoss_jax.model.parameters import split_params
from gptoss_jax.model.transformer import abstract_params, bind, get_params
from gptoss_jax.parallel.mesh import make_mesh
from gptoss_jax.parallel.rules import batch_sharding
from gptoss_jax.training.loop import train
from gptoss_jax.training.rl import make_objective
from gptoss_jax.training.state import create_state, place_on_mesh
from gptoss_jax.training.step import make_train_step

V = 104
MODEL = ModelConfig(
    vocab_size=V, hidden_size=40, intermediate_size=28, num_hidden_layers=2, layer_types=(SLIDING,) * 2,
    num_attention_heads=8, num_key_value_heads=4, head_dim=18, num_local_experts=16, num_experts_per_tok=3,
    sliding_window=5, rope_scaling=None, compute_dtype="float32",
    lora=LoraConfig(rank=6, expert_rank=5, alpha=12.0),
)  # fmt: skip
# With a large epsilon, updates are proportional to gradients, so wrong gradients show.
OPTIM = OptimConfig(learning_rate=5e-3, warmup_steps=0, epsilon=0.05, max_grad_norm=0.0)


@functools.cache
def start_params():
    """Parameters of MODEL, adapters too, that are far from those of a fresh model."""
    wide = ("router", "router_bias", "sinks")
    return random_params(MODEL, lambda name: 0.3 if name in wide else 0.1, seed=7)


@functools.partial(jax.jit, static_argnums=0)
def _log_probs(config, params, batch):
    logits = bind(config, params)(batch["tokens"], batch["segment_ids"], batch["positions"])
    log_p = jax.nn.log_softmax(logits, axis=-1)
    return jax.numpy.take_along_axis(log_p, batch["targets"][..., None], axis=-1)[..., 0]


def plain_log_probs(model, batch):
    """log p of each target from all logits, [B, T]."""
    return _log_probs(model.config, get_params(model), batch)


def params_on(mesh, config, params):
    """Parameters on a mesh: those of the adapters, and the others."""
    places = jax.tree.map(lambda leaf: leaf.sharding, place_on_mesh(abstract_params(config), mesh))
    return split_params(jax.device_put(params, places), lora.is_adapter)


def mesh_of(mesh_config):
    """The mesh of all devices, or of one if `mesh_config` is None."""
    return make_mesh(mesh_config or MeshConfig(data=1), None if mesh_config else jax.devices()[:1])


def steps_on(mesh_config, config, batches, grad_accum_steps=1):
    """The scalar metrics of a step on each batch, and the gradient of the first."""
    optim = dataclasses.replace(config.optim, grad_accum_steps=grad_accum_steps)
    config, mesh, rows, gradients = dataclasses.replace(config, optim=optim), mesh_of(mesh_config), [], None
    with jax.set_mesh(mesh):
        adapters, frozen = params_on(mesh, config.model, start_params())
        state = create_state(config, mesh, adapters)
        step = make_train_step(config, make_objective(config))
        for batch in batches:
            state, metrics = step(state, jax.device_put(batch, batch_sharding(mesh)), frozen)
            rows.append({name: float(x) for name, x in jax.device_get(metrics).items() if x.ndim == 0})
            if gradients is None:
                gradients = jax.device_get(optax.tree.get(state.opt_state, "mu"))
    return rows, gradients


def train_on_chat(folder, source, rows, **changes):
    """Trains all weights of a model like MODEL on rows of a chat, in `folder`/base; returns its config."""
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = TrainConfig(
        model=dataclasses.replace(MODEL, vocab_size=300, lora=None, max_position_embeddings=1024),
        data=dataclasses.replace(source, source=f"chat:{folder}/chat.jsonl"),
        optim=OptimConfig(learning_rate=2e-2, warmup_steps=0),
        checkpoint=CheckpointConfig(every=50),
        eval=EvalConfig(every=50, batches=1, sample_tokens=0),
        run_dir=str(folder / "base"),
    )
    config = dataclasses.replace(config, **changes)
    train(config)
    return config
