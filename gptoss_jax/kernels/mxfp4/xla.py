"""Grouped matmul with MXFP4 weights in plain XLA, for all platforms, and its gradient in x."""

import jax
import jax.numpy as jnp
from jax import lax

from gptoss_jax.kernels.group_tiles import RowTile, make_group_metadata
from gptoss_jax.kernels.mxfp4 import codec

TILE_ROWS = 64


def xla_mxfp4_matmul(
    x_RD: jax.Array,
    blocks_EFGC: jax.Array,
    scales_EFG: jax.Array,
    group_sizes_E: jax.Array,
    transposed: bool = False,
) -> jax.Array:
    """`mxfp4_grouped_matmul` without a bias: dequantizes the matrices of nonempty groups, one at a time.

    [R, D] x [E, F, D] -> [R, F] or, transposed, [R, F] x [E, F, D] -> [R, D]. Not differentiable.
    """
    rows, (F, G) = x_RD.shape[0], scales_EFG.shape[1:]
    width, equation = (codec.BLOCK_SIZE * G, "RF,FD->RD") if transposed else (F, "RD,FD->RF")
    tile_rows = min(rows, TILE_ROWS)
    tiles = make_group_metadata(group_sizes_E.astype(jnp.int32), rows, tile_rows)

    def one_group(state):
        index, y_R = state
        group = tiles.group_V[index]
        w_FD = codec.dequantize(blocks_EFGC[group], scales_EFG[group], x_RD.dtype)

        def one_tile(index, y_R):
            tile = RowTile.of(tiles, index, rows, tile_rows)
            return tile.write(y_R, jnp.einsum(equation, tile.read(x_RD), w_FD, precision="highest"))

        end = index + -(-(tiles.end_V[index] - tiles.start_V[index]) // tile_rows)
        return end, lax.fori_loop(index, end, one_tile, y_R)

    state = jnp.int32(0), jnp.zeros((rows, width), x_RD.dtype)
    return lax.while_loop(lambda state: state[0] < tiles.num_tiles, one_group, state)[1]
