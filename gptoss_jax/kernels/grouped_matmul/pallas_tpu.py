"""The grouped product on TPU: JAX's megablox kernels, forward and in both gradients.

What `jax.lax.ragged_dot` becomes there (libtpu 0.0.42; v5e, v5p, v6e) is a grouped kernel for the product and
for the gradient of x, but the gradient of the matrices is every group times every row: E times the work. For
65,536 rows of gate and up in gpt-oss-20b, v5e's compiler counts 835 million cycles for it, and schedules the
kernel here in 20. And for the gradient of x, ragged_dot first writes the matrices to memory transposed.

Letters as in `grouped_matmul.py`: R rows, E groups, D input width, F output width.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

from gptoss_jax.kernels.backend import without_x64
from gptoss_jax.kernels.grouped_matmul.api import is_in_group

LANES = 128
MIB = 1 << 20
# Of the 16 MiB of VMEM that a kernel gets on v5e and v5p; the compiler needs some itself.
VMEM = 15 * MIB
# Rows in a tile. One that holds rows of two groups is done for each of them, so small groups get small tiles.
ROWS, FEW_ROWS = 256, 128
ROWS_OF_GRADIENT = 512
# The widest tiles of outputs: the rows are read again for each of them, so wide enough for reading not to
# take longer than multiplying (on v6e, 560 operations a byte), and narrow enough for VMEM. For two bytes a
# number.
WIDTH = 768
GRADIENT_TILE = (1024, 1152)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def megablox_grouped_matmul(
    x_RD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array, interpret: bool = False
) -> jax.Array:
    """Each group of rows times its own matrix, as `grouped_matmul`: [R, F]; rows of no group give zero.

    Float32 is multiplied in float32. `interpret` runs the kernels on any platform, slowly. In a program for
    several devices, call it in a `jax.shard_map`.
    """
    return _rows_times_matrices(x_RD, w_EDF, group_sizes_E, False, interpret)


def _forward(x_RD, w_EDF, group_sizes_E, interpret):
    y_RF = megablox_grouped_matmul(x_RD, w_EDF, group_sizes_E, interpret)
    return y_RF, (x_RD, w_EDF, group_sizes_E)


def _backward(interpret, residuals, g_RF):
    x_RD, w_EDF, group_sizes_E = residuals
    dx_RD = _rows_times_matrices(g_RF, w_EDF, group_sizes_E, True, interpret)
    return dx_RD, _rows_times_rows(x_RD, g_RF, group_sizes_E, w_EDF.dtype, interpret), None


megablox_grouped_matmul.defvjp(_forward, _backward)


@without_x64
def _rows_times_matrices(x_RD, w_EDF, group_sizes_E, transpose, interpret):
    rows, groups = x_RD.shape[0], w_EDF.shape[0]
    tiles = _tiles(rows // groups, x_RD.shape[1], w_EDF.shape[1 if transpose else 2], x_RD.dtype.itemsize)
    tiles = (min(tiles[0], _up(rows, 16)), *tiles[1:])
    with _precision(x_RD.dtype):
        y_RF = gmm(
            _whole_tiles(x_RD, tiles[0]), w_EDF, group_sizes_E, x_RD.dtype, tiles,
            transpose_rhs=transpose, interpret=interpret,
        )[:rows]  # fmt: skip
    # What lies past the groups was never written.
    return jnp.where(is_in_group(rows, group_sizes_E), y_RF, 0)


@without_x64
def _rows_times_rows(x_RD, g_RF, group_sizes_E, dtype, interpret):
    """Sum over each group's rows of x^T g, in float32, then cast: [E, D, F]."""
    row_tile = min(ROWS_OF_GRADIENT * 2 // x_RD.dtype.itemsize, _up(x_RD.shape[0], 16))
    widths = (x_RD.shape[1], g_RF.shape[1])
    most = (size * 2 // x_RD.dtype.itemsize // LANES * LANES for size in GRADIENT_TILE)
    tiles = (row_tile, *map(_parts, widths, most))
    with _precision(x_RD.dtype):
        return tgmm(
            _whole_tiles(x_RD, row_tile).T, _whole_tiles(g_RF, row_tile), group_sizes_E, dtype, tiles,
            interpret=interpret,
        )  # fmt: skip


def _tiles(rows_in_group: int, width: int, outputs: int, itemsize: int) -> tuple[int, int, int]:
    """Rows, input width and output width of a tile.

    The whole input width where VMEM allows: a tile of a matrix then stays there while its group's rows pass.
    """
    # Float32 is multiplied in several passes over parts of its bits, which lie in VMEM too.
    for rows in (ROWS, FEW_ROWS) if itemsize == 2 else ():
        # Two buffers for each of the three, and the sums in float32.
        fixed, each = 2 * rows * width * itemsize, 2 * (width + rows) * itemsize + 4 * rows
        most = (VMEM - fixed) // each // LANES * LANES
        small_groups = rows == ROWS and rows_in_group < 4 * ROWS
        if not small_groups and most >= min(4 * LANES, _up(outputs, LANES)):
            return rows, width, _parts(outputs, min(most, WIDTH))
    return FEW_ROWS, _parts(width, 8 * LANES), _parts(outputs, 4 * LANES)


def _parts(size: int, most: int) -> int:
    """The size of equal parts of at most `most`, in whole lanes; all of it where one part does."""
    return size if size <= most else min(most, _up(-(-size // -(-size // most)), LANES))


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _whole_tiles(x_RD, rows):
    return jnp.pad(x_RD, ((0, -x_RD.shape[0] % rows), (0, 0)))


def _precision(dtype):
    # Else the kernels round float32 to bfloat16 before they multiply; narrower types they refuse to multiply
    # in any other way than their own.
    return jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default")
