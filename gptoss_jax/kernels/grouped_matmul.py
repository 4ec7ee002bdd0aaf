"""Rows sorted by group times one matrix per group: the matrix product inside the experts.

Letters here: R rows, E groups (experts), D input width, F output width. Rows past the sum of the group sizes
belong to no group and come out as zeros.
"""

import jax
import jax.numpy as jnp
from jax import lax

from gptoss_jax.kernels import target

PRECISION = lax.Precision.HIGHEST  # float32 stays float32 on TPU and GPU; narrower types are not affected


def grouped_matmul(x_RD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """Multiplies each group of rows by its own matrix; differentiable in both.

    Args:
      x_RD: rows, those of group 0 first, then those of group 1, and so on.
      w_EDF: one matrix per group.
      group_sizes_E: int32, rows in each group; the sum may be below R.

    Returns:
      [R, F] in the type of `x_RD`.
    """
    if target.platform() == "cpu":
        return blocked_grouped_matmul(x_RD, w_EDF, group_sizes_E)
    return reference_grouped_matmul(x_RD, w_EDF, group_sizes_E)


def reference_grouped_matmul(x_RD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """The same through `jax.lax.ragged_dot`: a grouped kernel on TPU, every group times every row on CPU."""
    # What it makes of rows of no group is left open: the mask before keeps that out of the gradient, the one
    # after out of the result.
    in_group = jnp.arange(x_RD.shape[0])[:, None] < jnp.sum(group_sizes_E)
    # The TPU kernel refuses to be told of float32 where the operands are narrower.
    precision = PRECISION if x_RD.dtype == jnp.float32 else lax.Precision.DEFAULT
    y_RF = lax.ragged_dot(jnp.where(in_group, x_RD, 0), w_EDF, group_sizes_E, precision=precision)
    return jnp.where(in_group, y_RF, 0)


@jax.custom_vjp
def blocked_grouped_matmul(x_RD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """The same as a loop over blocks of rows whose trip count follows the group sizes: work grows with R, not
    E * R."""
    return _rows_times_matrices(x_RD, w_EDF, group_sizes_E, transpose=False)


def _blocked_fwd(x_RD, w_EDF, group_sizes_E):
    return blocked_grouped_matmul(x_RD, w_EDF, group_sizes_E), (x_RD, w_EDF, group_sizes_E)


def _blocked_bwd(residuals, g_RF):
    x_RD, w_EDF, group_sizes_E = residuals
    dx_RD = _rows_times_matrices(g_RF, w_EDF, group_sizes_E, transpose=True)
    return dx_RD, _rows_times_rows(x_RD, g_RF, group_sizes_E).astype(w_EDF.dtype), None


blocked_grouped_matmul.defvjp(_blocked_fwd, _blocked_bwd)


def _block_rows(rows: int, groups: int) -> int:
    """Rows in a block: 128 keep the product near its peak, smaller blocks waste less where groups are
    small."""
    per_group = max(1, rows // groups)
    return min(rows, next((block for block in (128, 64, 32) if per_group >= block), 16))


def _over_groups(group_sizes_E, rows, block, initial, start_group, step, end_group):
    """Runs `step(e, start, mask, inner)` over the blocks of each group, where start is the block's first row.

    The blocks lie side by side from the group's first row, with mask None. What is left is one more block
    that ends where the group does: it reaches back over rows that were done or are another group's, and its
    mask [block, 1] is True for the rows that count.
    """
    ends_E = jnp.cumsum(group_sizes_E)

    def group(e, carry):
        whole = group_sizes_E[e] // block
        left = ends_E[e] - group_sizes_E[e] + whole * block
        inner = lax.fori_loop(
            0, whole, lambda i, c: step(e, left - (whole - i) * block, None, c), start_group(carry)
        )

        def rest(_, c):
            start = jnp.clip(ends_E[e] - block, 0, rows - block)
            row = start + jnp.arange(block)[:, None]
            return step(e, start, (row >= left) & (row < ends_E[e]), c)

        inner = lax.fori_loop(0, (left < ends_E[e]).astype(jnp.int32), rest, inner)
        return end_group(e, carry, inner)

    return lax.fori_loop(0, group_sizes_E.shape[0], group, initial)


def _rows_times_matrices(x_RD, w_EDF, group_sizes_E, transpose):
    rows = x_RD.shape[0]
    block = _block_rows(rows, w_EDF.shape[0])
    contract = (((1,), (1 if transpose else 0,)), ((), ()))

    def step(e, start, mask, out):
        x = lax.dynamic_slice_in_dim(x_RD, start, block)
        w = lax.dynamic_index_in_dim(w_EDF, e, keepdims=False)
        y = lax.dot_general(x, w, contract, precision=PRECISION)
        if mask is not None:
            y = jnp.where(mask, y, lax.dynamic_slice_in_dim(out, start, block))
        return lax.dynamic_update_slice_in_dim(out, y, start, 0)

    empty = jnp.zeros((rows, w_EDF.shape[1 if transpose else 2]), x_RD.dtype)
    return _over_groups(group_sizes_E, rows, block, empty, lambda out: out, step, lambda e, carry, out: out)


def _rows_times_rows(x_RD, g_RF, group_sizes_E):
    """Sum over each group's rows of x^T g: [E, D, F] in float32 at least."""
    rows, groups = x_RD.shape[0], group_sizes_E.shape[0]
    block = _block_rows(rows, groups)
    sum_type = jnp.promote_types(x_RD.dtype, jnp.float32)
    contract = (((0,), (0,)), ((), ()))

    def step(e, start, mask, total):
        x = lax.dynamic_slice_in_dim(x_RD, start, block)
        g = lax.dynamic_slice_in_dim(g_RF, start, block)
        if mask is not None:
            # Both, because not even a zero times what stands outside of the group may enter: it may be
            # infinite.
            x, g = jnp.where(mask, x, 0), jnp.where(mask, g, 0)
        return total + lax.dot_general(x, g, contract, precision=PRECISION, preferred_element_type=sum_type)

    empty = jnp.zeros((groups, x_RD.shape[1], g_RF.shape[1]), sum_type)
    return _over_groups(
        group_sizes_E,
        rows,
        block,
        empty,
        lambda carry: jnp.zeros(carry.shape[1:], sum_type),
        step,
        lambda e, carry, total: lax.dynamic_update_index_in_dim(carry, total, e, 0),
    )


@jax.custom_vjp
def add_group_bias(x_RF: jax.Array, bias_EF: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """Adds to each row its group's bias; rows of no group stay as they are. Its gradient needs no scatter on
    CPU."""
    return x_RF + _bias_rows(bias_EF, group_sizes_E, x_RF.shape[0])


def _bias_rows(bias_EF, group_sizes_E, rows):
    ends_E = jnp.cumsum(group_sizes_E)
    rows_R = jnp.arange(rows, dtype=ends_E.dtype)
    groups_R = jnp.searchsorted(ends_E, rows_R, side="right", method="compare_all")
    return jnp.pad(bias_EF, ((0, 1), (0, 0)))[groups_R]


def _bias_bwd(residuals, g_RF):
    bias_EF, group_sizes_E = residuals
    if target.platform() == "cpu":
        ones_R1 = jnp.ones((g_RF.shape[0], 1), g_RF.dtype)
        d_bias_EF = _rows_times_rows(ones_R1, g_RF, group_sizes_E)[:, 0]
    else:
        summed = jax.vjp(lambda b: _bias_rows(b, group_sizes_E, g_RF.shape[0]), bias_EF)[1]
        (d_bias_EF,) = summed(g_RF)
    return g_RF, d_bias_EF.astype(bias_EF.dtype), None


add_group_bias.defvjp(
    lambda x_RF, bias_EF, sizes: (add_group_bias(x_RF, bias_EF, sizes), (bias_EF, sizes)), _bias_bwd
)
