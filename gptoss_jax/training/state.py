"""The train state, created directly in its final sharding."""

import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh

from gptoss_jax.config import TrainConfig, require
from gptoss_jax.model.parameters import IsTrainable, parameter_shardings, split_params
from gptoss_jax.model.transformer import abstract_params, init_params
from gptoss_jax.training.optimizer import make_optimizer

Tree = TypeVar("Tree")
# JAX's name of the memory of a host that its devices can read and write.
HOST_MEMORY = "pinned_host"


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


def state_shardings(config: TrainConfig, state: TrainState, mesh: Mesh | AbstractMesh) -> TrainState:
    """Returns the sharding of every leaf of a train state, including its memory."""
    shardings = parameter_shardings(state, mesh)
    if config.optim.state_memory == "device":
        return shardings

    def on_host(leaf, sharding):
        return sharding.with_memory_kind(HOST_MEMORY) if leaf.ndim else sharding

    return dataclasses.replace(
        shardings, opt_state=jax.tree.map(on_host, state.opt_state, shardings.opt_state)
    )


def check_state_memory(config: TrainConfig, device: jax.Device) -> None:
    """Raises ValueError if the optimizer state is to be kept in host memory that the device cannot read."""
    kinds = {memory.kind for memory in device.addressable_memories()}
    memory, has_host = config.optim.state_memory, HOST_MEMORY in kinds
    allowed = f"must be 'device': JAX has no {HOST_MEMORY} memory on {device.platform}"
    require(memory == "device" or has_host, "optim.state_memory", memory, allowed)


def move_arrays(opt_state: Tree, space: Any) -> Tree:
    """Moves the arrays of an optimizer state, except scalars, to a `jax.memory.Space`."""
    return jax.tree.map(lambda leaf: jax.device_put(leaf, space) if leaf.ndim else leaf, opt_state)


def place_on_mesh(shapes: Tree, mesh: Mesh | AbstractMesh) -> Tree:
    """Adds shardings to an abstract parameter tree or train state."""
    return _with_shardings(shapes, parameter_shardings(shapes, mesh))


def _with_shardings(shapes: Tree, shardings: Any) -> Tree:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def abstract_state(
    config: TrainConfig, mesh: Mesh | AbstractMesh, is_trainable: IsTrainable | None = None
) -> TrainState:
    """Returns the shapes, dtypes and shardings of the state, without allocating it."""
    params, _ = split_params(abstract_params(config.model), is_trainable)
    state = jax.eval_shape(lambda params: _init_without_params(config, params), params)
    state = dataclasses.replace(state, params=params)
    return _with_shardings(state, state_shardings(config, state, mesh))


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

    shardings = state_shardings(config, jax.eval_shape(init, params), mesh)
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
