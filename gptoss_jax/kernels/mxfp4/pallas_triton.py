"""Grouped matmul with MXFP4 weights on GPU, and its gradient in x: Pallas with its Triton backend.

A program takes one tile of a group's rows and some of the outputs. Bytes become values in registers, once for
each tile of rows: for few rows tiles are small, because reading the bytes dominates; for many they are large,
so that multiplying does.

Letters as in api.py.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from gptoss_jax.kernels.backend import without_x64
from gptoss_jax.kernels.group_tiles import make_group_metadata, zero_ungrouped
from gptoss_jax.kernels.mxfp4 import codec


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the work is split. All sizes are powers of two; those along D are 32 or more, the others 16."""

    rows: int
    outputs: int
    # Of the axis that is summed over, in one step of the loop.
    inner: int
    warps: int
    stages: int


# For an H100 by reasoning; none was tuned by timing. The tensor cores' smallest product has 16 rows. For few
# rows, few outputs, so that even one group's matrix keeps a whole GPU busy.
MAX_NARROW_ROWS = 1024
NARROW = Tiles(rows=16, outputs=32, inner=256, warps=4, stages=3)
NARROW_GRADIENT = Tiles(rows=16, outputs=128, inner=64, warps=4, stages=3)
# Compiled for sm_90, 60 KiB of shared memory and 168 registers a thread: a multiprocessor has three programs,
# and one multiplies while others dequantize.
WIDE = Tiles(rows=128, outputs=64, inner=64, warps=4, stages=3)
# float32 does not use the tensor cores. The largest that do not spill registers.
NARROW_FLOAT32 = Tiles(rows=16, outputs=32, inner=64, warps=4, stages=2)
WIDE_FLOAT32 = Tiles(rows=64, outputs=64, inner=32, warps=8, stages=2)


def _default_tiles(dtype: jnp.dtype, rows: int, transposed: bool) -> Tiles:
    is_narrow = rows <= MAX_NARROW_ROWS
    if dtype == jnp.float32:
        return NARROW_FLOAT32 if is_narrow else WIDE_FLOAT32
    if is_narrow:
        return NARROW_GRADIENT if transposed else NARROW
    return WIDE


def _range(start: jax.Array | int, size: int, end: jax.Array | int) -> tuple[slice | pl.Slice, jax.Array]:
    """Indices start … start + size - 1 for a load or store, and the mask of those below `end`."""
    return pl.ds(start, size), start + jnp.arange(size, dtype=jnp.int32) < end


@without_x64
def triton_mxfp4_matmul(
    x_RD: jax.Array,
    blocks_EFGC: jax.Array,
    scales_EFG: jax.Array,
    group_sizes_E: jax.Array,
    transposed: bool = False,
    *,
    interpret: bool = False,
    tiles: Tiles | None = None,
) -> jax.Array:
    """`mxfp4_grouped_matmul` without a bias, or its gradient in x if `transposed`, [R, F] -> [R, D].

    Args:
      interpret: runs it on any platform, slowly.
      tiles: for tests and benchmarks; default by type and rows.
    """
    rows, inner = x_RD.shape
    F, G, C = blocks_EFGC.shape[1:]
    outputs = codec.BLOCK_SIZE * G if transposed else F
    tiles = tiles or _default_tiles(x_RD.dtype, rows, transposed)
    _, *tables = make_group_metadata(group_sizes_E, rows, tiles.rows)
    output_tiles = pl.cdiv(outputs, tiles.outputs)

    def kernel(tables, x_ref, blocks_ref, scales_ref, y_ref):
        group_V, row_V, _, end_V = tables
        # All outputs of a tile before the next tile: concurrent programs share one group's bytes in L2.
        tile, output_tile = pl.program_id(0) // output_tiles, pl.program_id(0) % output_tiles
        here, row_mask = _range(row_V[tile], tiles.rows, end_V[tile])
        there, output_mask = _range(output_tile * tiles.outputs, tiles.outputs, outputs)

        def load_weights(f, f_size, d, d_size):
            """Loads values f … f + f_size - 1 of F by d … d + d_size - 1 of D, zeros outside of them."""
            along_F, F_mask = _range(f, f_size, F)
            along_G, G_mask = _range(d // codec.BLOCK_SIZE, d_size // codec.BLOCK_SIZE, G)
            mask = F_mask[:, None] & G_mask[None, :]
            scale = triton.load(scales_ref.at[group_V[tile], along_F, along_G], mask=mask, other=0)
            byte = triton.load(
                blocks_ref.at[group_V[tile], along_F, along_G, pl.ds(0, C)],
                mask=jnp.broadcast_to(mask[:, :, None], (*mask.shape, C)),
                other=0,
            )
            factors = (factor[:, :, None] for factor in codec.kernel_scales(scale))
            values = [value.astype(x_RD.dtype) for value in codec.kernel_values(byte, *factors)]
            return jnp.stack(values, axis=-1).reshape(f_size, d_size)

        def step(i, total):
            start = i * tiles.inner
            along, mask = _range(start, tiles.inner, inner)
            x = triton.load(x_ref.at[here, along], mask=row_mask[:, None] & mask[None, :], other=0.0)
            if transposed:
                w = load_weights(start, tiles.inner, output_tile * tiles.outputs, tiles.outputs)
            else:
                w = load_weights(output_tile * tiles.outputs, tiles.outputs, start, tiles.inner).T
            # Of float32 operands; narrower ones go to the tensor cores as they are, and add up in float32.
            return total + triton.dot(x, w, precision=lax.Precision.HIGHEST)

        # The metadata has room for more tiles than there are: programs of those have nothing to do.
        steps = (end_V[tile] > 0).astype(jnp.int32) * pl.cdiv(inner, tiles.inner)
        total = lax.fori_loop(0, steps, step, jnp.zeros((tiles.rows, tiles.outputs), jnp.float32))
        mask = row_mask[:, None] & output_mask[None, :]
        triton.store(y_ref.at[here, there], total.astype(y_ref.dtype), mask=mask)

    y_RF = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((rows, outputs), x_RD.dtype),
        grid=(tables[0].shape[0] * output_tiles,),
        compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="mxfp4_matmul_dx" if transposed else "mxfp4_matmul",
    )(tables, x_RD, blocks_EFGC, scales_EFG)
    # Rows without a group were never written.
    return zero_ungrouped(y_RF, group_sizes_E)
