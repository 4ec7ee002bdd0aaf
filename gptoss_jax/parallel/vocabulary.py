"""Embedding and loss on a mesh: tokens travel to the shards of the vocabulary, instead of the tables.

A device that holds a part of a table receives the tokens of the devices that hold the other parts, and
returns what it computes for them: vectors of the embedding, or gradients of hidden states, which are summed.
Where that would send more, because there are many tokens or the vocabulary is small, the table is gathered.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gptoss_jax.kernels.shapes import assert_shapes
from gptoss_jax.parallel.linear import reduce_scatter, sum_over_replicas
from gptoss_jax.parallel.mesh import BATCH, current_axes
from gptoss_jax.parallel.rules import ROWS, spec_axes, storage_spec


def embedding_lookup(weight_VD: jax.Array, tokens_BT: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
    """Returns `weight_VD[tokens_BT]`, [B, T, D], sharded like a batch, in `dtype` (default: the weight's).

    The gradients of all occurrences of a token are summed in float32.
    """
    assert_shapes("VD BT", weight_VD, tokens_BT)
    dtype = jnp.dtype(weight_VD.dtype if dtype is None else dtype)
    if not current_axes():
        return weight_VD[tokens_BT].astype(dtype)
    return _lookup_on_mesh(weight_VD, tokens_BT, dtype)


class _Lookup(NamedTuple):
    """How an embedding is looked up: the axes of its rows and columns with more than one device."""

    stored: P
    # Axes that split the rows during the lookup, major first, and those of them that also split the tokens.
    rows: tuple[str, ...]
    exchanged: tuple[str, ...]
    # Axes over which the table's rows are gathered instead of exchanging tokens.
    gathered: tuple[str, ...]
    columns: tuple[str, ...]


def _lookup(shape: tuple[int, ...], num_tokens: int, dtype: jnp.dtype) -> _Lookup:
    axes = current_axes()
    stored = storage_spec("VD", shape, axes, "embedding.weight")
    rows, columns = (tuple(axis for axis in spec_axes(entry) if axes[axis] > 1) for entry in stored)
    exchanged = tuple(axis for axis in rows if axis in BATCH)
    # Bytes for each column: of tokens, in both passes; of the table, and of its float32 gradient.
    alone = math.prod(axes[axis] for axis in BATCH if axis not in exchanged + columns)
    tokens = 2 * dtype.itemsize * num_tokens / alone
    table = (dtype.itemsize + 4) * shape[0] / axes["tensor"]
    if tokens < table:
        return _Lookup(stored, rows, exchanged, (), columns)
    return _Lookup(stored, tuple(axis for axis in rows if axis not in BATCH), (), exchanged, columns)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _lookup_on_mesh(weight_VD: jax.Array, tokens_BT: jax.Array, dtype: jnp.dtype) -> jax.Array:
    how = _lookup(weight_VD.shape, tokens_BT.size, dtype)

    def one_device(weight_VD, tokens_BT):
        weight_VD = _gather(weight_VD.astype(dtype), how.gathered)
        index_BT, is_local_BT = local_vocab_index(_all_tokens(tokens_BT, how), weight_VD.shape[0], how.rows)
        x_BTD = jnp.where(is_local_BT[..., None], weight_VD[index_BT], 0)
        # Exact in any dtype: all but one summand are zero.
        x_BTD = _scatter(x_BTD, how.exchanged)
        if how.columns:
            x_BTD = jax.lax.all_to_all(x_BTD, how.columns, split_axis=0, concat_axis=2, tiled=True)
        rest = tuple(axis for axis in how.rows if axis not in how.exchanged)
        return jax.lax.psum(x_BTD, rest) if rest else x_BTD

    mapped = jax.shard_map(one_device, in_specs=(how.stored, ROWS), out_specs=ROWS, check_vma=False)
    return mapped(weight_VD, tokens_BT)


def _lookup_backward(
    dtype: jnp.dtype, residuals: tuple[jax.Array, jax.Array], g_BTD: jax.Array
) -> tuple[jax.Array, None]:
    weight_VD, tokens_BT = residuals
    how = _lookup(weight_VD.shape, tokens_BT.size, dtype)

    def one_device(weight_VD, tokens_BT, g_BTD):
        if how.columns:
            g_BTD = jax.lax.all_to_all(g_BTD, how.columns, split_axis=2, concat_axis=0, tiled=True)
        g_BTD = _gather(g_BTD, how.exchanged)
        V = weight_VD.shape[0] * math.prod(current_axes()[axis] for axis in how.gathered)
        index_BT, is_local_BT = local_vocab_index(_all_tokens(tokens_BT, how), V, how.rows)
        index_BT = jnp.where(is_local_BT, index_BT, V)
        d_VD = jnp.zeros((V, weight_VD.shape[1]), jnp.float32)
        d_VD = _scatter(d_VD.at[index_BT].add(g_BTD.astype(jnp.float32), mode="drop"), how.gathered)
        return sum_over_replicas(d_VD, how.stored).astype(weight_VD.dtype)

    specs = how.stored, ROWS, ROWS
    mapped = jax.shard_map(one_device, in_specs=specs, out_specs=how.stored, check_vma=False)
    return mapped(weight_VD, tokens_BT, g_BTD), None


_lookup_on_mesh.defvjp(
    lambda weight_VD, tokens_BT, dtype: (
        _lookup_on_mesh(weight_VD, tokens_BT, dtype),
        (weight_VD, tokens_BT),
    ),
    _lookup_backward,
)


def _all_tokens(tokens_BT: jax.Array, how: _Lookup) -> jax.Array:
    """Inside `shard_map`: returns the tokens of all devices that hold parts of the table for each other."""
    return _gather(_gather(tokens_BT, how.columns), how.exchanged)


def _gather(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return jax.lax.all_gather(x, axes, axis=0, tiled=True) if axes else x


def _scatter(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return reduce_scatter(x, axes, 0) if axes else x


def local_vocab_index(tokens_BT: jax.Array, size: int, axes: tuple[str, ...]) -> tuple[jax.Array, jax.Array]:
    """Inside `shard_map`: returns each token's index in this device's `size` rows of the vocabulary, which
    `axes` split, and a mask of the tokens that are in them (elsewhere, the index is 0)."""
    index_BT = tokens_BT - jax.lax.axis_index(axes) * size if axes else tokens_BT
    is_local_BT = (index_BT >= 0) & (index_BT < size)
    return jnp.where(is_local_BT, index_BT, 0), is_local_BT


class HeadSplit(NamedTuple):
    """How the loss splits the vocabulary over devices."""

    # Axes that split the vocabulary, major first.
    vocabulary: tuple[str, ...] = ()
    # Those of them that also split the batch: their devices exchange hidden states.
    exchanged: tuple[str, ...] = ()

    def over_vocabulary(self, reduce: Callable, x: jax.Array) -> jax.Array:
        """Inside `shard_map`: reduces `x`, by `psum` or `pmax`, over the shards of the vocabulary."""
        return reduce(x, self.vocabulary) if self.vocabulary else x

    def exchange(self, x: jax.Array, axis: int = 0) -> jax.Array:
        """Inside `shard_map`: gathers the rows, along `axis`, of the devices that exchange hidden states."""
        return jax.lax.all_gather(x, self.exchanged, axis=axis, tiled=True) if self.exchanged else x

    def reduce(self, x: jax.Array) -> jax.Array:
        """Inside `shard_map`: the transpose of `exchange`."""
        return _scatter(x, self.exchanged)

    def own_rows(self, x: jax.Array) -> jax.Array:
        """Inside `shard_map`: returns this device's rows of an array that `exchange` would give."""
        if not self.exchanged:
            return x
        size = x.shape[0] // math.prod(current_axes()[axis] for axis in self.exchanged)
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(self.exchanged) * size, size)

    def sum_over_tensor(self, x: jax.Array) -> jax.Array:
        """Inside `shard_map`: sums over the shards of the vocabulary that `reduce` has not summed over."""
        rest = tuple(axis for axis in self.vocabulary if axis not in self.exchanged)
        return jax.lax.psum(x, rest) if rest else x


