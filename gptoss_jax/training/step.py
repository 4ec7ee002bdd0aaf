"""One step: pure functions of (state, batch), jitted once for a run."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from gptoss_jax.config import ModelConfig, TrainConfig
from gptoss_jax.model.transformer import bind
from gptoss_jax.parallel.mesh import current_axes
from gptoss_jax.parallel.rules import BATCH_BT, constrain
from gptoss_jax.training import losses
from gptoss_jax.training.optimizer import make_optimizer, make_schedule
from gptoss_jax.training.state import TrainState

Batch = dict[str, jax.Array]


def summed_loss(model_config: ModelConfig, params: dict, batch: Batch, dropout_key=None, capacity=None):
    """The sum of -log p over a batch's real targets in nats, and the routers' statistics.

    `batch` holds int32 [B, T] arrays: tokens, targets, segment_ids (0 is padding) and positions.
    """
    model = bind(model_config, params)
    hidden_BTD, _, stats = model.hidden_states(
        batch["tokens"],
        batch["segment_ids"],
        batch["positions"],
        dropout_key=dropout_key,
        capacity_factor=capacity,
    )
    B, T = batch["tokens"].shape
    # Rows are split by the batch's axes and the vocabulary by the other one.
    chunk = losses.chunk_length(B, T, model_config.vocab_size, math.prod(current_axes().values()))
    nats = losses.cross_entropy(
        hidden_BTD, model.head_weight_VD, batch["targets"], batch["segment_ids"] > 0, chunk
    )
    return nats, stats


def make_train_step(
    config: TrainConfig,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict]]:
    """The jitted step. The state given is donated: it may not be used again.

    Metrics, float32 scalars unless said: `loss` (mean over real targets, nats), `load_balance_loss`,
    `router_z_loss`, `grad_norm` (before clipping), `learning_rate`, `skipped` and `skipped_in_a_row` (int32,
    this step included), `tokens` (real targets, int32), `expert_load` [L, E], `dropped` (the share of the
    tokens' choices of experts that found no room; 0 without `model.expert_capacity_factor`).
    """
    optimizer = make_optimizer(config.optim, config.steps)
    schedule = make_schedule(config.optim, config.steps)
    model_config, parts = config.model, config.optim.grad_accum_steps
    with_dropout = model_config.attention_dropout > 0 or model_config.residual_dropout > 0

    def part_loss(params, part, tokens, key):
        nats, stats = summed_loss(model_config, params, part, key, model_config.expert_capacity_factor)
        mean = nats / tokens
        balance, z = losses.load_balance_loss(stats), losses.router_z_loss(stats)
        total = (
            mean + (model_config.router_aux_loss_coef * balance + model_config.router_z_loss_coef * z) / parts
        )
        observed = {"load_balance_loss": balance, "router_z_loss": z, "expert_load": stats["load"]}
        observed["dropped"] = jnp.mean(stats["dropped"])
        return total, {"loss": mean} | jax.tree.map(lambda value: value / parts, observed)

    def gradient(params, batch, tokens, key):
        """Gradient and metrics of the whole batch, worked through in `parts` parts."""
        take = jax.value_and_grad(part_loss, has_aux=True)
        if parts == 1:
            (_, metrics), grads = take(params, batch, tokens, key)
            return grads, metrics
        # Every part takes rows of every device.
        split = {name: jnp.moveaxis(x.reshape(-1, parts, x.shape[1]), 1, 0) for name, x in batch.items()}

        def one_part(total, inputs):
            index, part = inputs
            part = {name: constrain(x, BATCH_BT) for name, x in part.items()}
            part_key = None if key is None else jax.random.fold_in(key, index)
            (_, metrics), grads = take(params, part, tokens, part_key)
            return jax.tree.map(jnp.add, total, (grads, metrics)), None

        shapes = jax.eval_shape(take, params, jax.tree.map(lambda x: x[0], split), tokens, key)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (shapes[1], shapes[0][1]))
        return jax.lax.scan(one_part, zeros, (jnp.arange(parts, dtype=jnp.int32), split))[0]

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
        tokens = jnp.sum(batch["segment_ids"] > 0, dtype=jnp.int32)
        key = None
        if with_dropout:
            key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        grads, metrics = gradient(state.params, batch, jnp.maximum(tokens, 1), key)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, finite=finite)
        params = optax.apply_updates(state.params, updates)
        bad = 1 - finite.astype(jnp.int32)
        new_state = dataclasses.replace(
            state,
            step=state.step + 1,
            params=jax.tree.map(lambda new, old: jnp.where(finite, new, old), params, state.params),
            opt_state=opt_state,
            skipped=state.skipped + bad,
            skipped_in_a_row=(state.skipped_in_a_row + 1) * bad,
        )
        metrics |= {
            "grad_norm": grad_norm,
            "learning_rate": schedule(state.step - state.skipped),
            "skipped": new_state.skipped,
            "skipped_in_a_row": new_state.skipped_in_a_row,
            "tokens": tokens,
        }
        return new_state, metrics

    return jax.jit(train_step, donate_argnums=0)


def make_eval_step(
    config: ModelConfig,
) -> Callable[[dict, Batch], tuple[jax.Array, jax.Array]]:
    """The jitted evaluation: (params, batch) -> (sum of -log p in nats, number of real targets)."""

    def eval_step(params: dict, batch: Batch) -> tuple[jax.Array, jax.Array]:
        return summed_loss(config, params, batch)[0], jnp.sum(batch["segment_ids"] > 0, dtype=jnp.int32)

    return jax.jit(eval_step)
