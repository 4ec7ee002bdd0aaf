"""Grouped matmul with MXFP4 weights on TPU: Pallas with its Mosaic backend.

A step is a tile of rows and a group with rows in it. The ids of the groups are prefetched, so that the bytes
of a group arrive while the step before it computes, and no others are ever read. They are dequantized in
VMEM once for all consecutive tiles of a group.

The outputs are along the lanes: the kernel takes blocks as [E, G, C, F] and scales as [E, G, F]. Then a scale
is above the 16 bytes it belongs to, and nothing moves between lanes. The two values of a byte, for an even
input and for the odd one after it, go into two matrices, and the even and odd inputs of the rows are separate
too.

Arrays that are stored so (`codec.TPU_LAYOUTS`), as `checkpoints.sharded_io` does, are read in place. XLA by
itself stores scales in another order, and blocks too if E is a multiple of 128 and F is not: then every call
copies all of them.

Letters as in api.py.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gptoss_jax.kernels.backend import matmul_precision, without_x64
from gptoss_jax.kernels.group_tiles import make_group_metadata, zero_ungrouped
from gptoss_jax.kernels.mxfp4 import codec

MAX_TILE_ROWS = 128
# Outputs in a tile, by the bytes of a value of x: what fits into the 16 MiB of VMEM that a kernel gets.
TILE_WIDTH = {2: 640, 4: 384}


@without_x64
def mosaic_mxfp4_matmul(
    x_RD: jax.Array,
    blocks_EFGC: jax.Array,
    scales_EFG: jax.Array,
    group_sizes_E: jax.Array,
    interpret: bool = False,
) -> jax.Array:
    """`mxfp4_grouped_matmul` without a bias. `interpret` runs it on any platform, slowly. In a program for
    several devices, call it in a `jax.shard_map`."""
    rows, D = x_RD.shape
    _, F, G, C = blocks_EFGC.shape
    tile_rows = min(MAX_TILE_ROWS, -(-rows // 16) * 16)
    width = min(F, TILE_WIDTH[x_RD.dtype.itemsize])
    tiles = make_group_metadata(group_sizes_E, rows, tile_rows, aligned=True)
    tables = tiles.row_V // tile_rows, tiles.group_V, tiles.start_V, tiles.end_V
    x_PRC = x_RD.reshape(rows, D // 2, 2).transpose(2, 0, 1)
    weights = [
        blocks_EFGC.transpose(codec.TPU_LAYOUTS["blocks"]),
        scales_EFG.transpose(codec.TPU_LAYOUTS["scales"]),
    ]
    if not interpret:
        # Else a small stack may be copied to VMEM, all of it.
        weights = [pltpu.with_memory_space_constraint(part, pltpu.HBM) for part in weights]
    y_RF = pl.pallas_call(
        _kernel,
        out_shape=jax.ShapeDtypeStruct((rows, F), x_RD.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(F, width), tiles.num_tiles),
            in_specs=[
                pl.BlockSpec((2, tile_rows, D // 2), lambda f, v, tables: (0, tables[0][v], 0)),
                [
                    pl.BlockSpec((None, G, C, width), lambda f, v, tables: (tables[1][v], 0, 0, f)),
                    pl.BlockSpec((None, G, width), lambda f, v, tables: (tables[1][v], 0, f)),
                ],
            ],
            out_specs=pl.BlockSpec((tile_rows, width), lambda f, v, tables: (tables[0][v], f)),
            scratch_shapes=[
                [
                    pltpu.VMEM((2, D // 2, width), x_RD.dtype),
                    pltpu.VMEM((G, width), jnp.float32),
                    pltpu.VMEM((G, width), jnp.float32),
                ]
            ],
        ),
        interpret=interpret,
        name="mxfp4_matmul",
    )(tables, x_PRC, weights)
    # Rows without a group were never written.
    return zero_ungrouped(y_RF, group_sizes_E)


def _kernel(tables, x_ref, weight_refs, y_ref, scratch_refs):
    (tile_V, group_V, start_V, end_V), (w_ref, *_) = tables, scratch_refs
    step = pl.program_id(1)

    @pl.when((step == 0) | (group_V[step] != group_V[jnp.maximum(step - 1, 0)]))
    def _():
        _dequantize(weight_refs, scratch_refs)

    def matmul(part):
        precision = matmul_precision(w_ref.dtype)
        return jnp.dot(x_ref[part], w_ref[part], precision=precision, preferred_element_type=jnp.float32)

    row = tile_V[step] * y_ref.shape[0] + lax.broadcasted_iota(jnp.int32, y_ref.shape, 0)
    row_mask = (row >= start_V[step]) & (row < end_V[step])
    y_ref[...] = jnp.where(row_mask, (matmul(0) + matmul(1)).astype(y_ref.dtype), y_ref[...])


def _dequantize(weight_refs, scratch_refs):
    """Dequantizes a tile of one group's weights, as `codec.dequantize` with fewer operations.

    Values that are subnormal in float32, below 2^-126, may become zero.
    """
    (blocks_ref, scales_ref), (w_ref, scale_ref, one_ref) = weight_refs, scratch_refs
    scale = scales_ref[...].astype(jnp.int32)
    # The smallest scale is subnormal: twice that, and half of each code.
    power = lax.bitcast_convert_type(jnp.maximum(scale, 1) << 23, jnp.float32)
    scale_ref[...] = jnp.where(scale == codec.NAN_SCALE, jnp.nan, power)
    one_ref[...] = jnp.where(scale == 0, 0.5, 1.0)

    def one_block(g, _):
        byte = blocks_ref[g].astype(jnp.int32)
        scale, one = scale_ref[pl.ds(g, 1), :], one_ref[pl.ds(g, 1), :]
        half = lax.bitcast_convert_type(one, jnp.int32) - (1 << 23)
        for part, top in enumerate((byte << 28, byte << 24)):
            # The code's magnitude as exponent and significand: right from 1 on. Below it, 0 and 0.5 give 0.5
            # and 0.75, twice as near to 1 as they should be.
            size = lax.bitcast_convert_type(((top >> 6) & 0x1C00000) + half, jnp.float32)
            size = jnp.minimum(size, size + size - one) * scale
            bits = lax.bitcast_convert_type(size, jnp.int32) | (top & -0x80000000)
            value = lax.bitcast_convert_type(bits, jnp.float32)
            w_ref[part, pl.ds(g * codec.BLOCK_BYTES, codec.BLOCK_BYTES), :] = value.astype(w_ref.dtype)
        return 0

    lax.fori_loop(0, blocks_ref.shape[0], one_block, 0)
