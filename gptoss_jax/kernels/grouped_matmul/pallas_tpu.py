"""Grouped matmul on TPU: JAX's megablox kernels for the forward pass and both gradients.

On TPU, `jax.lax.ragged_dot` compiles (libtpu 0.0.42; v5e, v5p, v6e) to a grouped kernel for the forward pass
and the gradient of x, but its gradient of the matrices multiplies every row for every group: E times the
work (`python benchmarks/tpu_compile.py`). For the gradient of x, it also writes the transposed matrices to
memory first.

Matrices with few outputs, such as LoRA adapters, are multiplied transposed, [E, F, D]: TPUs pad the last
dimension to whole lanes, so [E, D, 2], and its gradient for all layers, would take 64 times the memory.

Letters as in api.py: R rows, E groups, D input width, F output width.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

from gptoss_jax.kernels.backend import matmul_precision, without_x64
from gptoss_jax.kernels.group_tiles import as_matrices, zero_ungrouped

LANES = 128
# VMEM budget, of the 16 MiB that a kernel gets on v5e and v5p; the compiler needs the rest.
VMEM = 15 << 20
# Rows per tile. A tile with rows of two groups is computed once for each, so small groups use small tiles.
TILE_ROWS, SMALL_TILE_ROWS = 256, 128
# Maximum number of outputs per tile. Rows are reread for each tile, so it is wide enough to be compute-bound
# (560 FLOPs per byte on v6e), and narrow enough to fit in VMEM at two bytes per value.
TILE_WIDTH = 768
WEIGHT_GRAD_TILE = (512, 1024, 1152)  # rows, input width, output width, at two bytes per value


Residuals = tuple[jax.Array, jax.Array, jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def megablox_grouped_matmul(
    x_RD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array, interpret: bool = False
) -> jax.Array:
    """`grouped_matmul` without a bias; float32 is multiplied in float32.

    `interpret` runs the kernels on any platform, slowly. In a program for several devices, call it inside
    `jax.shard_map`.
    """
    return _matmul(x_RD, as_matrices(w_EDF), group_sizes_E, False, interpret)


def _forward(
    x_RD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array, interpret: bool
) -> tuple[jax.Array, Residuals]:
    y_RF = megablox_grouped_matmul(x_RD, w_EDF, group_sizes_E, interpret)
    return y_RF, (x_RD, w_EDF, group_sizes_E)


def _backward(interpret: bool, residuals: Residuals, g_RF: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x_RD, w_EDF, group_sizes_E = residuals
    dx_RD = _matmul(g_RF, as_matrices(w_EDF), group_sizes_E, True, interpret)
    # In this order, gathered matrices are not in memory beside their gradients.
    x_RD, g_RF, dx_RD = jax.lax.optimization_barrier((x_RD, g_RF, dx_RD))
    if w_EDF.ndim == 3:
        return dx_RD, _weight_grad(x_RD, g_RF, group_sizes_E, w_EDF.dtype, interpret), None
    # Gate and up one after the other: on a mesh, each is reduce-scattered by itself, which takes buffers of
    # half the size.
    parts = [
        _weight_grad(x_RD, g_RF, group_sizes_E, w_EDF.dtype, interpret)
        for g_RF in jnp.split(g_RF, w_EDF.shape[2], axis=1)
    ]
    return dx_RD, jnp.stack(parts, axis=2), None


megablox_grouped_matmul.defvjp(_forward, _backward)


@without_x64
def _matmul(
    x_RD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array, transposed: bool, interpret: bool
) -> jax.Array:
    """[R, D] x [E, D, F] -> [R, F] or, transposed, [R, F] x [E, D, F] -> [R, D]."""
    rows, groups = x_RD.shape[0], w_EDF.shape[0]
    tiles = _tiles(rows // groups, x_RD.shape[1], w_EDF.shape[1 if transposed else 2], x_RD.dtype.itemsize)
    if _has_few_outputs(*w_EDF.shape[1:]):
        w_EDF, transposed = w_EDF.swapaxes(1, 2), not transposed
    tiles = (min(tiles[0], _round_up(rows, 16)), *tiles[1:])
    with jax.default_matmul_precision(matmul_precision(x_RD.dtype)):
        y_RF = gmm(
            _pad_rows(x_RD, tiles[0]), w_EDF, group_sizes_E, x_RD.dtype, tiles,
            transpose_rhs=transposed, interpret=interpret,
        )[:rows]  # fmt: skip
    # The kernel does not write rows without a group.
    return zero_ungrouped(y_RF, group_sizes_E)


@without_x64
def _weight_grad(
    x_RD: jax.Array, g_RF: jax.Array, group_sizes_E: jax.Array, dtype: jnp.dtype, interpret: bool
) -> jax.Array:
    """Returns x^T g summed over the rows of each group in float32, then cast: [E, D, F]."""
    if _has_few_outputs(x_RD.shape[1], g_RF.shape[1]):
        return _weight_grad(g_RF, x_RD, group_sizes_E, dtype, interpret).swapaxes(1, 2)
    row_tile, *widths = (size * 2 // x_RD.dtype.itemsize for size in WEIGHT_GRAD_TILE)
    row_tile = min(row_tile, _round_up(x_RD.shape[0], 16))
    widths = [_even_parts(x.shape[1], w // LANES * LANES) for x, w in zip((x_RD, g_RF), widths, strict=True)]
    with jax.default_matmul_precision(matmul_precision(x_RD.dtype)):
        return tgmm(
            _pad_rows(x_RD, row_tile).T, _pad_rows(g_RF, row_tile), group_sizes_E, dtype,
            (row_tile, *widths), interpret=interpret,
        )  # fmt: skip


def _has_few_outputs(width: int, outputs: int) -> bool:
    return outputs < min(LANES, width)


def _tiles(rows_in_group: int, width: int, outputs: int, itemsize: int) -> tuple[int, int, int]:
    """Returns the rows, input width and output width of a tile.

    Uses the whole input width if it fits in VMEM: a matrix tile then stays there for all rows of its group.
    """
    # float32 is multiplied in several passes over parts of its bits, which also take VMEM.
    for rows in (TILE_ROWS, SMALL_TILE_ROWS) if itemsize == 2 else ():
        # Double buffers for both inputs and the output, and a float32 accumulator.
        fixed, per_output = 2 * rows * width * itemsize, 2 * (width + rows) * itemsize + 4 * rows
        max_outputs = (VMEM - fixed) // per_output // LANES * LANES
        has_small_groups = rows == TILE_ROWS and rows_in_group < 4 * TILE_ROWS
        if not has_small_groups and max_outputs >= min(4 * LANES, _round_up(outputs, LANES)):
            return rows, width, _even_parts(outputs, min(max_outputs, TILE_WIDTH))
    return SMALL_TILE_ROWS, _even_parts(width, 8 * LANES), _even_parts(outputs, 4 * LANES)


def _even_parts(size: int, max_part: int) -> int:
    """Returns the size of equal parts of at most `max_part`, in whole lanes; `size` if one part suffices."""
    if size <= max_part:
        return size
    return min(max_part, _round_up(-(-size // -(-size // max_part)), LANES))


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _pad_rows(x_RD: jax.Array, multiple: int) -> jax.Array:
    return jnp.pad(x_RD, ((0, -x_RD.shape[0] % multiple), (0, 0)))
