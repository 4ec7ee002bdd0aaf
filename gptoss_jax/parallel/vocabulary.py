"""The vectors of the vocabulary, [V, D], on a mesh: looked up by tokens, multiplied with hidden states.

They are the largest single parameters. Each device of the tensor axis has a part of the rows; devices of the
other axes, which split the batch, share them in storage and each use all.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gptoss_jax.parallel.mesh import BATCH, current_axes
from gptoss_jax.parallel.sharding import constrain, gather_as, parameter_spec

_VOCABULARY = tuple(map(jax.tree_util.DictKey, ("head", "weight")))


def gather_vocabulary(weight_VD: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The vectors of the embedding or of the head as they are used, cast first: whole but for the tensor
    axis."""
    weight_VD = weight_VD.astype(dtype)
    return gather_as(_VOCABULARY, weight_VD) if current_axes() else weight_VD


def vocabulary_shards(gradients_CVD: jax.Array) -> jax.Array:
    """The sum of what each device adds to the gradient of those vectors, as it is stored."""
    gradient_VD = jnp.sum(gradients_CVD, axis=0)
    axes = current_axes()
    return constrain(gradient_VD, parameter_spec(_VOCABULARY, gradient_VD.shape, axes))


@jax.custom_vjp
def look_up(weight_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """`weight_VD[tokens_BT]` for vectors of the vocabulary, stored in shards: [B, T, D], split like a batch.

    Each device looks up its own rows, and adds up their gradient alone: left to itself, the compiler spreads
    rows and batch over the same axes, and moves every activation to do so.
    """
    return _look_up(weight_VD, tokens_BT)[0]


def _look_up(weight_VD, tokens_BT):
    def one_device(weight_VD, tokens_BT):
        index_BT, is_here_BT = _local(tokens_BT, weight_VD.shape[0])
        return jax.lax.psum(jnp.where(is_here_BT[..., None], weight_VD[index_BT], 0), "tensor")

    kept = tokens_BT, weight_VD[:, :0]
    if not current_axes():
        return weight_VD[tokens_BT], kept
    used = gather_vocabulary(weight_VD, weight_VD.dtype)
    specs = {"in_specs": (P("tensor"), P(BATCH)), "out_specs": P(BATCH), "check_vma": False}
    return jax.shard_map(one_device, **specs)(used, tokens_BT), kept


def _local(tokens_BT, size):
    """Where tokens stand in this device's part of the vocabulary, and whether they do."""
    index_BT = tokens_BT - jax.lax.axis_index("tensor") * size
    is_here_BT = (index_BT >= 0) & (index_BT < size)
    return jnp.where(is_here_BT, index_BT, 0), is_here_BT


def _look_up_backward(kept, g_BTD):
    tokens_BT, nothing = kept
    rows = nothing.shape[0]
    axes = current_axes()
    if not axes:
        return jnp.zeros((rows, g_BTD.shape[-1]), nothing.dtype).at[tokens_BT].add(g_BTD), None

    def one_device(tokens_BT, g_BTD):
        empty_VD = jnp.zeros((rows // axes["tensor"], g_BTD.shape[-1]), g_BTD.dtype)
        index_BT, is_here_BT = _local(tokens_BT, empty_VD.shape[0])
        return empty_VD.at[index_BT].add(jnp.where(is_here_BT[..., None], g_BTD, 0))[None]

    specs = {"in_specs": (P(BATCH), P(BATCH)), "out_specs": P(BATCH, "tensor"), "check_vma": False}
    return vocabulary_shards(jax.shard_map(one_device, **specs)(tokens_BT, g_BTD)), None


look_up.defvjp(_look_up, _look_up_backward)
