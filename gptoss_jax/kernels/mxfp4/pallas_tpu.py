"""Grouped matmul with MXFP4 weights on TPU, and its gradient in x: Pallas with its Mosaic backend.

A grid step is a tile of rows and a group with rows in it. The ids of the groups are prefetched, so the bytes
of a group are loaded during the previous step, and no others are ever read. A tile of outputs, over the whole
contracted axis, is dequantized in VMEM once for all consecutive row tiles of a group.

The axis F is along the lanes: the kernel reads blocks as [E, G, C, F] and scales as [E, G, F]. A scale is
thus in the same lane as its 16 bytes, and nothing moves between lanes. The two values of a byte are in
adjacent rows, and TPUs store such a pair of bfloat16 values in one 32-bit word.

Arrays in this layout (`codec.TPU_LAYOUTS`), which `checkpoints.sharded_io` uses, are read in place. XLA's
default layout of scales differs, as does that of blocks if E is a multiple of 128 and F is not: every call
then copies all of them.

Letters as in api.py.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gptoss_jax.kernels.backend import matmul_precision, without_x64
from gptoss_jax.kernels.group_tiles import make_group_metadata, zero_ungrouped
from gptoss_jax.kernels.mxfp4 import codec

MAX_TILE_ROWS = 128
# Outputs (F) per tile, by the itemsize of x.
TILE_WIDTH = {2: 640, 4: 384}
# Blocks of 32 outputs (D) per tile of the gradient: the number of uint8 rows in a TPU memory tile.
GRADIENT_BLOCKS = 32
# Number of values along F that are dequantized at once, limited by registers.
DEQUANTIZED_WIDTH = 640
# Range of scales for which every code is a normal number, as in the released weights; others are slower.
LEAST_USUAL_SCALE, LARGEST_USUAL_SCALE = 2, 252
SIGNS = -0x7FFF8000  # the top bits of both halves of a word
# VMEM limit of the kernel; v5e, v5p and v6e have 96 MiB or more.
VMEM = 64 << 20


@without_x64
def mosaic_mxfp4_matmul(
    x_RD: jax.Array,
    blocks_EFGC: jax.Array,
    scales_EFG: jax.Array,
    group_sizes_E: jax.Array,
    transposed: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """`mxfp4_grouped_matmul` without a bias or, if `transposed`, its gradient in x, [R, F] -> [R, D].

    `interpret` runs it on any platform, slowly. In a program for several devices, call it inside
    `jax.shard_map`.
    """
    rows, inner = x_RD.shape
    _, F, G, C = blocks_EFGC.shape
    tile_rows = min(MAX_TILE_ROWS, -(-rows // 16) * 16)
    if transposed:
        tile_blocks, width = min(G, GRADIENT_BLOCKS), F
        num_outputs, tile_outputs = codec.BLOCK_SIZE * G, codec.BLOCK_SIZE * tile_blocks
    else:
        tile_blocks, width = G, min(F, TILE_WIDTH[x_RD.dtype.itemsize])
        num_outputs, tile_outputs = F, width
    tiles = make_group_metadata(group_sizes_E, rows, tile_rows, aligned=True)
    tables = tiles.row_V // tile_rows, tiles.group_V, tiles.start_V, tiles.end_V
    weights = [
        blocks_EFGC.transpose(codec.TPU_LAYOUTS["blocks"]),
        scales_EFG.transpose(codec.TPU_LAYOUTS["scales"]),
    ]
    if not interpret:
        # Otherwise, the compiler may copy a small stack to VMEM entirely.
        weights = [pltpu.with_memory_space_constraint(part, pltpu.HBM) for part in weights]

    def tile_of_weights(i, v, tables):
        return (tables[1][v], i, 0) if transposed else (tables[1][v], 0, i)

    def tile_of_blocks(i, v, tables):
        group, g, f = tile_of_weights(i, v, tables)
        return group, g, 0, f

    y_RF = pl.pallas_call(
        functools.partial(_kernel, transposed=transposed),
        out_shape=jax.ShapeDtypeStruct((rows, num_outputs), x_RD.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(num_outputs, tile_outputs), tiles.num_tiles),
            in_specs=[
                pl.BlockSpec((tile_rows, inner), lambda i, v, tables: (tables[0][v], 0)),
                [
                    pl.BlockSpec((None, tile_blocks, C, width), tile_of_blocks),
                    pl.BlockSpec((None, tile_blocks, width), tile_of_weights),
                ],
            ],
            out_specs=pl.BlockSpec((tile_rows, tile_outputs), lambda i, v, tables: (tables[0][v], i)),
            scratch_shapes=[
                [
                    pltpu.VMEM((tile_blocks * C, width), jnp.int32),
                    pltpu.VMEM((tile_blocks, width), jnp.int32),
                ]
            ],
        ),
        # Chips with two cores share the tiles of outputs.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        interpret=interpret,
        name="mxfp4_matmul_dx" if transposed else "mxfp4_matmul",
    )(tables, x_RD, weights)
    # The kernel does not write rows without a group.
    return zero_ungrouped(y_RF, group_sizes_E)


def _kernel(
    tables: tuple[jax.Ref, ...],
    x_ref: jax.Ref,
    weight_refs: tuple[jax.Ref, jax.Ref],
    y_ref: jax.Ref,
    scratch_refs: tuple[jax.Ref, jax.Ref],
    transposed: bool,
) -> None:
    (tile_V, group_V, start_V, end_V), (blocks_ref, scales_ref) = tables, weight_refs
    w_ref, scale_ref = scratch_refs
    step = pl.program_id(1)

    @pl.when((step == 0) | (group_V[step] != group_V[jnp.maximum(step - 1, 0)]))
    def _():
        _dequantize(blocks_ref, scales_ref, w_ref, scale_ref)

    w_DF = pltpu.bitcast(w_ref[...], jnp.bfloat16).astype(x_ref.dtype)
    # Contracts D or, if transposed, F.
    y = lax.dot_general(
        x_ref[...],
        w_DF,
        (((1,), (int(transposed),)), ((), ())),
        precision=matmul_precision(x_ref.dtype),
        preferred_element_type=jnp.float32,
    )
    row = tile_V[step] * y_ref.shape[0] + lax.broadcasted_iota(jnp.int32, y_ref.shape, 0)
    row_mask = (row >= start_V[step]) & (row < end_V[step])
    y_ref[...] = jnp.where(row_mask, y.astype(y_ref.dtype), y_ref[...])


def _dequantize(blocks_ref: jax.Ref, scales_ref: jax.Ref, w_ref: jax.Ref, scale_ref: jax.Ref) -> None:
    """Dequantizes a [D, F] tile of one group's weights, packing two values along D per word."""
    scale_GF = scales_ref[...].astype(jnp.int32)
    is_extreme_GF = (scale_GF < LEAST_USUAL_SCALE) | (scale_GF > LARGEST_USUAL_SCALE)
    is_usual = jnp.max(jnp.where(is_extreme_GF, 1.0, 0.0)) == 0
    num_blocks, C, width = blocks_ref.shape

    def dequantize_blocks(to_pairs):
        def one_block(g, _, lanes):
            byte = blocks_ref[g, :, lanes].astype(jnp.int32)
            w_ref[pl.ds(g * C, C), lanes] = to_pairs(byte, scale_ref[pl.ds(g, 1), lanes])
            return 0

        for start in range(0, width, DEQUANTIZED_WIDTH):
            lanes = pl.ds(start, min(DEQUANTIZED_WIDTH, width - start))
            lax.fori_loop(0, num_blocks, functools.partial(one_block, lanes=lanes), 0)

    @pl.when(is_usual)
    def _():
        # In both halves of a word: the exponent of 0.5, minus half a step because code 1 is also 0.5.
        offset_GF = (scale_GF << 7) - 0xC0
        scale_ref[...] = offset_GF | offset_GF << 16
        dequantize_blocks(_usual_pairs)

    @pl.when(~is_usual)
    def _():
        scale_ref[...] = scale_GF
        dequantize_blocks(_pairs)


def _pairs(byte: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns the two values of each byte as a word of two bfloat16, the low nibble in the lower half."""
    values = codec.kernel_values(byte, *codec.kernel_scales(scale))
    low, high = (lax.bitcast_convert_type(value, jnp.int32) for value in values)
    # A bfloat16 is the upper half of a float32.
    return lax.shift_right_logical(low, 16) | (high & -0x10000)


def _usual_pairs(byte: jax.Array, offset: jax.Array) -> jax.Array:
    """`_pairs` for scales with which all values are finite and normal: integer arithmetic on both halves of a
    word at once, in two thirds of the time."""
    codes = byte | byte << 12
    # Exponent and significand: with the offset, correct from code 2 on.
    size = (codes << 6) & 0x01C001C0
    is_above_1 = lax.shift_right_logical(size + 0x7F807F80, 9) & 0x00400040
    top = (size + 0x7FC07FC0) & SIGNS  # set if the size is not 0
    value = (size + offset + is_above_1) & (top - lax.shift_right_logical(top, 15))
    return value | (codes << 12) & SIGNS
