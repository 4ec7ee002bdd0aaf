"""Grouped matmul on GPU, forward and both gradients: Pallas with its Triton backend.

The rows of each group are split into tiles that start at its first row, so a tile belongs to one group and
work grows with R, not with E R. The number of tiles per group is known only at run time; the grid has the
maximum size. Rows without a group form an additional group with tiles that write zeros. Reductions do not
cross programs, so results are bitwise reproducible.

Letters as in api.py: R rows, E groups, D input width, F output width.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from gptoss_jax.kernels.backend import without_x64
from gptoss_jax.kernels.group_tiles import as_matrices, group_bounds, make_group_metadata

Residuals = tuple[jax.Array, jax.Array, jax.Array]
Range = tuple[slice | pl.Slice, jax.Array]  # indices along an axis, and the mask of those that exist


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Block sizes, powers of two of at least 16, and Triton's compiler parameters."""

    # Rows and columns of the result per program.
    rows: int
    columns: int
    # Elements of the contracted axis per loop step.
    inner: int
    warps: int
    stages: int


# Chosen for the H100 by calculation, not tuned on hardware: compiled for it, two programs of WIDE fit on a
# multiprocessor, so that one computes while the other starts or finishes. float32 does not use tensor cores.
WIDE = Blocks(rows=128, columns=128, inner=64, warps=8, stages=3)
# For groups with few rows, as in decoding, where reading the matrices dominates.
NARROW = Blocks(rows=32, columns=64, inner=128, warps=4, stages=4)
FLOAT32 = Blocks(rows=64, columns=64, inner=32, warps=4, stages=2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def triton_grouped_matmul(
    x_RD: jax.Array,
    w_EDF: jax.Array,
    group_sizes_E: jax.Array,
    interpret: bool = False,
    blocks: Blocks | None = None,
) -> jax.Array:
    """`grouped_matmul` without a bias. Sums are in float32; float32 is not rounded to TF32.

    Args:
      interpret: runs the kernels on any platform, slowly.
      blocks: for tests and benchmarks; the default depends on dtype and number of rows.
    """
    return _matmul(x_RD, as_matrices(w_EDF), group_sizes_E, False, interpret, blocks)


def _forward(
    x_RD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array, interpret: bool, blocks: Blocks | None
) -> tuple[jax.Array, Residuals]:
    y_RF = triton_grouped_matmul(x_RD, w_EDF, group_sizes_E, interpret, blocks)
    return y_RF, (x_RD, w_EDF, group_sizes_E)


def _backward(
    interpret: bool, blocks: Blocks | None, residuals: Residuals, g_RF: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x_RD, w_EDF, group_sizes_E = residuals
    dx_RD = _matmul(g_RF, as_matrices(w_EDF), group_sizes_E, True, interpret, blocks)
    dw_EDF = _weight_grad(x_RD, g_RF, group_sizes_E, w_EDF.dtype, interpret, blocks)
    return dx_RD, dw_EDF.reshape(w_EDF.shape), None


triton_grouped_matmul.defvjp(_forward, _backward)


def _default_blocks(dtype: jnp.dtype, rows: int, groups: int) -> Blocks:
    if dtype == jnp.float32:
        return FLOAT32
    return WIDE if rows >= NARROW.rows * groups else NARROW


def _range(start: jax.Array | int, size: int, end: jax.Array | int) -> Range:
    """Returns indices start … start + size - 1 for a load or store, and the mask of those below `end`."""
    return pl.ds(start, size), start + jnp.arange(size, dtype=jnp.int32) < end


def _load(ref: Any, rows: Range, columns: Range, matrix: tuple[jax.Array, ...] = ()) -> jax.Array:
    """Loads a tile of the matrix at index `matrix`, padded with zeros."""
    return triton.load(ref.at[(*matrix, rows[0], columns[0])], mask=_mask(rows, columns), other=0.0)


def _mask(rows: Range, columns: Range) -> jax.Array:
    return rows[1][:, None] & columns[1][None, :]


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
    # float32 operands stay float32; narrower ones go to tensor cores unchanged. Accumulates in float32.
    return triton.dot(x, w, precision=lax.Precision.HIGHEST)


@without_x64
def _matmul(
    x_RD: jax.Array,
    w_EDF: jax.Array,
    group_sizes_E: jax.Array,
    transposed: bool,
    interpret: bool,
    blocks: Blocks | None,
) -> jax.Array:
    """[R, D] x [E, D, F] -> [R, F] or, transposed, [R, F] x [E, D, F] -> [R, D]."""
    rows, inner = x_RD.shape
    groups, columns = w_EDF.shape[0], w_EDF.shape[1 if transposed else 2]
    blocks = blocks or _default_blocks(x_RD.dtype, rows, groups)
    rest = rows - group_bounds(group_sizes_E, rows)[1][-1:]
    _, group_V, row_V, _, end_V = make_group_metadata(
        jnp.concatenate([group_sizes_E.astype(jnp.int32), rest]), rows, blocks.rows
    )
    column_tiles = pl.cdiv(columns, blocks.columns)

    def kernel(group_ref, row_ref, end_ref, x_ref, w_ref, y_ref):
        # Columns vary fastest, so that concurrent programs share one group's matrix in L2.
        tile, column_tile = pl.program_id(0) // column_tiles, pl.program_id(0) % column_tiles
        group, end = group_ref[tile], end_ref[tile]
        here = _range(row_ref[tile], blocks.rows, end)
        there = _range(column_tile * blocks.columns, blocks.columns, columns)

        def step(i, total):
            along = _range(i * blocks.inner, blocks.inner, inner)
            x = _load(x_ref, here, along)
            matrix = (jnp.minimum(group, groups - 1),)
            if transposed:
                return total + _dot(x, _load(w_ref, there, along, matrix).T)
            return total + _dot(x, _load(w_ref, along, there, matrix))

        # A multiplication, because Pallas turns a `where` between two constants into a bool.
        has_work = (group < groups) & (end > 0)
        steps = has_work.astype(jnp.int32) * pl.cdiv(inner, blocks.inner)
        total = lax.fori_loop(0, steps, step, jnp.zeros((blocks.rows, blocks.columns), jnp.float32))
        triton.store(y_ref.at[here[0], there[0]], total.astype(y_ref.dtype), mask=_mask(here, there))

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((rows, columns), x_RD.dtype),
        grid=(group_V.shape[0] * column_tiles,),
        compiler_params=triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name="grouped_matmul_dx" if transposed else "grouped_matmul",
    )(group_V, row_V, end_V, x_RD, w_EDF)


@without_x64
def _weight_grad(
    x_RD: jax.Array,
    g_RF: jax.Array,
    group_sizes_E: jax.Array,
    dtype: jnp.dtype,
    interpret: bool,
    blocks: Blocks | None,
) -> jax.Array:
    """Returns x^T g summed over the rows of each group, [E, D, F]; zeros for an empty group."""
    (rows, D), F, groups = x_RD.shape, g_RF.shape[1], group_sizes_E.shape[0]
    blocks = blocks or _default_blocks(x_RD.dtype, rows, 1)
    D_tiles, F_tiles = pl.cdiv(D, blocks.rows), pl.cdiv(F, blocks.columns)

    def kernel(start_ref, end_ref, x_ref, g_ref, dw_ref):
        program = pl.program_id(0)
        group, D_tile = program // (D_tiles * F_tiles), program // F_tiles % D_tiles
        start, end = start_ref[group], end_ref[group]
        down = _range(D_tile * blocks.rows, blocks.rows, D)
        across = _range(program % F_tiles * blocks.columns, blocks.columns, F)

        def step(i, total):
            # Both are masked: rows of other groups may contain inf or NaN, and 0 * inf is NaN.
            along = _range(start + i * blocks.inner, blocks.inner, end)
            return total + _dot(_load(x_ref, along, down).T, _load(g_ref, along, across))

        steps = pl.cdiv(end - start, blocks.inner)
        total = lax.fori_loop(0, steps, step, jnp.zeros((blocks.rows, blocks.columns), jnp.float32))
        tile = dw_ref.at[group, down[0], across[0]]
        triton.store(tile, total.astype(dw_ref.dtype), mask=_mask(down, across))

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((groups, D, F), dtype),
        grid=(groups * D_tiles * F_tiles,),
        compiler_params=triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name="grouped_matmul_dw",
    )(*group_bounds(group_sizes_E, rows), x_RD, g_RF)
