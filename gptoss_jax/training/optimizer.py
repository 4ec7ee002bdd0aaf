"""From `OptimConfig` to optax."""

import jax
import optax

from gptoss_jax.config import OptimConfig
from gptoss_jax.parallel.sharding import path_names

# Names of the parameters that are matrices. Stacking adds axes to all, so the rank would not tell.
MATRICES = frozenset({"weight", "q", "k", "v", "out", "router", "gate_up", "down"})


def decay_mask(params) -> dict:
    """True for the parameters that weight decay pulls on: matrices, not norms, biases, sinks or the router's
    bias."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path_names(path)[-1] in MATRICES, params)


def make_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate by step (from 0): a linear rise, then `cosine` or `wsd` down to `final_fraction` of the
    peak."""
    peak, final = config.learning_rate, config.learning_rate * config.final_fraction
    warmup = min(config.warmup_steps, steps - 1)
    # A rise over n steps takes its first step at 1/n of the peak, not at zero.
    rise = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    left = max(steps - 1 - warmup, 1)
    if config.schedule == "cosine":
        fall = optax.cosine_decay_schedule(peak, left, alpha=config.final_fraction)
        return optax.join_schedules([rise, fall], [warmup])
    decay = min(max(round(steps * config.decay_fraction), 1), left)
    stable = left - decay
    parts = [rise, optax.constant_schedule(peak), optax.linear_schedule(peak, final, decay)]
    return optax.join_schedules(parts, [warmup, warmup + stable])


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """AdamW on the clipped gradient (Loshchilov and Hutter 2019)."""
    adamw = optax.adamw(
        make_schedule(config, steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw) if config.clip_norm else adamw
