"""Grouped matmul in plain XLA: a loop over tiles of rows, so work grows with R, not with E R."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from gptoss_jax.kernels.group_tiles import RowTile, as_matrices, make_group_metadata

Carry = TypeVar("Carry", bound=jax.Array | tuple[jax.Array, ...])


@jax.custom_vjp
def xla_grouped_matmul(x_RD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """`grouped_matmul` without a bias."""
    w_EDF = as_matrices(w_EDF)

    def add_tile(tile, group, y_RF):
        return tile.write(y_RF, _matmul(tile.read(x_RD), w_EDF[group]))

    return _fold_tiles(add_tile, jnp.zeros((x_RD.shape[0], w_EDF.shape[2]), x_RD.dtype), group_sizes_E)


def _backward(
    residuals: tuple[jax.Array, jax.Array, jax.Array], g_RF: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x_RD, stored, group_sizes_E = residuals
    w_EDF = as_matrices(stored)

    def add_tile(tile, group, gradients):
        dx_RD, dw_EDF = gradients
        x, g = tile.read(x_RD), tile.read(g_RF)
        dw = jnp.matmul(x.T, g, precision="highest", preferred_element_type=dw_EDF.dtype)
        return tile.write(dx_RD, _matmul(g, w_EDF[group].T)), dw_EDF.at[group].add(dw)

    # A group may have many tiles: summing them takes more precision than bfloat16's 8 bits.
    wide = jnp.promote_types(w_EDF.dtype, jnp.float32)
    zeros = jnp.zeros_like(x_RD), jnp.zeros(w_EDF.shape, wide)
    dx_RD, dw_EDF = _fold_tiles(add_tile, zeros, group_sizes_E)
    return dx_RD, dw_EDF.astype(stored.dtype).reshape(stored.shape), None


xla_grouped_matmul.defvjp(lambda *arguments: (xla_grouped_matmul(*arguments), arguments), _backward)


def _matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.matmul(x, w, precision="highest")


def _fold_tiles(
    step: Callable[[RowTile, jax.Array, Carry], Carry], carry: Carry, group_sizes_E: jax.Array
) -> Carry:
    """Folds `step(tile, group, carry)` over all tiles; the arrays of the carry are indexed by row."""
    rows = jax.tree.leaves(carry)[0].shape[0]
    # Tiles of half the mean group size, so that few of them are mostly empty.
    mean = rows // group_sizes_E.shape[0]
    tile_rows = min(rows, next((size for size in (128, 64, 32) if mean >= 2 * size), 16))
    tiles = make_group_metadata(group_sizes_E, rows, tile_rows)

    def one(index, carry):
        return step(RowTile.of(tiles, index, rows, tile_rows), tiles.group_V[index], carry)

    return lax.fori_loop(0, tiles.num_tiles, one, carry)
