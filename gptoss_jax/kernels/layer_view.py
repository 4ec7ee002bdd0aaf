"""A view of one layer in a parameter stacked over layers."""

import dataclasses

import jax
import jax.numpy as jnp

from gptoss_jax.kernels import backend


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerView:
    """The layer `stack[index]`, which kernels read in place.

    A scan that slices weights out of their stacks copies all of them. That is cheap in training; in decoding,
    which uses a weight for a few rows and most experts for none, the copies would dominate.
    """

    stack: jax.Array  # [L, …]
    index: jax.Array | int  # may be traced; from 0 to L - 1

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the layer, without the stacked dimension."""
        return self.stack.shape[1:]

    @property
    def dtype(self) -> jnp.dtype:
        return self.stack.dtype

    def read(self) -> jax.Array:
        """Returns the layer as an array; XLA copies it out of the stack."""
        return jax.lax.dynamic_index_in_dim(self.stack, jnp.int32(self.index), keepdims=False)


def read(weight: jax.Array | LayerView) -> jax.Array:
    """Returns a weight as an array."""
    return weight.read() if isinstance(weight, LayerView) else weight


def as_view(weight: jax.Array | LayerView) -> LayerView:
    """Returns a weight as a view; an array becomes a stack of one layer."""
    return weight if isinstance(weight, LayerView) else LayerView(weight[None], 0)


def cast(weight: jax.Array | LayerView, dtype: jnp.dtype) -> jax.Array | LayerView:
    """Casts a weight to `dtype`; reads the layer only if a cast is needed."""
    return weight if weight.dtype == dtype else cast_layer(read(weight), dtype)


def cast_layer(weight: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns `weight.astype(dtype)` for the weight of one layer; on TPU, casts only this layer.

    The TPU compiler moves a plain cast out of the loop over layers: the cast weights of all layers would be
    in memory during both passes. It does not move the reduction of precision, which is the same rounding.
    """
    if backend.platform() == "tpu" and (weight.dtype, dtype) == (jnp.float32, jnp.bfloat16):
        bfloat16 = jnp.finfo(dtype)
        weight = jax.lax.reduce_precision(weight, bfloat16.nexp, bfloat16.nmant)
    return weight.astype(dtype)


def as_groups(weight: jax.Array | LayerView, group_sizes_E: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns one matrix per group of rows, and the sizes of the groups.

    For a view, these are the matrices of all layers in its stack, [L E, …], with zero rows for those of other
    layers. Kernels that read only the matrices of nonempty groups thus read the stack in place.
    """
    if not isinstance(weight, LayerView):
        return weight, group_sizes_E
    L, E = weight.stack.shape[:2]
    sizes = jax.lax.dynamic_update_slice(
        jnp.zeros(L * E, jnp.int32), group_sizes_E, (jnp.int32(weight.index * E),)
    )
    return weight.stack.reshape(L * E, *weight.shape[1:]), sizes
