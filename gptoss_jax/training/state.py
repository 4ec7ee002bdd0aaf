"""All that training changes, as one tree, made where it belongs on the mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from gptoss_jax.config import TrainConfig
from gptoss_jax.model.parameters import parameter_shardings
from gptoss_jax.model.transformer import init_params
from gptoss_jax.training.optimizer import make_optimizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a step reads and writes."""

    # Steps taken, those that were skipped included; int32.
    step: jax.Array
    # float32 tree of the model.
    params: dict
    # The optimiser's state over it.
    opt_state: optax.OptState
    # Root of dropout's random numbers; each step folds its number in.
    key: jax.Array
    # Steps that changed nothing because loss or gradient was not finite: in all, and the latest in a row;
    # int32.
    skipped: jax.Array
    skipped_in_a_row: jax.Array


def abstract_state(config: TrainConfig, mesh: Mesh) -> TrainState:
    """Shapes, types and shardings of the state, nothing allocated."""
    shapes = jax.eval_shape(lambda: _fresh_state(config))
    shardings = parameter_shardings(shapes, mesh)
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def create_state(config: TrainConfig, mesh: Mesh, params: dict | None = None) -> TrainState:
    """The state before the first step. Every device makes its own shards; the whole is nowhere.

    `params`: the weights to start from, placed as those of `abstract_state` are; None makes random ones.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
    if params is None:
        return jax.jit(lambda: _fresh_state(config), out_shardings=shardings)()
    # The random weights are not computed where nobody asks for them.
    rest = jax.jit(
        lambda: dataclasses.replace(_fresh_state(config), params=None),
        out_shardings=dataclasses.replace(shardings, params=None),
    )
    return dataclasses.replace(rest(), params=params)


def _fresh_state(config: TrainConfig) -> TrainState:
    weights_key, dropout_key = jax.random.split(jax.random.key(np.uint32(config.seed % (1 << 32))))
    params = init_params(config.model, weights_key)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero,
        params=params,
        opt_state=make_optimizer(config.optim, config.steps).init(params),
        key=jax.random.key_data(dropout_key),
        skipped=zero,
        skipped_in_a_row=zero,
    )
