"""From `OptimConfig` to optax."""

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from optax.contrib import MuonDimensionNumbers as Muon

from gptoss_jax.config import OptimConfig
from gptoss_jax.model.parameters import path_names

# Names of the parameters that are matrices. Stacking adds axes to all, so the rank would not tell.
MATRICES = frozenset({"weight", "q", "k", "v", "out", "router", "gate_up", "down"})

# Axes of input and output of the matrices inside the blocks, from the end: stacking adds axes in front.
MUON_DIMENSIONS = {
    "q": Muon((-3,), (-2, -1)),
    "k": Muon((-3,), (-2, -1)),
    "v": Muon((-3,), (-2, -1)),
    "out": Muon((-3, -2), (-1,)),
    "gate_up": Muon((-3,), (-1,)),
    "down": Muon((-2,), (-1,)),
}


def decay_mask(params) -> dict:
    """True for the parameters that weight decay pulls on: matrices, not norms, biases, sinks or the router's
    bias."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path_names(path)[-1] in MATRICES, params)


def make_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate by step (from 0): a linear rise to the peak, then `cosine` or `wsd` down to
    `min_lr_ratio` of it, or `constant`."""
    peak, final = config.learning_rate, config.learning_rate * config.min_lr_ratio
    warmup = min(config.warmup_steps, steps - 1)
    # A rise over n steps takes its first step at 1/n of the peak, not at zero.
    rise = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    if config.schedule == "constant":
        return optax.join_schedules([rise, optax.constant_schedule(peak)], [warmup])
    left = max(steps - 1 - warmup, 1)
    if config.schedule == "cosine":
        fall = optax.cosine_decay_schedule(peak, left, alpha=config.min_lr_ratio)
        return optax.join_schedules([rise, fall], [warmup])
    decay = min(max(round(steps * config.decay_fraction), 1), left)
    stable = left - decay
    parts = [rise, optax.constant_schedule(peak), optax.linear_schedule(peak, final, decay)]
    return optax.join_schedules(parts, [warmup, warmup + stable])


def muon_dimensions(params) -> dict:
    """The axes of input and output of each parameter that Muon is for, None for the rest.

    All other axes count matrices, each of which is orthogonalised alone: layers, experts, gate and up.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: MUON_DIMENSIONS.get(path_names(path)[-1]), params)


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformationExtraArgs:
    """AdamW (Loshchilov and Hutter 2019), or Muon (Jordan et al. 2024) with it, on the clipped gradient.

    Its `update` takes one more argument, `finite`: where that is False the state stays as it was. Muon's
    updates are scaled to the size that AdamW's have (Liu et al. 2025, "Muon is Scalable for LLM Training"),
    so that one learning rate serves both. Weight decay then pulls on Muon's matrices alone.
    """
    schedule = make_schedule(config, steps)
    if config.name == "adamw":
        optimizer = optax.chain(
            _scale_by_adam(config),
            optax.add_decayed_weights(config.weight_decay, decay_mask),
            optax.scale_by_learning_rate(schedule),
        )
    else:
        optimizer = optax.contrib.muon(
            schedule,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            weight_decay_mask=decay_mask,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=muon_dimensions,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
        )
    if config.max_grad_norm:
        optimizer = optax.chain(_clip(config.max_grad_norm), optimizer)
    # Of AdamW only the counts are left to keep: asking the moments once more would copy them.
    is_kept_already = config.name == "adamw"

    def init(params):
        # optax creates Muon's coefficients in JAX's default float type, float64 under jax_enable_x64.
        return jax.tree.map(
            lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == jnp.float64 else leaf,
            optimizer.init(params),
        )

    def update(gradients, state, params, *, finite):
        updates, new_state = optax.with_extra_args_support(optimizer).update(
            gradients, state, params, finite=finite
        )
        return updates, jax.tree.map(
            lambda new, old: new if is_kept_already and new.ndim else jnp.where(finite, new, old),
            new_state,
            state,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _scale_by_adam(config: OptimConfig) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_adam`, which leaves the moments as they are where `finite` is False.

    The barrier has the update computed from the new moments. Otherwise a compiler computes it from the old
    ones too, and then has to copy those before it can write the new ones in their place.
    """
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)

    def update(gradients, state, params=None, *, finite, **_):
        def moment(order, decay, olds):
            new = optax.tree.update_moment(gradients, olds, decay, order)
            return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, olds)

        count = optax.safe_increment(state.count)
        moments = moment(1, config.beta1, state.mu), moment(2, config.beta2, state.nu)
        mu, nu = jax.lax.optimization_barrier(moments)
        updates = jax.tree.map(
            lambda m, v: m / (jnp.sqrt(v) + config.epsilon),
            optax.tree.bias_correction(mu, config.beta1, count),
            optax.tree.bias_correction(nu, config.beta2, count),
        )
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(adam.init, update)


def _clip(most: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` as one factor: gradients that are divided one by one would all be written
    out before the optimiser reads them again."""

    def update(gradients, state, params=None):
        norm = optax.tree.norm(gradients)
        factor = jnp.where(norm > most, most / norm, 1.0)
        return jax.tree.map(lambda g: g * factor, gradients), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
