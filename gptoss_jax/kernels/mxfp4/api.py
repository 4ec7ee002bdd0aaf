"""Rows sorted by group times one packed matrix per group: the experts' product where they stay in MXFP4.

Packed bytes are read where they lie, and those alone of groups that have rows: weights are numbers for a
moment, inside of a kernel or one group's at a time. So what a call costs, in time and memory, grows with the
rows and their groups, not with E: groups may be the experts of all layers, laid one after the other, with
all rows in one layer's.

Letters here: R rows, E groups, D input width, F output width, G = D / 32 groups of weights that share a
scale, C = 16 bytes of each, V visits.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gptoss_jax.kernels import backend, selection
from gptoss_jax.kernels.cpu import build
from gptoss_jax.kernels.grouped_matmul.api import PRECISION, Tile, add_group_bias, is_native
from gptoss_jax.kernels.layer_view import LayerView, as_groups
from gptoss_jax.kernels.mxfp4 import codec

# Rows that a group's matrix is multiplied with in one turn of the loop in plain XLA.
BLOCK = 64


def mxfp4_grouped_matmul(
    x_RD: jax.Array,
    blocks_EFGC: jax.Array | LayerView,
    scales_EFG: jax.Array | LayerView,
    group_sizes_E: jax.Array,
    bias_EF: jax.Array | None = None,
) -> jax.Array:
    """Multiplies each group of rows by its own packed matrix, and adds its own bias; differentiable in rows
    and bias.

    Args:
      x_RD: bfloat16 or float32: rows, those of group 0 first, then those of group 1, and so on.
      blocks_EFGC: uint8, the codes of weights, as in `mxfp4`. That of output f and input d is
        `codec.dequantize(blocks, scales)[e, f, d]`.
      scales_EFG: uint8.
      group_sizes_E: int32, rows in each group, possibly none; the sum may be below R.
      bias_EF: one row per group, or none.

    Returns:
      [R, F] in the type of `x_RD`; rows of no group are zero.
    """
    blocks, sizes = as_groups(blocks_EFGC, group_sizes_E.astype(jnp.int32))
    scales, _ = as_groups(scales_EFG, group_sizes_E)
    y_RF = _product(x_RD, blocks, scales, sizes, _form(x_RD))
    return y_RF if bias_EF is None else add_group_bias(y_RF, bias_EF, group_sizes_E)


def _form(x_RD: jax.Array) -> Callable:
    """The form for the platform that is compiled for."""
    if is_native("mxfp4_matmul", x_RD.dtype):
        return native_mxfp4_matmul
    if backend.platform() == "cpu" or not selection.is_enabled("mxfp4_matmul"):
        return _looped
    # Imported lazily: Pallas backends are slow to import.
    if backend.platform() == "tpu":
        from gptoss_jax.kernels.mxfp4.pallas_tpu import mosaic_mxfp4_matmul

        return mosaic_mxfp4_matmul
    from gptoss_jax.kernels.mxfp4.pallas_triton import MOST_ROWS, triton_mxfp4_matmul

    return triton_mxfp4_matmul if x_RD.shape[0] <= MOST_ROWS else _looped


def native_mxfp4_matmul(
    x_RD: jax.Array, blocks_EFGC: jax.Array, scales_EFG: jax.Array, group_sizes_E: jax.Array
) -> jax.Array:
    """The same by the kernels of `native/grouped_matmul.cc`, for CPU and float32: a block of a matrix becomes
    numbers where it is packed for the product anyway. Not differentiable by itself."""
    result = jax.ShapeDtypeStruct((x_RD.shape[0], blocks_EFGC.shape[1]), jnp.float32)
    call = jax.ffi.ffi_call(build.target("GroupedPacked"), result)
    return call(x_RD, blocks_EFGC, scales_EFG, group_sizes_E)


def looped_mxfp4_matmul(
    x_RD: jax.Array, blocks_EFGC: jax.Array, scales_EFG: jax.Array, group_sizes_E: jax.Array
) -> jax.Array:
    """The same in plain XLA, for every platform: groups that have rows take their turns, each unpacked whole
    and then multiplied with its rows. At most one matrix exists at a time."""
    return _product(x_RD, blocks_EFGC, scales_EFG, group_sizes_E.astype(jnp.int32), _looped)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _product(x_RD, blocks_EFGC, scales_EFG, group_sizes_E, form):
    return form(x_RD, blocks_EFGC, scales_EFG, group_sizes_E)


def _product_fwd(x_RD, blocks_EFGC, scales_EFG, group_sizes_E, form):
    return form(x_RD, blocks_EFGC, scales_EFG, group_sizes_E), (blocks_EFGC, scales_EFG, group_sizes_E)


def _product_bwd(form, kept, g_RF):
    return _looped(g_RF, *kept, turned=True), None, None, None


_product.defvjp(_product_fwd, _product_bwd)


def _looped(x_RD, blocks_EFGC, scales_EFG, group_sizes_E, turned=False):
    """[R, D] x [E, F, D] -> [R, F] or, turned, [R, F] x [E, F, D] -> [R, D]."""
    rows, (_, outputs, G, _) = x_RD.shape[0], blocks_EFGC.shape
    width, equation = (codec.BLOCK_SIZE * G, "RF,FD->RD") if turned else (outputs, "RD,FD->RF")
    block = min(rows, BLOCK)
    ends_E = jnp.minimum(jnp.cumsum(group_sizes_E, dtype=jnp.int32), rows)
    starts_E = ends_E - group_sizes_E
    # Groups that have rows, one for each such count of them.
    nth_E = jnp.cumsum(group_sizes_E > 0, dtype=jnp.int32)

    def one_group(n, y_R):
        group = jnp.sum(nth_E <= n, dtype=jnp.int32)
        w_FD = codec.dequantize(blocks_EFGC[group], scales_EFG[group], x_RD.dtype)

        def one_tile(t, y_R):
            tile = Tile.at(group, starts_E[group] + t * block, ends_E[group], block, rows)
            return tile.write(y_R, jnp.einsum(equation, tile.read(x_RD), w_FD, precision=PRECISION))

        return lax.fori_loop(0, -(-group_sizes_E[group] // block), one_tile, y_R)

    return lax.fori_loop(0, nth_E[-1], one_group, jnp.zeros((rows, width), x_RD.dtype))


class Visits(NamedTuple):
    """The pairs of a tile of rows and a group that has rows there, tile by tile: what a kernel works
    through."""

    count: jax.Array  # how many there are; entries beyond are room
    tile_V: jax.Array
    group_V: jax.Array
    # Of the group: its first row, and the row after its last.
    start_V: jax.Array
    end_V: jax.Array


def visits(group_sizes_E: jax.Array, rows: int, block: int) -> Visits:
    """How tiles of `block` rows, from the first row on, meet groups. Rows of no group are not visited."""
    groups = group_sizes_E.shape[0]
    # Kernels write where they are told: sizes that promise too much must not lead them out of the array.
    ends_E = jnp.minimum(jnp.cumsum(group_sizes_E, dtype=jnp.int32), rows)
    starts_E = jnp.concatenate([jnp.zeros(1, jnp.int32), ends_E[:-1]])
    tiles_E = jnp.where(ends_E > starts_E, (ends_E - 1) // block - starts_E // block + 1, 0)
    last_E = jnp.cumsum(tiles_E, dtype=jnp.int32)
    # Each group that has rows, and there are no more of them than rows, adds at most one visit to the tiles.
    visit = jnp.arange(-(-rows // block) + min(groups, rows), dtype=jnp.int32)
    group_V = jnp.searchsorted(last_E, visit, side="right", method="compare_all").astype(jnp.int32)
    group_V = jnp.minimum(group_V, groups - 1)
    tile_V = starts_E[group_V] // block + visit - (last_E - tiles_E)[group_V]
    here = visit < last_E[-1]
    tables = (tile_V, group_V, starts_E[group_V], ends_E[group_V])
    return Visits(last_E[-1].astype(jnp.int32), *(jnp.where(here, table, 0) for table in tables))
