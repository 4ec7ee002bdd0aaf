"""Builds the optimizer of an `OptimConfig` with optax, and applies it to gradients.

On CPU, a kernel does what optax's AdamW does, on the same state.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers

from gptoss_jax.config import OptimConfig
from gptoss_jax.kernels import backend
from gptoss_jax.kernels.cpu import adamw
from gptoss_jax.model.parameters import is_matrix, letters_of, parameter_name, parameter_shardings


def decay_mask(params: Any) -> Any:
    """Returns a mask of the parameters with weight decay: matrices, but not norms, biases or sinks."""
    return jax.tree_util.tree_map_with_path(lambda path, _: is_matrix(path), params)


def muon_dimensions(params: Any) -> Any:
    """Returns the input and output axes, counted from the end, of each parameter that Muon updates (matrices
    of attention and experts); None for the others, including the router.

    All other axes (layers, experts, gate and up) are batch axes of separately orthogonalized matrices.
    """

    def dimensions(path, leaf):
        letters = letters_of(path) or ""
        is_outside = parameter_name(path).startswith(("moe.router", "head."))
        if not is_matrix(path) or is_outside or set("Ve") & set(letters):
            return None
        axes = [letters.index(letter) - len(letters) for letter in letters if letter not in "EP"]
        num_inputs = 1 if letters[axes[0]] in "Dr" else len(axes) - 1
        return MuonDimensionNumbers(tuple(axes[:num_inputs]), tuple(axes[num_inputs:]))

    return jax.tree_util.tree_map_with_path(dimensions, params)


def make_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate by step (from 0): linear warmup to the peak, then `cosine` or `wsd` decay to
    `min_lr_ratio` of it, or `constant`."""
    peak, final = config.learning_rate, config.learning_rate * config.min_lr_ratio
    warmup_steps = min(config.warmup_steps, steps - 1)
    # The first of n warmup steps has 1/n of the peak, not 0.
    warmup = optax.linear_schedule(peak / max(warmup_steps, 1), peak, max(warmup_steps - 1, 1))
    if config.schedule == "constant":
        return optax.join_schedules([warmup, optax.constant_schedule(peak)], [warmup_steps])
    remaining = max(steps - 1 - warmup_steps, 1)
    if config.schedule == "cosine":
        decay = optax.cosine_decay_schedule(peak, remaining, alpha=config.min_lr_ratio)
        return optax.join_schedules([warmup, decay], [warmup_steps])
    decay_steps = min(max(round(steps * config.decay_fraction), 1), remaining)
    phases = [warmup, optax.constant_schedule(peak), optax.linear_schedule(peak, final, decay_steps)]
    return optax.join_schedules(phases, [warmup_steps, warmup_steps + remaining - decay_steps])


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformationExtraArgs:
    """AdamW (Loshchilov and Hutter 2019), or Muon (Jordan et al. 2024) for the matrices inside the blocks and
    AdamW for the rest, on the clipped gradient.

    Its `update` has an additional argument, `finite`: if it is False, the state is unchanged. Muon's updates
    are scaled to the magnitude of AdamW's (Liu et al. 2025, "Muon is Scalable for LLM Training"), so that
    both share one learning rate. With Muon, weight decay applies only to Muon's matrices.
    """
    schedule = make_schedule(config, steps)
    if config.name == "adamw":
        optimizer: optax.GradientTransformation = optax.chain(
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

        def keep_finite(new, old):
            # `_scale_by_adam` has already selected the moments: a second select would copy them.
            return new if config.name == "adamw" and new.ndim else jnp.where(finite, new, old)

        return updates, jax.tree.map(keep_finite, new_state, state)

    # optax's type does not support required arguments.
    return optax.GradientTransformationExtraArgs(init, update)  # type: ignore[arg-type]


def _scale_by_adam(config: OptimConfig) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_adam` that keeps the moments if `finite` is False.

    The barrier makes the update depend on the new moments. Otherwise, the compiler computes it from the old
    moments, which it must then copy before overwriting them.
    """
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)

    def update(gradients, state, params=None, *, finite, **_):
        def moment(order, decay, olds):
            news = optax.tree.update_moment(gradients, olds, decay, order)
            return jax.tree.map(lambda new, old: jnp.where(finite, new, old), news, olds)

        count = optax.safe_increment(state.count)
        moments = moment(1, config.beta1, state.mu), moment(2, config.beta2, state.nu)
        mu, nu = jax.lax.optimization_barrier(moments)
        updates = jax.tree.map(
            lambda m, v: m / (jnp.sqrt(v) + config.epsilon),
            optax.tree.bias_correction(mu, config.beta1, count),
            optax.tree.bias_correction(nu, config.beta2, count),
        )
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(adam.init, update)  # type: ignore[arg-type]


def _clip(max_norm: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` as a multiplication by one factor. optax's division would write all clipped
    gradients to memory before the optimizer reads them."""

    def update(gradients, state, params=None):
        factor = _clip_factor(optax.tree.norm(gradients), max_norm)
        return jax.tree.map(lambda g: g * factor, gradients), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _clip_factor(norm: jax.Array, max_norm: float) -> jax.Array:
    return jnp.where(norm > max_norm, max_norm / norm, 1.0)


def global_norm(gradients: Any) -> jax.Array:
    """Returns the Euclidean norm of all gradients together: a kernel's on one CPU device, otherwise
    optax's."""
    leaves = jax.tree.leaves(gradients)
    if not backend.is_multi_device() and adamw.is_supported(leaves):
        return adamw.global_norm(leaves)
    return optax.tree.norm(gradients)


def apply_gradients(
    config: OptimConfig,
    steps: int,
    params: Any,
    opt_state: optax.OptState,
    gradients: Any,
    *,
    norm: jax.Array,
    finite: jax.Array,
) -> tuple[Any, optax.OptState]:
    """Returns the parameters and the optimizer state after a step; the same as before if `finite` is False.

    AdamW on CPU is one pass over memory in a kernel, on each device over its own shards. It equals
    `make_optimizer` to a few units in the last place of the moments and of the update.

    Args:
      steps: of the whole run, for the schedule.
      norm: `global_norm` of the gradients.
    """
    if config.name == "adamw" and adamw.is_supported(jax.tree.leaves((params, gradients))):
        return _apply_adamw_kernel(config, steps, params, opt_state, gradients, norm=norm, finite=finite)
    optimizer = make_optimizer(config, steps)
    updates, opt_state = optimizer.update(gradients, opt_state, params, finite=finite)
    new_params = optax.apply_updates(params, updates)
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new_params, params), opt_state


