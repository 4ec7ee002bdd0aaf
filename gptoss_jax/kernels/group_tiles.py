"""Rows sorted by group, split into the tiles that kernels process.

Letters: R rows, E groups (experts), V tiles (elsewhere: vocabulary). Group sizes are int32 [E]; their sum may
be less than R.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


def group_bounds(group_sizes_E: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """Returns the first row of each group, and one past its last, int32 [E]; at most `rows`."""
    # Clamped, so that kernels never write out of bounds, even if the sizes add up to too much.
    ends_E = jnp.minimum(jnp.cumsum(group_sizes_E, dtype=jnp.int32), rows)
    return jnp.concatenate([jnp.zeros(1, jnp.int32), ends_E[:-1]]), ends_E


def group_of_row(group_sizes_E: jax.Array, rows: int) -> jax.Array:
    """Returns the group of each row, int32 [R]; E for rows without a group."""
    ends_E, row_R = jnp.cumsum(group_sizes_E, dtype=jnp.int32), jnp.arange(rows, dtype=jnp.int32)
    return jnp.searchsorted(ends_E, row_R, side="right", method="compare_all")


def as_matrices(w_EDF: jax.Array) -> jax.Array:
    """Flattens the dimensions after D: one matrix per group, [E, D, F]."""
    return w_EDF.reshape(*w_EDF.shape[:2], -1)


def zero_ungrouped(x_RD: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """Sets rows without a group to zero, even if they contain inf or NaN."""
    row_R = jnp.arange(x_RD.shape[0], dtype=jnp.int32)
    return jnp.where(row_R[:, None] < jnp.sum(group_sizes_E, dtype=jnp.int32), x_RD, 0)


class GroupMetadata(NamedTuple):
    """Sorted tiles of rows, each for the rows of one group. Entries past `num_tiles` are zeros."""

    num_tiles: jax.Array
    group_V: jax.Array
    row_V: jax.Array  # the first row of the tile
    start_V: jax.Array  # the first row of its group
    end_V: jax.Array  # one past the group's last row


def make_group_metadata(
    group_sizes_E: jax.Array, rows: int, tile_rows: int, aligned: bool = False
) -> GroupMetadata:
    """Splits the rows of each group into tiles; rows without a group are in none.

    Args:
      aligned: tiles start at multiples of `tile_rows`, and a tile with rows of several groups is listed once
        per group. Otherwise, the first tile of a group starts at its first row.
    """
    groups = group_sizes_E.shape[0]
    starts_E, ends_E = group_bounds(group_sizes_E, rows)
    first_E = starts_E // tile_rows * tile_rows if aligned else starts_E
    tiles_E = jnp.where(ends_E > starts_E, -(-(ends_E - first_E) // tile_rows), 0)
    last_E = jnp.cumsum(tiles_E, dtype=jnp.int32)
    # Every nonempty group except the first adds at most one partial tile.
    tile_V = jnp.arange(-(-rows // tile_rows) + min(groups, rows) - 1, dtype=jnp.int32)
    group_V = jnp.searchsorted(last_E, tile_V, side="right", method="compare_all").astype(jnp.int32)
    group_V = jnp.minimum(group_V, groups - 1)
    row_V = first_E[group_V] + (tile_V - (last_E - tiles_E)[group_V]) * tile_rows
    tables = (group_V, row_V, starts_E[group_V], ends_E[group_V])
    num_tiles = last_E[-1]
    return GroupMetadata(num_tiles, *(jnp.where(tile_V < num_tiles, table, 0) for table in tables))


class RowTile(NamedTuple):
    """Consecutive rows with a mask of those in the group, for loops in plain XLA."""

    start: jax.Array
    mask: jax.Array  # bool [tile_rows, 1]

    @classmethod
    def of(cls, tiles: GroupMetadata, index: jax.Array, rows: int, tile_rows: int) -> "RowTile":
        """Returns tile `index` of unaligned tiles, for arrays with `rows` rows."""
        first = tiles.row_V[index]
        start = jnp.minimum(first, rows - tile_rows)
        row = start + jnp.arange(tile_rows, dtype=jnp.int32)[:, None]
        return cls(start, (row >= first) & (row < tiles.end_V[index]))

    def read(self, x_RD: jax.Array) -> jax.Array:
        # Other rows may contain inf or NaN, and 0 * inf is NaN: mask with `where`.
        return jnp.where(self.mask, self._slice(x_RD), 0)

    def write(self, x_RD: jax.Array, x: jax.Array) -> jax.Array:
        x = jnp.where(self.mask, x, self._slice(x_RD))
        return lax.dynamic_update_slice_in_dim(x_RD, x, self.start, 0)

    def _slice(self, x_RD: jax.Array) -> jax.Array:
        return lax.dynamic_slice_in_dim(x_RD, self.start, self.mask.shape[0])
