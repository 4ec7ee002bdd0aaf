"""Rows sorted by group times one matrix per group: the matrix product inside the experts.

Letters here: R rows, E groups (experts), D input width, F output width. Rows past the sum of the group sizes
belong to no group and come out as zeros.
"""

import jax
import jax.numpy as jnp
from jax import lax

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
    if jax.default_backend() == "cpu":
        return blocked_grouped_matmul(x_RD, w_EDF, group_sizes_E)
    return reference_grouped_matmul(x_RD, w_EDF, group_sizes_E)


def reference_grouped_matmul(x_RD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """The same through `jax.lax.ragged_dot`: a grouped kernel on TPU, every group times every row on CPU."""
    return lax.ragged_dot(x_RD, w_EDF, group_sizes_E, precision=PRECISION)


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
    """Rows in a block: 128 keeps the product near its peak; few rows per group waste less with smaller
    blocks."""
    per_group = max(1, rows // groups)
    return next((block for block in (128, 64, 32) if per_group >= block), 16)


def _for_each_block(group_sizes_E, block, initial, start_group, step, end_group):
    """Runs `step` over the blocks of each group; a group's last block may reach into the rows after it."""
    starts_E = jnp.cumsum(group_sizes_E) - group_sizes_E

    def group(e, carry):
        def one_block(i, inner):
            return step(e, starts_E[e] + i * block, group_sizes_E[e] - i * block, inner)

        blocks = (group_sizes_E[e] + block - 1) // block
        return end_group(e, carry, lax.fori_loop(0, blocks, one_block, start_group(e, carry)))

    return lax.fori_loop(0, group_sizes_E.shape[0], group, initial)


def _rows_times_matrices(x_RD, w_EDF, group_sizes_E, transpose):
    rows, groups = x_RD.shape[0], w_EDF.shape[0]
    block = _block_rows(rows, groups)
    width = w_EDF.shape[1 if transpose else 2]
    padded = jnp.pad(x_RD, ((0, block), (0, 0)))
    contract = (((1,), (1 if transpose else 0,)), ((), ()))

    def step(e, start, left, out):
        x = lax.dynamic_slice_in_dim(padded, start, block)
        y = lax.dot_general(
            x, lax.dynamic_index_in_dim(w_EDF, e, keepdims=False), contract, precision=PRECISION
        )
        # Rows past the group are overwritten by the next group's blocks, which come later.
        return lax.dynamic_update_slice_in_dim(out, y, start, 0)

    empty = jnp.zeros((rows + block, width), x_RD.dtype)
    out = _for_each_block(group_sizes_E, block, empty, lambda e, o: o, step, lambda e, carry, o: o)[:rows]
    # After the last group no later block overwrites the tail.
    return jnp.where(jnp.arange(rows)[:, None] < jnp.sum(group_sizes_E), out, 0)


def _rows_times_rows(x_RD, g_RF, group_sizes_E):
    """Sum over each group's rows of x^T g: [E, D, F] in float32 at least."""
    rows, groups = x_RD.shape[0], group_sizes_E.shape[0]
    block = _block_rows(rows, groups)
    x_padded = jnp.pad(x_RD, ((0, block), (0, 0)))
    g_padded = jnp.pad(g_RF, ((0, block), (0, 0)))
    sum_type = jnp.promote_types(x_RD.dtype, jnp.float32)
    empty = jnp.zeros((groups, x_RD.shape[1], g_RF.shape[1]), sum_type)

    def step(e, start, left, total):
        x = lax.dynamic_slice_in_dim(x_padded, start, block)
        x = jnp.where(jnp.arange(block)[:, None] < left, x, 0)
        g = lax.dynamic_slice_in_dim(g_padded, start, block)
        # Not even a zero times what stands past the group may enter, should that be infinite.
        g = jnp.where(jnp.arange(block)[:, None] < left, g, 0)
        contract = (((0,), (0,)), ((), ()))
        return total + lax.dot_general(x, g, contract, precision=PRECISION, preferred_element_type=sum_type)

    def end_group(e, carry, total):
        return lax.dynamic_update_index_in_dim(carry, total, e, 0)

    return _for_each_block(
        group_sizes_E, block, empty, lambda e, carry: jnp.zeros_like(carry[0]), step, end_group
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
    if jax.default_backend() == "cpu":
        ones_R1 = jnp.ones((g_RF.shape[0], 1), g_RF.dtype)
        d_bias_EF = _rows_times_rows(ones_R1, g_RF, group_sizes_E)[:, 0]
    else:
        summed = jax.vjp(lambda b: _bias_rows(b, group_sizes_E, g_RF.shape[0]), bias_EF)[1]
        (d_bias_EF,) = summed(g_RF)
    return g_RF, d_bias_EF.astype(bias_EF.dtype), None


add_group_bias.defvjp(
    lambda x_RF, bias_EF, sizes: (add_group_bias(x_RF, bias_EF, sizes), (bias_EF, sizes)), _bias_bwd
)
