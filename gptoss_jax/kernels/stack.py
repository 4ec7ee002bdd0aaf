"""One layer of arrays that are stacked by layer, not cut out of the stack before somebody needs it alone."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layer:
    """`stack[index]`, where `index` may be traced and is from 0 to the stack's length - 1.

    A loop over layers that cuts every weight out of its stack copies all of them. To train, that is little;
    to decode, where a weight is used for a few rows and most experts for none, it is most of the work. What
    knows of this class reads the stack in place; to everything else it is an array, that of the layer.
    """

    stack: jax.Array
    index: jax.Array | int

    @property
    def dtype(self) -> jnp.dtype:
        return self.stack.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stack.shape[1:]

    @property
    def ndim(self) -> int:
        return self.stack.ndim - 1

    def __jax_array__(self) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(self.stack, jnp.int32(self.index), keepdims=False)

    def __getitem__(self, key) -> "Layer":
        """As a Variable's `[...]`: the whole of it."""
        if key is not Ellipsis:
            raise TypeError("of a Layer only the whole can be taken, layer[...]")
        return self

    def astype(self, dtype: jnp.dtype) -> "Layer | jax.Array":
        """The layer in a type; where it has another one, the layer alone is converted, not the stack."""
        return self if self.dtype == dtype else self.__jax_array__().astype(dtype)


def layer_of(weight: jax.Array | Layer) -> Layer:
    """A weight as a layer, of a stack of one where it is alone."""
    return weight if isinstance(weight, Layer) else Layer(weight[None], 0)
