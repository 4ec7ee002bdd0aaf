"""The grouped product as GPU kernels of our own, forward and both gradients: Pallas, its Triton backend.

The rows of each group are cut into tiles that begin where the group does, so a tile belongs to one group and
the work grows with R, not with E * R. How many tiles a group has is known at run time only; a program has
room for the most there can be, and tables made beforehand say what each tile is. Rows of no group are one
more group, whose tiles write zeros. Nothing is added across programs, so results repeat to the bit.

Letters as in grouped_matmul.py: R rows, E groups, D input width, F output width.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from gptoss_jax.kernels.backend import without_x64

# Of float32 operands; narrower ones go to the tensor cores as they are, and add up in float32.
PRECISION = lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a kernel cuts its work. All sizes are powers of two, 16 or more."""

    # Of the result: rows and columns of one program.
    rows: int
    columns: int
    # Of the axis that is summed over, in one turn of the loop.
    inner: int
    warps: int
    stages: int


# For an H100 by reasoning, not tuned by timing: compiled for it, WIDE takes 96 KiB of shared memory and 110
# registers a thread, so that two programs run on a multiprocessor and one computes while the other begins or
# ends. float32 has no tensor cores to feed.
WIDE = Blocks(rows=128, columns=128, inner=64, warps=8, stages=3)
# Where groups have few rows, as in decoding, reading the matrices is all that counts.
FEW_ROWS = Blocks(rows=32, columns=64, inner=128, warps=4, stages=4)
FLOAT32 = Blocks(rows=64, columns=64, inner=32, warps=4, stages=2)


