"""The product with packed experts as a TPU kernel of our own: Pallas, its Mosaic backend.

A visit is a tile of rows and a group that has rows there. The ids of the groups are known before a step
begins, so that its bytes are on their way while the step before it computes, and no others are ever read.
They become numbers in VMEM, once for all the tiles of a group that follow one another.

The outputs stand along the lanes: the kernel takes blocks as [E, G, C, F] and scales as [E, G, F]. Then a
scale is one number above the 16 bytes it belongs to, and nothing has to move between lanes. A byte's two
numbers, those of an even input and of the odd one after it, go into two matrices, and the rows' even and odd
inputs stand apart too.

Arrays that are stored so (`codec.TPU_LAYOUTS`), as `checkpoints.sharded_io` does, are read in place.
Left to itself, XLA keeps scales in another order, and blocks too where E is a multiple of 128 and F is not:
then every call copies all of them.

Letters as in mxfp4_grouped_matmul.py.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gptoss_jax.kernels.backend import without_x64
from gptoss_jax.kernels.grouped_matmul.api import PRECISION, is_in_group
from gptoss_jax.kernels.mxfp4 import codec
from gptoss_jax.kernels.mxfp4.api import visits

# Rows in a tile, at most.
ROWS = 128
# Outputs in a tile, by the bytes of a number: what fits into the 16 MiB of VMEM that a kernel gets.
WIDTH = {2: 640, 4: 384}


@without_x64
def mosaic_mxfp4_matmul(
    x_RD: jax.Array,
    blocks_EFGC: jax.Array,
    scales_EFG: jax.Array,
    group_sizes_E: jax.Array,
    interpret: bool = False,
) -> jax.Array:
    """As `mxfp4_grouped_matmul`, without a bias: [R, F]; rows of no group give zero.

    `interpret` runs the kernel on any platform, slowly. In a program for several devices, call it in a
    `jax.shard_map`.
    """
    rows, D = x_RD.shape
    _, F, G, C = blocks_EFGC.shape
    row_tile = min(ROWS, -(-rows // 16) * 16)
    width = min(F, WIDTH[x_RD.dtype.itemsize])
    count, *tables = visits(group_sizes_E, rows, row_tile)
    x_PRC = x_RD.reshape(rows, D // 2, 2).transpose(2, 0, 1)
    packed = (
        blocks_EFGC.transpose(codec.TPU_LAYOUTS["blocks"]),
        scales_EFG.transpose(codec.TPU_LAYOUTS["scales"]),
    )

    y_RF = pl.pallas_call(
        _kernel,
        out_shape=jax.ShapeDtypeStruct((rows, F), x_RD.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tables),
            grid=(pl.cdiv(F, width), count),
            in_specs=[
                pl.BlockSpec((2, row_tile, D // 2), lambda f, v, tile_V, *_: (0, tile_V[v], 0)),
                pl.BlockSpec((None, G, C, width), lambda f, v, _, group_V, *__: (group_V[v], 0, 0, f)),
                pl.BlockSpec((None, G, width), lambda f, v, _, group_V, *__: (group_V[v], 0, f)),
            ],
            out_specs=pl.BlockSpec((row_tile, width), lambda f, v, tile_V, *_: (tile_V[v], f)),
            scratch_shapes=[
                pltpu.VMEM((2, D // 2, width), x_RD.dtype),
                pltpu.VMEM((G, width), jnp.float32),
                pltpu.VMEM((G, width), jnp.float32),
            ],
        ),
        interpret=interpret,
        name="mxfp4_matmul",
    )(*tables, x_PRC, *(packed if interpret else map(_stays, packed)))
    # What lies past the groups was never written.
    return jnp.where(is_in_group(rows, group_sizes_E), y_RF, 0)


def _stays(packed):
    # Else a small stack may be brought to VMEM, all of it.
    return pltpu.with_memory_space_constraint(packed, pltpu.HBM)


def _kernel(tile_V, group_V, start_V, end_V, x_ref, blocks_ref, scales_ref, y_ref, w_ref, scale_ref, one_ref):
    visit = pl.program_id(1)

    @pl.when((visit == 0) | (group_V[visit] != group_V[jnp.maximum(visit - 1, 0)]))
    def _():
        _unpack(blocks_ref, scales_ref, w_ref, scale_ref, one_ref)

    def product(part):
        precision = PRECISION if w_ref.dtype == jnp.float32 else lax.Precision.DEFAULT
        return jnp.dot(x_ref[part], w_ref[part], precision=precision, preferred_element_type=jnp.float32)

    rows = y_ref.shape[0]
    row = tile_V[visit] * rows + lax.broadcasted_iota(jnp.int32, y_ref.shape, 0)
    mine = (row >= start_V[visit]) & (row < end_V[visit])
    y_ref[...] = jnp.where(mine, (product(0) + product(1)).astype(y_ref.dtype), y_ref[...])


def _unpack(blocks_ref, scales_ref, w_ref, scale_ref, one_ref):
    """A tile of one group's weights as numbers: `codec.dequantize` with fewer operations.

    Numbers that are not normal in float32, below 2^-126, may become zero.
    """
    scale = scales_ref[...].astype(jnp.int32)
    # The smallest scale is no normal float: twice as much, and all codes half their size.
    power = lax.bitcast_convert_type(jnp.maximum(scale, 1) << 23, jnp.float32)
    scale_ref[...] = jnp.where(scale == codec.NAN_SCALE, jnp.nan, power)
    one_ref[...] = jnp.where(scale == 0, 0.5, 1.0)

    def one_group(g, _):
        byte = blocks_ref[g].astype(jnp.int32)
        scale, one = scale_ref[pl.ds(g, 1), :], one_ref[pl.ds(g, 1), :]
        half = lax.bitcast_convert_type(one, jnp.int32) - (1 << 23)
        for part, top in enumerate((byte << 28, byte << 24)):
            # The code's size as exponent and significand: right from 1 on, and below it, where 0.5 and 0.75
            # stand for 0 and 0.5, twice as near to 1 as it should be.
            size = lax.bitcast_convert_type(((top >> 6) & 0x1C00000) + half, jnp.float32)
            size = jnp.minimum(size, size + size - one) * scale
            bits = lax.bitcast_convert_type(size, jnp.int32) | (top & -0x80000000)
            number = lax.bitcast_convert_type(bits, jnp.float32)
            w_ref[part, pl.ds(g * codec.BLOCK_BYTES, codec.BLOCK_BYTES), :] = number.astype(w_ref.dtype)
        return 0

    lax.fori_loop(0, blocks_ref.shape[0], one_group, 0)
