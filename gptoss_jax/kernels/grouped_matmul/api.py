"""Rows sorted by group times one matrix per group: the matrix product inside the experts.

Letters here: R rows, E groups (experts), D input width, F output width, C rows of a group that are worked
through together. Rows past the sum of the group sizes belong to no group and come out as zeros.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gptoss_jax.kernels import backend, selection
from gptoss_jax.kernels.cpu import build
from gptoss_jax.kernels.layer_view import LayerView, as_groups

PRECISION = lax.Precision.HIGHEST  # float32 stays float32 on TPU and GPU; narrower types are not affected


def grouped_matmul(
    x_RD: jax.Array,
    w_EDF: jax.Array | LayerView,
    group_sizes_E: jax.Array,
    bias_EF: jax.Array | None = None,
) -> jax.Array:
    """Multiplies each group of rows by its own matrix, and adds its own bias; differentiable in all three.

    Args:
      x_RD: rows, those of group 0 first, then those of group 1, and so on.
      w_EDF: one matrix per group; more dimensions behind D are outputs too.
      group_sizes_E: int32, rows in each group; the sum may be below R.
      bias_EF: one row per group, or none.

    Returns:
      [R, F] in the type of `x_RD`; rows of no group are zero.
    """
    w_GDF, sizes_G = as_groups(w_EDF, group_sizes_E)
    w_GDF = w_GDF.reshape(*w_GDF.shape[:2], -1)
    if is_native("grouped_matmul", x_RD.dtype) and not isinstance(w_EDF, LayerView):
        bias = None if bias_EF is None else bias_EF.reshape(bias_EF.shape[0], -1)
        return native_grouped_matmul(x_RD, w_GDF, sizes_G, bias)
    form = native_grouped_matmul if is_native("grouped_matmul", x_RD.dtype) else _form()
    y_RF = form(x_RD, w_GDF, sizes_G)
    return y_RF if bias_EF is None else add_group_bias(y_RF, bias_EF, group_sizes_E)


def _form() -> Callable:
    """The form for the platform that is compiled for. `lax.ragged_dot` is none of them: on CPU and GPU it
    multiplies every row by every group's matrix, and on TPU it does so for the gradient of the matrices."""
    if backend.platform() == "cpu" or not selection.is_enabled("grouped_matmul"):
        return blocked_grouped_matmul
    # Imported lazily: Pallas backends are slow to import.
    if backend.platform() == "tpu":
        from gptoss_jax.kernels.grouped_matmul.pallas_tpu import megablox_grouped_matmul

        return megablox_grouped_matmul
    from gptoss_jax.kernels.grouped_matmul.pallas_triton import triton_grouped_matmul

    return triton_grouped_matmul


def is_native(kernel: str, dtype: jnp.dtype) -> bool:
    """Returns True if a C++ kernel applies: float32 on CPU, not turned off, and compiled."""
    fits = backend.platform() == "cpu" and dtype == jnp.float32
    return fits and selection.is_enabled(kernel) and build.is_available()


