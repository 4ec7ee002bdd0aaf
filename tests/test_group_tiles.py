"""Tiles of rows that are sorted by group."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.grouped_matmul import sizes_within
from hypothesis import example, given, settings

from gptoss_jax.kernels.group_tiles import make_group_metadata

R, E, TILE = 37, 4, 16


@pytest.mark.parametrize("aligned", [False, True])
@settings(max_examples=60, deadline=None)
@given(sizes=sizes_within(R, E))
@example(sizes=[1, 1, 1, R - 3])
@example(sizes=[16, 0, 17, 4])
@example(sizes=[9, 9, 9, 9])
def test_tiles_cover_every_row_of_a_group_once(aligned, sizes):
    num_tiles, *tables = map(np.asarray, make_group_metadata(jnp.array(sizes, jnp.int32), R, TILE, aligned))
    found = np.full(R, -1)
    for group, row, start, end in zip(*(table[:num_tiles] for table in tables), strict=True):
        rows = slice(max(row, start), min(row + TILE, end))
        assert rows.start < rows.stop and np.all(found[rows] == -1)
        assert row % TILE == 0 if aligned else row >= start
        found[rows] = group
    np.testing.assert_array_equal(found, np.repeat([*range(E), -1], [*sizes, R - sum(sizes)]))
    assert num_tiles <= len(tables[0]) == 3 + E - 1
    assert all(not np.any(table[num_tiles:]) for table in tables)


@pytest.mark.parametrize("aligned", [False, True])
def test_sizes_beyond_the_rows_are_cut(aligned):
    num_tiles, _, row, _, end = make_group_metadata(jnp.array([30, 30, 30, 30], jnp.int32), R, TILE, aligned)
    # Rows 0 to 29 and 30 to 36.
    assert num_tiles == (4 if aligned else 3) and row.max() < R and end.max() == R