def triton_grouped_matmul(
    x_RD: jax.Array,
    w_EDF: jax.Array,
    group_sizes_E: jax.Array,
    *,
    interpret: bool = False,
    _blocks: Blocks | None = None,
) -> jax.Array:
    """Multiplies each group of rows by its own matrix; differentiable in both. For GPUs.

    Args:
      x_RD: rows, those of group 0 first, then those of group 1, and so on.
      w_EDF: one matrix per group, of the type of `x_RD`.
      group_sizes_E: int32, rows in each group, possibly none; the sum may be below R. Rows past it come out
        as zeros and enter no gradient, whatever they hold.
      interpret: runs the kernels as plain JAX, on any device and slowly.

    Returns:
      [R, F] in the type of `x_RD`. Sums are in float32, products of float32 are not rounded to TF32.
    """
    return _product(x_RD, w_EDF, group_sizes_E.astype(jnp.int32), interpret, _blocks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _product(x_RD, w_EDF, group_sizes_E, interpret, blocks):
    return _rows_times_matrices(x_RD, w_EDF, group_sizes_E, False, interpret, blocks)


def _product_fwd(x_RD, w_EDF, group_sizes_E, interpret, blocks):
    return _product(x_RD, w_EDF, group_sizes_E, interpret, blocks), (x_RD, w_EDF, group_sizes_E)


def _product_bwd(interpret, blocks, residuals, g_RF):
    x_RD, w_EDF, group_sizes_E = residuals
    dx_RD = _rows_times_matrices(g_RF, w_EDF, group_sizes_E, True, interpret, blocks)
    dw_EDF = _rows_times_rows(x_RD, g_RF, group_sizes_E, w_EDF.dtype, interpret, blocks)
    return dx_RD, dw_EDF, None


_product.defvjp(_product_fwd, _product_bwd)


def _blocks_for(dtype, rows: int, groups: int) -> Blocks:
    if dtype == jnp.float32:
        return FLOAT32
    return WIDE if rows >= FEW_ROWS.rows * groups else FEW_ROWS


def _starts_and_ends(group_sizes_E, rows):
    """First row of each group, and the row after its last."""
    # Kernels write where they are told: sizes that promise too much must not lead them out of the array.
    ends_E = jnp.minimum(jnp.cumsum(group_sizes_E, dtype=jnp.int32), rows)
    return jnp.concatenate([jnp.zeros(1, jnp.int32), ends_E[:-1]]), ends_E


def _tiles(group_sizes_E, rows, block):
    """For each tile: its group (E for rows of no group), its first row, and the row after its group's last.

    Returns three int32 arrays as long as the number of tiles can be: each group adds at most one that is not
    full. Tiles beyond those there are have no rows.
    """
    starts, ends = _starts_and_ends(group_sizes_E, rows)
    starts, ends = jnp.append(starts, ends[-1]), jnp.append(ends, rows)
    groups = ends.shape[0]
    counts = -(-(ends - starts) // block)
    last_tiles = jnp.cumsum(counts, dtype=jnp.int32)
    tile = jnp.arange(pl.cdiv(rows, block) + groups - 1, dtype=jnp.int32)
    group = jnp.searchsorted(last_tiles, tile, side="right", method="compare_all").astype(jnp.int32)
    exists, group = group < groups, jnp.minimum(group, groups - 1)
    first = starts[group] + (tile - (last_tiles - counts)[group]) * block
    return group, jnp.where(exists, first, 0), jnp.where(exists, ends[group], 0)


def _range(start, block, end):
    """Indices start … start + block - 1 for a load or store, and which of them are below `end`."""
    return pl.ds(start, block), start + jnp.arange(block, dtype=jnp.int32) < end


def _read(ref, rows, columns, before=()):
    """A tile of a matrix that lies behind `before`, zeros where it has no rows or columns."""
    return triton.load(ref.at[(*before, rows[0], columns[0])], mask=_mask(rows, columns), other=0.0)


def _mask(rows, columns):
    return rows[1][:, None] & columns[1][None, :]


@without_x64
def _rows_times_matrices(x_RD, w_EDF, group_sizes_E, transpose, interpret, blocks):
    """[R, D] x [E, D, F] -> [R, F] or, transposed, [R, F] x [E, D, F] -> [R, D]."""
    rows, inner = x_RD.shape
    groups = w_EDF.shape[0]
    columns = w_EDF.shape[1 if transpose else 2]
    if blocks is None:
        blocks = _blocks_for(x_RD.dtype, rows, groups)
    tables = _tiles(group_sizes_E, rows, blocks.rows)
    column_tiles = pl.cdiv(columns, blocks.columns)

    def kernel(group_ref, first_ref, end_ref, x_ref, w_ref, y_ref):
        # All columns of a tile before the next tile: what runs at a time shares one group's matrix in L2.
        tile, column_tile = pl.program_id(0) // column_tiles, pl.program_id(0) % column_tiles
        group = group_ref[tile]
        here = _range(first_ref[tile], blocks.rows, end_ref[tile])
        there = _range(column_tile * blocks.columns, blocks.columns, columns)

        def step(i, total):
            along = _range(i * blocks.inner, blocks.inner, inner)
            x = _read(x_ref, here, along)
            matrix = (jnp.minimum(group, groups - 1),)
            if transpose:
                return total + triton.dot(x, _read(w_ref, there, along, matrix).T, precision=PRECISION)
            return total + triton.dot(x, _read(w_ref, along, there, matrix), precision=PRECISION)

        # A product, because Pallas makes a truth value of a `where` between two constants.
        turns = (group < groups).astype(jnp.int32) * pl.cdiv(inner, blocks.inner)
        total = lax.fori_loop(0, turns, step, jnp.zeros((blocks.rows, blocks.columns), jnp.float32))
        triton.store(y_ref.at[here[0], there[0]], total.astype(y_ref.dtype), mask=_mask(here, there))

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((rows, columns), x_RD.dtype),
        grid=(tables[0].shape[0] * column_tiles,),
        compiler_params=triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name="grouped_matmul_dx" if transpose else "grouped_matmul",
    )(*tables, x_RD, w_EDF)


@without_x64
def _rows_times_rows(x_RD, g_RF, group_sizes_E, dtype, interpret, blocks):
    """Sum over each group's rows of x^T g: [E, D, F]; zeros for a group without rows."""
    rows, D = x_RD.shape
    F, groups = g_RF.shape[1], group_sizes_E.shape[0]
    if blocks is None:
        blocks = _blocks_for(x_RD.dtype, rows, 1)
    D_tiles, F_tiles = pl.cdiv(D, blocks.rows), pl.cdiv(F, blocks.columns)

    def kernel(start_ref, end_ref, x_ref, g_ref, dw_ref):
        program = pl.program_id(0)
        group, D_tile, F_tile = (
            program // (D_tiles * F_tiles),
            program // F_tiles % D_tiles,
            program % F_tiles,
        )
        start, end = start_ref[group], end_ref[group]
        down = _range(D_tile * blocks.rows, blocks.rows, D)
        across = _range(F_tile * blocks.columns, blocks.columns, F)

        def step(i, total):
            # Both are masked: not even a zero times what stands outside of the group may enter.
            along = _range(start + i * blocks.inner, blocks.inner, end)
            x, g = _read(x_ref, along, down), _read(g_ref, along, across)
            return total + triton.dot(x.T, g, precision=PRECISION)

        turns = pl.cdiv(end - start, blocks.inner)
        total = lax.fori_loop(0, turns, step, jnp.zeros((blocks.rows, blocks.columns), jnp.float32))
        tile = dw_ref.at[group, down[0], across[0]]
        triton.store(tile, total.astype(dw_ref.dtype), mask=_mask(down, across))

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((groups, D, F), dtype),
        grid=(groups * D_tiles * F_tiles,),
        compiler_params=triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name="grouped_matmul_dw",
    )(*_starts_and_ends(group_sizes_E, rows), x_RD, g_RF)
