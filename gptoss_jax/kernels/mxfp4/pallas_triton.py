"""The product with packed experts as a GPU kernel of our own, for few rows: Pallas, its Triton backend.

A program takes one visit, a tile of rows and a group that has rows there, and some of the outputs. Reading
the bytes is all that counts, so each is read once and becomes two numbers in registers: that of an even input
and that of the odd one after it. They are multiplied with the rows' even and odd inputs, which stand apart.

Letters as in mxfp4_grouped_matmul.py.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from gptoss_jax.kernels.backend import without_x64
from gptoss_jax.kernels.grouped_matmul.api import PRECISION, is_in_group
from gptoss_jax.kernels.mxfp4 import codec
from gptoss_jax.kernels.mxfp4.api import visits

# Beyond, each byte would become numbers so many times, once for each tile of rows, that unpacking whole
# matrices is quicker. By reasoning, as all sizes here: none was tuned by timing.
MOST_ROWS = 1024
ROWS = 16  # in a tile; no product is smaller on tensor cores
COLUMNS = 32  # outputs of one program, so that even one group's matrix keeps a whole GPU busy
GROUPS = 8  # in one turn of the loop: 128 bytes of each output, 256 inputs


@without_x64
def triton_mxfp4_matmul(
    x_RD: jax.Array,
    blocks_EFGC: jax.Array,
    scales_EFG: jax.Array,
    group_sizes_E: jax.Array,
    interpret: bool = False,
) -> jax.Array:
    """As `mxfp4_grouped_matmul`, without a bias: [R, F]; rows of no group give zero.

    `interpret` runs the kernel as plain JAX, on any device and slowly.
    """
    rows, D = x_RD.shape
    E, F, G, C = blocks_EFGC.shape
    count, *tables = visits(group_sizes_E, rows, ROWS)
    most, column_tiles = tables[0].shape[0], pl.cdiv(F, COLUMNS)
    even_RD, odd_RD = (x_RD.reshape(rows, D // 2, 2)[:, :, part] for part in (0, 1))

    def kernel(count_ref, tile_V, group_V, start_V, end_V, even_ref, odd_ref, blocks_ref, scales_ref, y_ref):
        # All columns of a visit before the next.
        visit, column_tile = pl.program_id(0) // column_tiles, pl.program_id(0) % column_tiles
        group = group_V[visit]
        first_row, first_column = tile_V[visit] * ROWS, column_tile * COLUMNS
        row = first_row + jnp.arange(ROWS, dtype=jnp.int32)
        is_mine = (row >= start_V[visit]) & (row < end_V[visit])
        is_column = first_column + jnp.arange(COLUMNS, dtype=jnp.int32) < F
        columns = pl.ds(first_column, COLUMNS)

        def step(i, total):
            groups = pl.ds(i * GROUPS, GROUPS)
            is_group = i * GROUPS + jnp.arange(GROUPS, dtype=jnp.int32) < G
            is_here = is_column[:, None] & is_group[None, :]
            scale = triton.load(scales_ref.at[group, columns, groups], mask=is_here, other=0)
            byte = triton.load(
                blocks_ref.at[group, columns, groups, pl.ds(0, C)],
                mask=jnp.broadcast_to(is_here[:, :, None], (COLUMNS, GROUPS, C)),
                other=0,
            )
            is_input = i * GROUPS * C + jnp.arange(GROUPS * C, dtype=jnp.int32) < D // 2
            for x_ref, w in zip((even_ref, odd_ref), _numbers(byte, scale, x_RD.dtype), strict=True):
                x = triton.load(
                    x_ref.at[pl.ds(first_row, ROWS), pl.ds(i * GROUPS * C, GROUPS * C)],
                    mask=is_mine[:, None] & is_input[None, :],
                    other=0.0,
                )
                total += triton.dot(x, w.reshape(COLUMNS, GROUPS * C).T, precision=PRECISION)
            return total

        # Programs of visits that there are not have nothing to do.
        turns = (visit < count_ref[0]).astype(jnp.int32) * pl.cdiv(G, GROUPS)
        total = lax.fori_loop(0, turns, step, jnp.zeros((ROWS, COLUMNS), jnp.float32))
        triton.store(
            y_ref.at[pl.ds(first_row, ROWS), columns],
            total.astype(y_ref.dtype),
            mask=is_mine[:, None] & is_column[None, :],
        )

    y_RF = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((rows, F), x_RD.dtype),
        grid=(most * column_tiles,),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="mxfp4_matmul",
    )(count[None], *tables, even_RD, odd_RD, blocks_EFGC, scales_EFG)
    # Rows of no group were never written.
    return jnp.where(is_in_group(rows, group_sizes_E), y_RF, 0)


def _numbers(byte, scale, dtype):
    """The numbers of the low and of the high nibbles, as `codec.dequantize`."""
    for bits in codec.bfloat16_bits(byte, scale[:, :, None]):
        yield lax.bitcast_convert_type(bits, jnp.bfloat16).astype(dtype)