def reference_grouped_matmul(x_RD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """The plain reference, by `jax.lax.ragged_dot`."""
    # What it makes of rows of no group is left open: the mask before keeps that out of the gradient, the one
    # after out of the result.
    in_group = is_in_group(x_RD.shape[0], group_sizes_E)
    # The TPU kernel refuses to be told of float32 where the operands are narrower.
    precision = PRECISION if x_RD.dtype == jnp.float32 else lax.Precision.DEFAULT
    y_RF = lax.ragged_dot(jnp.where(in_group, x_RD, 0), w_EDF, group_sizes_E, precision=precision)
    return jnp.where(in_group, y_RF, 0)


def native_grouped_matmul(
    x_RD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array, bias_EF: jax.Array | None = None
) -> jax.Array:
    """The same by the kernels of `native/grouped_matmul.cc`, for CPU and float32: work is that of the rows
    there are, near the processor's peak."""
    bias = jnp.zeros(0, jnp.float32) if bias_EF is None else bias_EF
    return _native(x_RD, w_EDF, bias, group_sizes_E)


def _call(name, *shapes):
    results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.ffi.ffi_call(build.target(name), results)


@jax.custom_vjp
def _native(x_RD, w_EDF, bias, group_sizes_E):
    call = _call("GroupedForward", (x_RD.shape[0], w_EDF.shape[2]))
    return call(x_RD, w_EDF, bias, group_sizes_E, turned=False)[0]


def _native_bwd(kept, g_RF):
    x_RD, w_EDF, bias, group_sizes_E = kept
    nothing = jnp.zeros(0, jnp.float32)
    (dx_RD,) = _call("GroupedForward", x_RD.shape)(g_RF, w_EDF, nothing, group_sizes_E, turned=True)
    outer = _call("GroupedOuter", w_EDF.shape, (w_EDF.shape[0], w_EDF.shape[2]))
    dw_EDF, db_EF = outer(x_RD, g_RF, group_sizes_E)
    return dx_RD, dw_EDF, db_EF if bias.size else nothing, None


_native.defvjp(lambda *args: (_native(*args), args), _native_bwd)


@jax.custom_vjp
def blocked_grouped_matmul(x_RD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """The same in plain XLA: work grows with R, not E * R.

    The first C rows of every group are multiplied together, all groups in one batch; C is a little more than
    the mean, so that there are hardly any rows beyond where groups are even. What is beyond follows in a loop
    over blocks of rows whose trip count is that of the blocks there are. So at most about twice the work of
    the rows is done, however uneven the groups are, and most of it in products that are as large as they can
    be.
    """
    return _blocked_forward(x_RD, w_EDF, group_sizes_E)[0]


def _multiply(x, w):
    return jnp.matmul(x, w, precision=PRECISION)


def _sizes(rows: int, groups: int) -> tuple[int, int]:
    """C, and the rows of a block of the rest."""
    mean = rows / groups
    # Below so many rows, reading the matrices of groups that have no rows would cost more than it saves.
    together = 0 if mean < 8 else min(rows, -(-int(1.125 * mean) // 16) * 16)
    block = next((size for size in (256, 128, 64, 32) if mean >= 8 * size), 16)
    return together, min(rows, block)


def _together(x_RD, w_EDF, group_sizes_E, together):
    """The first rows of each group, [R, F]; zero for the others."""
    rows, groups = x_RD.shape[0], w_EDF.shape[0]
    ends_E = jnp.cumsum(group_sizes_E, dtype=jnp.int32)
    starts_E = ends_E - group_sizes_E
    slot_EC = starts_E[:, None] + jnp.arange(together, dtype=jnp.int32)
    row_of_slot = jnp.where(slot_EC < ends_E[:, None], slot_EC, -1).reshape(-1)
    group_R = _group_of_row(group_sizes_E, rows)
    place_R = jnp.arange(rows, dtype=jnp.int32) - jnp.append(starts_E, jnp.int32(rows))[group_R]
    inside_R = (group_R < groups) & (place_R < together)
    slot_of_row = jnp.where(inside_R, group_R * together + place_R, -1)
    x_ECD = take(x_RD, row_of_slot, slot_of_row).reshape(groups, together, -1)
    return take(_multiply(x_ECD, w_EDF).reshape(groups * together, -1), slot_of_row, row_of_slot)


def _blocked_forward(x_RD, w_EDF, group_sizes_E):
    rows, groups = x_RD.shape[0], group_sizes_E.shape[0]
    together, block = _sizes(rows, groups)
    y_RF = jnp.zeros((rows, w_EDF.shape[2]), x_RD.dtype)
    if together:
        y_RF = _together(x_RD, w_EDF, group_sizes_E, together)

    def step(tile, y_RF):
        return tile.write(y_RF, _multiply(tile.read(x_RD), w_EDF[tile.group]))

    y_RF = _over_rest(group_sizes_E, rows, together, block, step, y_RF)
    return y_RF, (x_RD, w_EDF, group_sizes_E)


def _blocked_backward(kept, g_RF):
    x_RD, w_EDF, group_sizes_E = kept
    rows, groups = x_RD.shape[0], group_sizes_E.shape[0]
    together, block = _sizes(rows, groups)
    gradients = jnp.zeros_like(x_RD), jnp.zeros_like(w_EDF)
    if together:
        first = functools.partial(_together, group_sizes_E=group_sizes_E, together=together)
        gradients = jax.vjp(first, x_RD, w_EDF)[1](g_RF)

    def step(tile, gradients):
        dx_RD, dw_EDF = gradients
        dx, dw = jax.vjp(_multiply, tile.read(x_RD), w_EDF[tile.group])[1](tile.read(g_RF))
        return tile.write(dx_RD, dx), dw_EDF.at[tile.group].add(dw)

    return *_over_rest(group_sizes_E, rows, together, block, step, gradients), None


blocked_grouped_matmul.defvjp(_blocked_forward, _blocked_backward)


class Tile(NamedTuple):
    """A block of neighbouring rows, some of which are those of one group that are its turn."""

    group: jax.Array
    start: jax.Array
    is_mine: jax.Array  # bool [block, 1]

    @classmethod
    def at(cls, group, first, end, block, rows):
        """That of the rows from `first` on, those before `end`; `rows`, of at least `block`, is all there
        are."""
        start = jnp.minimum(first, rows - block)
        row = start + jnp.arange(block, dtype=jnp.int32)[:, None]
        return cls(group, start, (row >= first) & (row < end))

    def read(self, x_RD):
        # What stands in other rows may be infinite: not even a zero times it may enter.
        return jnp.where(self.is_mine, self._rows(x_RD), 0)

    def write(self, x_RD, x):
        return lax.dynamic_update_slice_in_dim(
            x_RD, jnp.where(self.is_mine, x, self._rows(x_RD)), self.start, 0
        )

    def _rows(self, x_RD):
        return lax.dynamic_slice_in_dim(x_RD, self.start, self.is_mine.shape[0])


def _over_rest(group_sizes_E, rows, together, block, step, carry):
    """Folds `step(tile, carry)` over the blocks of rows beyond the first `together` of each group."""
    if together == rows:
        return carry
    ends_E = jnp.cumsum(group_sizes_E, dtype=jnp.int32)
    rest_E = jnp.maximum(group_sizes_E - together, 0)
    tiles_E = -(-rest_E // block)
    last_E = jnp.cumsum(tiles_E, dtype=jnp.int32)

    def one(t, carry):
        group = jnp.sum(t >= last_E, dtype=jnp.int32)
        first = ends_E[group] - rest_E[group] + (t - last_E[group] + tiles_E[group]) * block
        return step(Tile.at(group, first, ends_E[group], block, rows), carry)

    return lax.fori_loop(0, last_E[-1], one, carry)


@jax.custom_vjp
def take(x_RD: jax.Array, index_C: jax.Array, inverse_R: jax.Array | None) -> jax.Array:
    """`x_RD[index_C]`, zero for an index of -1, where no row is taken twice.

    `inverse_R` says into which row of the result each row goes, -1 for none: the gradient is a gather too,
    not a scatter.
    """
    return jnp.where((index_C >= 0)[:, None], x_RD[jnp.maximum(index_C, 0)], 0)


take.defvjp(
    lambda x_RD, index_C, inverse_R: (take(x_RD, index_C, inverse_R), (index_C, inverse_R)),
    lambda kept, g_CD: (take(g_CD, kept[1], kept[0]), None, None),
)


def add_group_bias(x_RF: jax.Array, bias_EF: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """Adds to each row its group's bias; rows of no group stay as they are."""
    groups_R, bias_EF = _group_of_row(group_sizes_E, x_RF.shape[0]), bias_EF.reshape(bias_EF.shape[0], -1)
    # Gathered in float32, because the gradient of the gather is a sum over rows: in bfloat16 it would lose
    # digits. Rows of no group read past the end; padding the biases with zeros would copy them, all layers'.
    wide_EF = bias_EF.astype(jnp.promote_types(bias_EF.dtype, jnp.float32))
    return x_RF + wide_EF.at[groups_R].get(mode="fill", fill_value=0).astype(x_RF.dtype)


def _group_of_row(group_sizes_E, rows):
    """The group of each row; E for rows of none."""
    ends_E, row_R = jnp.cumsum(group_sizes_E, dtype=jnp.int32), jnp.arange(rows, dtype=jnp.int32)
    return jnp.searchsorted(ends_E, row_R, side="right", method="compare_all")


def is_in_group(rows: int, group_sizes_E: jax.Array) -> jax.Array:
    """True for the rows that belong to a group, bool [R, 1]."""
    return jnp.arange(rows, dtype=jnp.int32)[:, None] < jnp.sum(group_sizes_E, dtype=jnp.int32)
