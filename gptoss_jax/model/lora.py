"""LoRA (Hu et al. 2021): adapters next to frozen weights, y = x W + scaling (x A) B; never merges weights.

An adapted weight `name` has float32 parameters `name_lora_a` and `name_lora_b` in the same module; each
expert has a separate pair. They are cast to the compute dtype for use.
"""

import math
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from gptoss_jax.config import ModelConfig
from gptoss_jax.model.parameters import LETTERS, adapted_target, shape_of, zeros
from gptoss_jax.parallel.linear import sharded_einsum

SUFFIXES = "lora_a", "lora_b"


class Adaptable(Protocol):
    """A module with weights, their adapters and the model's config."""

    config: ModelConfig


def is_adapter(path: tuple[str, ...]) -> bool:
    """Returns True for the path of an adapter parameter; LoRA trains only these."""
    return path[-1].endswith(SUFFIXES)


def adapter_names(config: ModelConfig, module: str | None = None) -> list[str]:
    """Returns the names of adapter parameters, such as `attention.q_lora_a`, in one module or in all."""
    targets = () if config.lora is None else config.lora.targets
    names = [name for name in LETTERS if adapted_target(name) in targets]
    return [name for name in names if module in (None, name.partition(".")[0])]


def add_adapters(module: nnx.Module, config: ModelConfig, name: str, rngs: nnx.Rngs) -> None:
    """Adds adapters to a module, initialized as in PEFT: A is uniform within 1 / sqrt(inputs), and B is
    zero, so that the model is initially equal to its base."""
    for key in adapter_names(config, name):
        if key.endswith("lora_a"):
            shape = shape_of(config, key)
            # The number of inputs: all dimensions except experts and rank.
            bound = math.prod(shape[LETTERS[key].startswith("E") : -1]) ** -0.5
            param = nnx.Param(jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound))
        else:
            param = zeros(config, key)
        setattr(module, key.rpartition(".")[2], param)


def scaling(config: ModelConfig, target: str) -> float:
    """Returns the scaling of a target's adapters; 1 without adapters."""
    return 1.0 if config.lora is None else config.lora.scaling(config.lora_rank(target))


def adapted_einsum(module: Adaptable, equation: str, x: jax.Array, names: tuple[str, ...]) -> list[jax.Array]:
    """Returns `sharded_einsum` of `x` and weights of a module, including their adapters.

    Args:
      module: the module with the parameters.
      equation: the equation for `x` and each weight, such as "BTD,DNH->BTNH".
      names: the names of the weights.
    """
    weights = tuple(getattr(module, name).get_value() for name in names)
    results = list(sharded_einsum(equation, x, weights))
    x_letters, w_letters, y_letters = equation.replace("->", ",").split(",")
    kept = "".join(letter for letter in x_letters if letter in y_letters)
    summed = "".join(letter for letter in x_letters if letter not in y_letters)
    outputs = "".join(letter for letter in y_letters if letter not in x_letters)
    adapted = [i for i, name in enumerate(names) if hasattr(module, f"{name}_lora_a")]
    if not adapted:
        return results
    a, b = (
        tuple(getattr(module, f"{names[i]}_{suffix}").get_value() for i in adapted) for suffix in SUFFIXES
    )
    hidden = sharded_einsum(f"{x_letters},{summed}r->{kept}r", x, a)
    for i, h, b_rO in zip(adapted, hidden, b, strict=True):
        h = h * scaling(module.config, names[i])
        # Cheap to recompute from h, so rematerialization does not save it.
        y = sharded_einsum(f"{kept}r,r{outputs}->{y_letters}", h, b_rO, None, None)
        results[i] = results[i] + y
    return results


@jax.custom_vjp
def add_delta(weight: jax.Array, delta: jax.Array) -> jax.Array:
    """Returns `weight + delta`, and exactly `weight` where the delta is 0: adding 0 would change the sign of
    a negative zero. Its gradients are those of the sum."""
    return jnp.where(delta != 0, weight + delta, weight)


add_delta.defvjp(lambda *operands: (add_delta(*operands), None), lambda _, g: (g, g))


def adapter_counts(config: ModelConfig) -> dict[str, int]:
    """Returns the number of adapter parameters by target, in all layers."""
    counts: dict[str, int] = {}
    for name in adapter_names(config):
        target, layers = adapted_target(name), 1 if name.startswith("head.") else config.num_hidden_layers
        assert target is not None, name
        counts[target] = counts.get(target, 0) + layers * math.prod(shape_of(config, name))
    return counts
