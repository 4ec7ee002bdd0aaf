"""The train state, created directly in its final sharding."""

import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh

from gptoss_jax.config import TrainConfig
from gptoss_jax.model.parameters import IsTrainable, parameter_shardings, split_params
from gptoss_jax.model.transformer import abstract_params, init_params
from gptoss_jax.training.optimizer import make_optimizer

Tree = TypeVar("Tree")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a training step updates."""

    # Steps taken, including skipped ones; int32.
    step: jax.Array
    # Trainable parameters, float32; None in place of frozen parameters.
    params: dict
    # Optimizer state of the trainable parameters.
    opt_state: optax.OptState
    # Root dropout key, into which each step folds its number; uint32.
    key: jax.Array
    # Number of skipped steps, whose loss or gradient was not finite; int32.
    skipped: jax.Array
    # Number of skipped steps without another one between them, up to the latest step; int32.
    skipped_in_a_row: jax.Array


def place_on_mesh(shapes: Tree, mesh: Mesh | AbstractMesh) -> Tree:
    """Adds shardings to an abstract parameter tree or train state."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        parameter_shardings(shapes, mesh),
    )


def abstract_state(
    config: TrainConfig, mesh: Mesh | AbstractMesh, is_trainable: IsTrainable | None = None
) -> TrainState:
    """Returns the shapes, dtypes and shardings of the state, without allocating it."""
    params, _ = split_params(abstract_params(config.model), is_trainable)
    state = jax.eval_shape(lambda params: _init_without_params(config, params), params)
    return place_on_mesh(dataclasses.replace(state, params=params), mesh)


def create_params(config: TrainConfig, mesh: Mesh) -> dict:
    """Returns random parameters of the whole model. Each device initializes only its own shards."""
    shardings = parameter_shardings(abstract_params(config.model), mesh)
    return jax.jit(lambda: init_params(config.model, parameter_key(config)), out_shardings=shardings)()


def create_state(config: TrainConfig, mesh: Mesh, params: dict | None = None) -> TrainState:
    """Returns the state before the first step. Each device initializes only its own shards.

    `params` are the trainable parameters, sharded as in `abstract_state`; None trains all, from random ones.
    """
    params = create_params(config, mesh) if params is None else params

    def init(params):
        return _init_without_params(config, params)

    shardings = parameter_shardings(jax.eval_shape(init, params), mesh)
    return dataclasses.replace(jax.jit(init, out_shardings=shardings)(params), params=params)


def parameter_key(config: TrainConfig) -> jax.Array:
    """Returns the key of a run's random parameters."""
    return _keys(config)[0]


def _keys(config: TrainConfig) -> jax.Array:
    """Returns the keys of parameters and dropout."""
    return jax.random.split(jax.random.key(np.uint32(config.seed % (1 << 32))))


def _init_without_params(config: TrainConfig, params: dict) -> TrainState:
    zero = jnp.zeros((), jnp.int32)
    absent: Any = None
    return TrainState(
        step=zero,
        params=absent,
        opt_state=make_optimizer(config.optim, config.steps).init(params),
        key=jax.random.key_data(_keys(config)[1]),
        skipped=zero,
        skipped_in_a_row=zero,
    )
