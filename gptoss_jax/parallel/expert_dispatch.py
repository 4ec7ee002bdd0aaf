"""Tokens to their experts and back: dropless, on one device or over the axes of a mesh."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gptoss_jax.kernels import target
from gptoss_jax.kernels.grouped_matmul import add_group_bias, grouped_matmul
from gptoss_jax.parallel import mesh

# Up to so many (token, expert) rows, reading whole layers of experts costs more than all arithmetic.
FEW_ROWS = 16


@jax.custom_vjp
def permute(x_RD: jax.Array, order_R: jax.Array, inverse_R: jax.Array) -> jax.Array:
    """`x_RD[order_R]` for a permutation whose inverse is known: its gradient is a gather too, not a
    scatter."""
    return x_RD[order_R]


permute.defvjp(
    lambda x_RD, order_R, inverse_R: (x_RD[order_R], inverse_R),
    lambda inverse_R, g_RD: (g_RD[inverse_R], None, None),
)


def apply_experts(x_MD, experts_MX, weights_MX, parameters, activation):
    """The weighted sum of the outputs of each token's experts.

    Args:
      x_MD: tokens.
      experts_MX: int32, the experts of each token. A number outside 0 … E-1 stands for no expert and gives
      zero. weights_MX: float32, the share of each of them in the sum. parameters: `gate_up` [E, D, 2, F] and
      `down` [E, F, D], with `gate_up_bias` [E, 2, F] and `down_bias`
        [E, D] where the model has them; in the type of `x_MD`.
      activation: (gate_RF, up_RF) -> [R, F].

    Returns:
      [M, D] in the type of `x_MD`.
    """
    axes = mesh.current_axes()
    if not axes:
        return _local_experts(x_MD, experts_MX, weights_MX, parameters, activation)
    specs = {
        "gate_up": P("expert", None, None, "tensor"),
        "gate_up_bias": P("expert", None, "tensor"),
        "down": P("expert", "tensor", None),
        "down_bias": P("expert", None),
    }
    return jax.shard_map(
        functools.partial(_exchanged_experts, activation=activation),
        in_specs=(P(mesh.BATCH), P(mesh.BATCH), P(mesh.BATCH), {name: specs[name] for name in parameters}),
        out_specs=P(mesh.BATCH),
        check_vma=False,
    )(x_MD, experts_MX, weights_MX, parameters)


def _exchanged_experts(x_MD, experts_MX, weights_MX, parameters, activation):
    """One device's part: all tokens of its expert group come in, its own experts' share of the sums goes
    out."""
    x_MD, experts_MX, weights_MX = (
        jax.lax.all_gather(part, "expert", tiled=True) for part in (x_MD, experts_MX, weights_MX)
    )
    local = parameters["down"].shape[0]
    if "down_bias" in parameters:
        # It belongs to the whole sum over the tensor axis, so only one device of the axis may add it.
        first = jax.lax.axis_index("tensor") == 0
        parameters = parameters | {"down_bias": jnp.where(first, parameters["down_bias"], 0)}
    experts_MX = experts_MX - jax.lax.axis_index("expert") * local
    y_MD = _local_experts(x_MD, experts_MX, weights_MX, parameters, activation)
    return jax.lax.psum_scatter(jax.lax.psum(y_MD, "tensor"), "expert", tiled=True)


def _local_experts(x_MD, experts_MX, weights_MX, parameters, activation):
    """Sorts the (token, expert) rows by expert, multiplies, and puts the results back in the tokens'
    order."""
    M, X = experts_MX.shape
    D = x_MD.shape[1]
    E, F, _ = parameters["down"].shape
    if target.platform() == "cpu" and M * X <= FEW_ROWS:
        return _few_rows(x_MD, experts_MX, weights_MX, parameters, activation)
    # Rows of no expert here go last, past every group, where the grouped product is zero.
    experts_R = jnp.where((experts_MX >= 0) & (experts_MX < E), experts_MX, E).reshape(-1)
    order_R = jnp.argsort(experts_R, stable=True)
    inverse_R = jnp.zeros_like(order_R).at[order_R].set(jnp.arange(M * X, dtype=order_R.dtype))
    group_sizes_E = jnp.bincount(experts_R, length=E + 1)[:E].astype(jnp.int32)

    x_RD = permute(jnp.broadcast_to(x_MD[:, None], (M, X, D)).reshape(M * X, D), order_R, inverse_R)
    h_RF = grouped_matmul(x_RD, parameters["gate_up"].reshape(E, D, 2 * F), group_sizes_E)
    if "gate_up_bias" in parameters:
        h_RF = add_group_bias(h_RF, parameters["gate_up_bias"].reshape(E, 2 * F), group_sizes_E)
    y_RD = grouped_matmul(activation(h_RF[:, :F], h_RF[:, F:]), parameters["down"], group_sizes_E)
    if "down_bias" in parameters:
        y_RD = add_group_bias(y_RD, parameters["down_bias"], group_sizes_E)
    y_MXD = permute(y_RD, inverse_R, order_R).reshape(M, X, D)
    return jnp.sum(y_MXD.astype(jnp.float32) * weights_MX[:, :, None], axis=1).astype(x_MD.dtype)


def _few_rows(x_MD, experts_MX, weights_MX, parameters, activation):
    """The same where rows are few, as in decoding: each reads its own expert's matrices and no other's."""
    M, X = experts_MX.shape
    E, F, D = parameters["down"].shape

    def pick(name, expert):
        return jax.lax.dynamic_index_in_dim(parameters[name], expert, keepdims=False)

    def one_row(x_D, expert):
        h_F = jnp.dot(x_D, pick("gate_up", expert).reshape(D, 2 * F), precision="highest")
        if "gate_up_bias" in parameters:
            h_F = h_F + pick("gate_up_bias", expert).reshape(2 * F)
        y_D = jnp.dot(activation(h_F[:F], h_F[F:]), pick("down", expert), precision="highest")
        return y_D + pick("down_bias", expert) if "down_bias" in parameters else y_D

    # A number outside of 0 … E-1 stands for no expert: what is read in its place counts nothing.
    weights_MX = jnp.where((experts_MX >= 0) & (experts_MX < E), weights_MX, 0)
    y_MXD = jnp.stack([jnp.stack([one_row(x_MD[m], experts_MX[m, x]) for x in range(X)]) for m in range(M)])
    return jnp.sum(y_MXD.astype(jnp.float32) * weights_MX[:, :, None], axis=1).astype(x_MD.dtype)
