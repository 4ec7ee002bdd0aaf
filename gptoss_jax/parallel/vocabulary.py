"""The vectors of the vocabulary, [V, D], on a mesh: looked up by tokens, and where the loss is taken.

They are the largest single parameters. Each device of the tensor axis has a part of the rows; devices of the
other axes, which split the batch, share them in storage and each use all.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gptoss_jax.parallel.mesh import BATCH, current_axes
from gptoss_jax.parallel.rules import gathered, parameter_spec, sum_over_tensor, used_spec

_PATH = tuple(map(jax.tree_util.DictKey, ("embedding", "weight")))


def vocabulary_specs(shape: tuple[int, int]) -> tuple[P, P]:
    """Where such vectors are stored, and where they are used, on the mesh there is."""
    return parameter_spec(_PATH, shape, current_axes()), used_spec(_PATH, 2)


def place_in_part(tokens_BT: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Inside of `shard_map`: where tokens stand in this device's part of the vocabulary, if they do."""
    index_BT = tokens_BT - jax.lax.axis_index("tensor") * size
    is_here_BT = (index_BT >= 0) & (index_BT < size)
    return jnp.where(is_here_BT, index_BT, 0), is_here_BT


def look_up(weight_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """`weight_VD[tokens_BT]` for vectors that are stored in shards: [B, T, D], split like a batch.

    Each device looks up its own rows, and adds up their gradient alone. Left to itself, the compiler spreads
    rows and batch over the same axes, and moves every activation to do so.
    """
    axes = current_axes()
    if not axes:
        return weight_VD[tokens_BT]
    stored, used = vocabulary_specs(weight_VD.shape)

    def one_device(weight_VD, tokens_BT):
        weight_VD = gathered(weight_VD, stored, used)
        if axes["tensor"] == 1:
            return weight_VD[tokens_BT]
        index_BT, is_here_BT = place_in_part(tokens_BT, weight_VD.shape[0])
        return sum_over_tensor(jnp.where(is_here_BT[..., None], weight_VD[index_BT], 0))

    specs = {"in_specs": (stored, P(BATCH)), "out_specs": P(BATCH)}
    return jax.shard_map(one_device, **specs, check_vma=False)(weight_VD, tokens_BT)