def split_head(stored: Sequence[P], size: int, num_tokens: int) -> HeadSplit:
    """Returns the split of a head for which a device sends least.

    Args:
      stored: the storage specs of the head's weights, first [V, D].
      size: V.
      num_tokens: tokens of one device.
    """
    axes = current_axes()
    rows, columns = _batch_axes(stored[0])
    # An adapter has no columns that could be exchanged for rows.
    options = [(), rows, columns, rows + columns] if len(stored) == 1 else [(), rows]

    def devices(exchanged):
        return math.prod(axes[axis] for axis in exchanged)

    def sent(exchanged):
        """Rows that a device sends: hidden states, and the part of the table that is gathered."""
        is_gathered = len(exchanged) < len(rows + columns)
        return devices(exchanged) * num_tokens + is_gathered * size // axes["tensor"] // devices(exchanged)

    exchanged = min((one for one in options if size % (axes["tensor"] * devices(one)) == 0), key=sent)
    return HeadSplit(("tensor", *exchanged), exchanged)


def head_shard(weight: jax.Array, stored: P, split: HeadSplit) -> jax.Array:
    """Inside `shard_map`: returns a device's rows of the vocabulary, with all columns."""
    rows, columns = _batch_axes(stored)
    if not set(rows) <= set(split.exchanged):
        weight = _gather(weight, rows)
    if columns and set(columns) <= set(split.exchanged):
        return jax.lax.all_to_all(weight, columns, split_axis=0, concat_axis=1, tiled=True)
    return jax.lax.all_gather(weight, columns, axis=1, tiled=True) if columns else weight


def head_gradient(g: jax.Array, stored: P, split: HeadSplit) -> jax.Array:
    """Inside `shard_map`: the transpose of `head_shard`, summed over all axes that split the batch."""
    rows, columns = _batch_axes(stored)
    if columns and set(columns) <= set(split.exchanged):
        g = jax.lax.all_to_all(g, columns, split_axis=1, concat_axis=0, tiled=True)
    elif columns:
        g = reduce_scatter(g, columns, 1)
    if not set(rows) <= set(split.exchanged):
        g = _scatter(g, rows)
    return sum_over_replicas(g, stored)


def _batch_axes(stored: P) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the axes that split both the batch and the rows, and those that split batch and columns."""
    sizes = current_axes()
    rows, columns = (
        tuple(axis for axis in spec_axes(entry) if axis in BATCH and sizes[axis] > 1) for entry in stored
    )
    return rows, columns