def _apply_adamw_kernel(
    config: OptimConfig,
    steps: int,
    params: Any,
    opt_state: Any,
    gradients: Any,
    *,
    norm: jax.Array,
    finite: jax.Array,
) -> tuple[Any, optax.OptState]:
    """`apply_gradients` by the kernel."""
    # Clipping is a transformation before the others.
    adam, masked, schedule = opt_state[1] if config.max_grad_norm else opt_state
    next_count = optax.safe_increment(adam.count)
    scalars = (
        finite,
        _clip_factor(norm, config.max_grad_norm) if config.max_grad_norm else 1.0,
        make_schedule(config, steps)(schedule.count),
        # As in optax's bias correction.
        1 - config.beta1**next_count,
        1 - config.beta2**next_count,
    )
    structure = jax.tree.structure(params)
    decays = [config.weight_decay * is_decayed for is_decayed in jax.tree.leaves(decay_mask(params))]
    constants = adamw.AdamW(config.beta1, config.beta2, config.epsilon, tuple(decays))
    update: Any = functools.partial(adamw.update, constants)
    if backend.is_multi_device():
        mesh = jax.sharding.get_abstract_mesh()
        specs = [sharding.spec for sharding in jax.tree.leaves(parameter_shardings(params, mesh))]
        update = jax.shard_map(
            update, in_specs=(specs, specs, (specs, specs), P()), out_specs=(specs,) * 3, check_vma=False
        )
    leaves = [jax.tree.leaves(tree) for tree in (params, gradients, adam.mu, adam.nu)]
    packed = jnp.stack([jnp.asarray(scalar, jnp.float32) for scalar in scalars])
    results = update(leaves[0], leaves[1], (leaves[2], leaves[3]), packed)
    params, mu, nu = (jax.tree.unflatten(structure, arrays) for arrays in results)

    def count_if_finite(count):
        return jnp.where(finite, optax.safe_increment(count), count)

    adam = optax.ScaleByAdamState(count_if_finite(adam.count), mu, nu)
    schedule = optax.ScaleByScheduleState(count_if_finite(schedule.count))
    chain = adam, masked, schedule
    return params, (opt_state[0], chain) if config.max_grad_norm else chain
