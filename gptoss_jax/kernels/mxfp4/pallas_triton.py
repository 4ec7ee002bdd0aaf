"""Grouped matmul with MXFP4 weights on GPU, for few rows: Pallas with its Triton backend.

A program takes one tile of a group's rows and some of the outputs. Reading the bytes dominates, so each is
read once, and becomes two values in registers: for an even input and for the odd one after it. They
are multiplied by the even and the odd inputs of the rows, which are separate operands.

Letters as in api.py.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from gptoss_jax.kernels.backend import without_x64
from gptoss_jax.kernels.group_tiles import make_group_metadata, zero_ungrouped
from gptoss_jax.kernels.mxfp4 import codec

# With more rows, dequantizing each byte again for each tile of rows is slower than dequantizing whole
# matrices. By reasoning, as all sizes here: none was tuned by timing.
MAX_ROWS = 1024
TILE_ROWS = 16  # the smallest product of tensor cores
TILE_COLS = 32  # outputs of one program, so that even one group's matrix keeps a whole GPU busy
INNER_BLOCKS = 8  # of MXFP4, in one step of the loop: 128 bytes of each output, 256 inputs


@without_x64
def triton_mxfp4_matmul(
    x_RD: jax.Array,
    blocks_EFGC: jax.Array,
    scales_EFG: jax.Array,
    group_sizes_E: jax.Array,
    interpret: bool = False,
) -> jax.Array:
    """`mxfp4_grouped_matmul` without a bias. `interpret` runs it on any platform, slowly."""
    rows, D = x_RD.shape
    E, F, G, C = blocks_EFGC.shape
    _, *tables = make_group_metadata(group_sizes_E, rows, TILE_ROWS)
    column_tiles = pl.cdiv(F, TILE_COLS)
    even_RD, odd_RD = (x_RD.reshape(rows, D // 2, 2)[:, :, part] for part in (0, 1))

    def kernel(tables, x_refs, blocks_ref, scales_ref, y_ref):
        group_V, row_V, _, end_V = tables
        # All columns of a tile before the next tile.
        tile, column_tile = pl.program_id(0) // column_tiles, pl.program_id(0) % column_tiles
        group, first_row, first_column = group_V[tile], row_V[tile], column_tile * TILE_COLS
        row_mask = first_row + jnp.arange(TILE_ROWS, dtype=jnp.int32) < end_V[tile]
        column_mask = first_column + jnp.arange(TILE_COLS, dtype=jnp.int32) < F
        columns = pl.ds(first_column, TILE_COLS)

        def step(i, total):
            blocks = pl.ds(i * INNER_BLOCKS, INNER_BLOCKS)
            block_mask = i * INNER_BLOCKS + jnp.arange(INNER_BLOCKS, dtype=jnp.int32) < G
            mask = column_mask[:, None] & block_mask[None, :]
            scale = triton.load(scales_ref.at[group, columns, blocks], mask=mask, other=0)
            byte = triton.load(
                blocks_ref.at[group, columns, blocks, pl.ds(0, C)],
                mask=jnp.broadcast_to(mask[:, :, None], (TILE_COLS, INNER_BLOCKS, C)),
                other=0,
            )
            inner = i * INNER_BLOCKS * C + jnp.arange(INNER_BLOCKS * C, dtype=jnp.int32)
            pairs = zip(x_refs, codec.bfloat16_bits(byte, scale[:, :, None]), strict=True)
            for x_ref, bits in pairs:
                x = triton.load(
                    x_ref.at[pl.ds(first_row, TILE_ROWS), pl.ds(i * INNER_BLOCKS * C, INNER_BLOCKS * C)],
                    mask=row_mask[:, None] & (inner < D // 2)[None, :],
                    other=0.0,
                )
                w = lax.bitcast_convert_type(bits, jnp.bfloat16).astype(x.dtype)
                w = w.reshape(TILE_COLS, INNER_BLOCKS * C)
                total += triton.dot(x, w.T, precision=lax.Precision.HIGHEST)
            return total

        # The metadata has room for more tiles than there are: programs of those have nothing to do.
        steps = (end_V[tile] > 0).astype(jnp.int32) * pl.cdiv(G, INNER_BLOCKS)
        total = lax.fori_loop(0, steps, step, jnp.zeros((TILE_ROWS, TILE_COLS), jnp.float32))
        triton.store(
            y_ref.at[pl.ds(first_row, TILE_ROWS), columns],
            total.astype(y_ref.dtype),
            mask=row_mask[:, None] & column_mask[None, :],
        )

    y_RF = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((rows, F), x_RD.dtype),
        grid=(tables[0].shape[0] * column_tiles,),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="mxfp4_matmul",
    )(tables, (even_RD, odd_RD), blocks_EFGC, scales_EFG)
    # Rows without a group were never written.
    return zero_ungrouped(y_RF, group_sizes_E)
