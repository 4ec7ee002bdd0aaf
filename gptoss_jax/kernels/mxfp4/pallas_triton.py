"""Grouped matmul with MXFP4 weights on GPU, and its gradient in x: Pallas with its Triton backend.

A program computes one tile of a group's rows and of the outputs. Weights are dequantized in registers once
per tile of rows: tiles are small for few rows, where reading the bytes dominates, and large for many rows, to
be compute-bound.

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
    """Tile sizes and Triton's compiler parameters. Sizes are powers of two, at least 32 along D and 16
    elsewhere."""

    rows: int
    outputs: int
    # Elements of the contracted axis per loop step.
    inner: int
    warps: int
    stages: int


# Chosen for the H100 by calculation, not tuned on hardware. The smallest tensor-core matmul has 16 rows. For
# few rows, tiles have few outputs, so that even the matrix of one group keeps the whole GPU busy.
MAX_NARROW_ROWS = 1024
NARROW = Tiles(rows=16, outputs=32, inner=256, warps=4, stages=3)
NARROW_GRADIENT = Tiles(rows=16, outputs=128, inner=64, warps=4, stages=3)
# Compiled for sm_90, three programs fit on a multiprocessor, so that one multiplies while others dequantize.
WIDE = Tiles(rows=128, outputs=64, inner=64, warps=4, stages=3)
# float32 does not use tensor cores. The largest tiles that do not spill registers.
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
    """Returns indices start … start + size - 1 for a load or store, and the mask of those below `end`."""
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
    """`mxfp4_grouped_matmul` without a bias or, if `transposed`, its gradient in x, [R, F] -> [R, D].

    Args:
      interpret: runs it on any platform, slowly.
      tiles: for tests and benchmarks; the default depends on dtype and number of rows.
    """
    rows, inner = x_RD.shape
    F, G, C = blocks_EFGC.shape[1:]
    outputs = codec.BLOCK_SIZE * G if transposed else F
    tiles = tiles or _default_tiles(x_RD.dtype, rows, transposed)
    _, *tables = make_group_metadata(group_sizes_E, rows, tiles.rows)
    output_tiles = pl.cdiv(outputs, tiles.outputs)

    def kernel(tables, x_ref, blocks_ref, scales_ref, y_ref):
        group_V, row_V, _, end_V = tables
        # Outputs vary fastest, so that concurrent programs share one group's bytes in L2.
        tile, output_tile = pl.program_id(0) // output_tiles, pl.program_id(0) % output_tiles
        here, row_mask = _range(row_V[tile], tiles.rows, end_V[tile])
        there, output_mask = _range(output_tile * tiles.outputs, tiles.outputs, outputs)

        def load_weights(f, f_size, d, d_size):
            """Loads values f … f + f_size - 1 of F by d … d + d_size - 1 of D, padded with zeros."""
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
            # HIGHEST is for float32; narrower operands go to tensor cores unchanged. Accumulates in float32.
            return total + triton.dot(x, w, precision=lax.Precision.HIGHEST)

        # The grid has the maximum number of tiles: programs past the last tile do nothing.
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
    # The kernel does not write rows without a group.
    return zero_ungrouped(y_RF, group_sizes_E)
