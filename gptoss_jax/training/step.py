"""Training and evaluation steps: pure functions of state and batch, each compiled once per run."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gptoss_jax.config import ModelConfig, TrainConfig, require
from gptoss_jax.kernels import selection
from gptoss_jax.model.parameters import merge_params
from gptoss_jax.model.transformer import bind
from gptoss_jax.parallel.context import context_size, pad_sequences, split_sequences
from gptoss_jax.parallel.rules import BATCH_BT, constrain
from gptoss_jax.training import losses
from gptoss_jax.training.objectives import LANGUAGE_MODELING, Batch, Objective
from gptoss_jax.training.optimizer import apply_gradients, global_norm, make_schedule
from gptoss_jax.training.state import TrainState, move_arrays


def make_train_step(config: TrainConfig, objective: Objective = LANGUAGE_MODELING) -> jax.stages.Wrapped:
    """Returns the jitted `train_step(state, batch, frozen={}) -> (state, metrics)`.

    `state` is donated and must not be reused. `frozen` has the parameters that are not trained; they are
    neither differentiated nor donated.

    Metrics, float32 scalars unless noted: the objective's means (`loss`), `load_balance_loss`,
    `router_z_loss`, `grad_norm` (before clipping), `learning_rate`, `skipped` and `skipped_in_a_row` (int32,
    including this step), `tokens` (without padding, int32), `expert_load` [L, E], `dropped` (fraction of the
    token-expert assignments beyond `model.expert_capacity_factor`).
    """
    schedule = make_schedule(config.optim, config.steps)
    model_config, num_microbatches = config.model, config.optim.grad_accum_steps
    with_dropout = model_config.attention_dropout > 0 or model_config.residual_dropout > 0

    def loss(params, frozen, batch, weight, key):
        """Returns the contribution of a microbatch to the loss and metrics of the batch."""
        model = bind(model_config, merge_params(params, frozen))
        sums, stats = objective.sums(
            model,
            _rows(objective, batch),
            dropout_key=key,
            capacity_factor=model_config.expert_capacity_factor,
        )
        means = objective.means(sums, weight)
        router_loss, router_metrics = losses.router_losses(model_config, stats)
        router_metrics = {name: value / num_microbatches for name, value in router_metrics.items()}
        return means["loss"] + router_loss / num_microbatches, means | router_metrics

    gradient = jax.value_and_grad(loss, has_aux=True)

    def accumulated_gradient(params, frozen, batch, weight, key):
        # Interleaved, so that each microbatch has rows of every device.
        microbatches = {
            name: jnp.moveaxis(x.reshape(-1, num_microbatches, *x.shape[1:]), 1, 0)
            for name, x in batch.items()
        }

        def add_microbatch(total, indexed):
            index, batch = indexed
            batch = {name: constrain(x, BATCH_BT) for name, x in batch.items()}
            microbatch_key = None if key is None else jax.random.fold_in(key, index)
            result = gradient(params, frozen, batch, weight, microbatch_key)
            added = jax.tree.map(jnp.add, total, result)
            # The metrics of both; maxima are not added.
            (_, before), (_, new), (_, metrics) = total[0], result[0], added[0]
            metrics.update({name: jnp.maximum(before[name], new[name]) for name in objective.maxima})
            return added, None

        first = jax.tree.map(lambda x: x[0], microbatches)
        zeros = optax.tree.zeros_like(jax.eval_shape(gradient, params, frozen, first, weight, key))
        indices = jnp.arange(num_microbatches, dtype=jnp.int32)
        return jax.lax.scan(add_microbatch, zeros, (indices, microbatches))[0]

    def train_step(
        state: TrainState, batch: Batch, frozen: dict | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        weight = objective.weight(batch)
        weight = jnp.where(weight > 0, weight, 1)  # a batch of padding has a loss of 0
        key = None
        if with_dropout:
            key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        compute_gradient = gradient if num_microbatches == 1 else accumulated_gradient
        with selection.using(model_config.kernels):
            (_, metrics), grads = compute_gradient(state.params, frozen or {}, batch, weight, key)
            new_state, grad_norm = _update(config, state, grads, metrics["loss"])
        return new_state, metrics | {
            "grad_norm": grad_norm,
            "learning_rate": schedule(state.step - state.skipped),
            "skipped": new_state.skipped,
            "skipped_in_a_row": new_state.skipped_in_a_row,
            "tokens": jnp.sum(batch["segment_ids"] > 0, dtype=jnp.int32),
        }

    return jax.jit(train_step, donate_argnums=0)


def _update(
    config: TrainConfig, state: TrainState, gradients: Any, loss: jax.Array
) -> tuple[TrainState, jax.Array]:
    """Returns the state after a step, and the norm of the gradients; if that or the loss is not finite, the
    parameters stay as they were."""
    norm = global_norm(gradients)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    is_on_host, opt_state = config.optim.state_memory == "host", state.opt_state
    if is_on_host:
        opt_state = move_arrays(opt_state, jax.memory.Space.Device)
    params, opt_state = apply_gradients(
        config.optim, config.steps, state.params, opt_state, gradients, norm=norm, finite=finite
    )
    if is_on_host:
        opt_state = move_arrays(opt_state, jax.memory.Space.Host)
    bad = 1 - finite.astype(jnp.int32)
    new_state = dataclasses.replace(
        state,
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        skipped=state.skipped + bad,
        skipped_in_a_row=(state.skipped_in_a_row + 1) * bad,
    )
    return new_state, norm


def _rows(objective: Objective, batch: Batch) -> Batch:
    """Returns the rows that the objective and the model see: parts of sequences, if the mesh has a context
    axis."""
    allowed = "must be 1: the objective needs whole sequences"
    require(objective.is_per_token or context_size() == 1, "mesh.context", context_size(), allowed)
    return split_sequences(batch)


def make_eval_step(config: ModelConfig, objective: Objective = LANGUAGE_MODELING) -> jax.stages.Wrapped:
    """Returns the jitted `eval_step(params, batch) -> (sums, weight)`; `params` has all parameters."""

    def eval_step(params: dict, batch: Batch) -> tuple[dict[str, jax.Array], jax.Array]:
        with selection.using(config.kernels):
            sums, _ = objective.sums(bind(config, params), _rows(objective, pad_sequences(batch)))
        return sums, objective.weight(batch)

    return jax.jit(eval_step)
