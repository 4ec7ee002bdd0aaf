"""Tokens to their experts and back: on one device, or over the expert axis of a mesh, dropless.

Each (token, expert) pair is a row. A device sorts its rows by expert. Where the experts are spread over
devices, each row travels to its expert's device and the result travels back (`exchange`): experts never move.

Letters: M tokens and R = M * X rows of one device, E experts of all devices, n devices of the expert axis.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gptoss_jax.kernels import target
from gptoss_jax.kernels.grouped_matmul import grouped_matmul
from gptoss_jax.parallel import exchange, mesh
from gptoss_jax.parallel.sharding import gathered, gathers, parameter_spec, sum_over_tensor, used_spec

# Up to so many rows, reading whole layers of experts costs more than all arithmetic.
FEW_ROWS = 16
Activation = Callable[[jax.Array, jax.Array], jax.Array]


@jax.custom_vjp
def permute(x_RD: jax.Array, order_R: jax.Array, inverse_R: jax.Array) -> jax.Array:
    """`x_RD[order_R]` for a permutation whose inverse is known: its gradient is a gather too, not a
    scatter."""
    return x_RD[order_R]


permute.defvjp(
    lambda x_RD, order_R, inverse_R: (x_RD[order_R], inverse_R),
    lambda inverse_R, g_RD: (g_RD[inverse_R], None, None),
)


def apply_experts(
    x_MD: jax.Array,
    experts_MX: jax.Array,
    weights_MX: jax.Array,
    parameters: dict[str, jax.Array],
    activation: Activation,
    capacity: float | None = None,
    in_shards: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """The weighted sum of the outputs of each token's experts.

    Args:
      x_MD: tokens, of the whole mesh.
      experts_MX: int32, the experts of each token. A number outside 0 … E-1 stands for no expert and gives
        zero.
      weights_MX: float32, the share of each of them in the sum.
      parameters: `gate_up` [E, D, 2, F] and `down` [E, F, D], with `gate_up_bias` [E, 2, F] and `down_bias`
        [E, D] where the model has them; cast to the type of `x_MD`.
      activation: (gate_RF, up_RF) -> [R, F].
      capacity: None drops nothing. A number lets an expert take at most so many times its even share of the
        rows of those devices that exchange tokens (all rows, without an expert axis); rows beyond, the last
        tokens' first, count zero.
      in_shards: whether the parameters lie where the path table stores them, or are gathered already.

    Returns:
      [M, D] in the type of `x_MD`, and the number of rows that were dropped, float32.
    """
    axes = mesh.current_axes()
    one_part = functools.partial(
        _one_device, activation=activation, capacity=capacity, devices=axes.get("expert", 1)
    )
    if not axes:
        parameters = {name: value.astype(x_MD.dtype) for name, value in parameters.items()}
        return one_part(x_MD, experts_MX, weights_MX, parameters)
    used = {name: used_spec(_path(name), value.ndim) for name, value in parameters.items()}
    stored = used
    if in_shards:
        stored = {name: parameter_spec(_path(name), value.shape, axes) for name, value in parameters.items()}

    def on_mesh(x_MD, experts_MX, weights_MX, parameters):
        parameters = {
            name: gathered(value.astype(x_MD.dtype), stored[name], used[name])
            for name, value in parameters.items()
        }
        if axes["tensor"] > 1 and "down_bias" in parameters:
            # It belongs to the whole sum over the tensor axis, so only one device of the axis may add it.
            first = jax.lax.axis_index("tensor") == 0
            parameters = parameters | {"down_bias": jnp.where(first, parameters["down_bias"], 0)}
        y_MD, dropped = one_part(x_MD, experts_MX, weights_MX, parameters)
        return sum_over_tensor(y_MD) if axes["tensor"] > 1 else y_MD, dropped[None]

    if any(gathers(stored[name], used[name]) for name in parameters):
        on_mesh = jax.checkpoint(on_mesh, policy=_is_kept, prevent_cse=False)

    y_MD, dropped = jax.shard_map(
        on_mesh,
        in_specs=(P(mesh.BATCH), P(mesh.BATCH), P(mesh.BATCH), stored),
        out_specs=(P(mesh.BATCH), P(mesh.BATCH)),
        check_vma=False,
    )(x_MD, experts_MX, weights_MX, parameters)
    return y_MD, jnp.sum(dropped)


def _is_kept(primitive, *_, **__) -> bool:
    """What the gradient keeps: all but the gathered experts, in whatever form, which it gathers again. Kept,
    those of all layers would be whole on every device."""
    return primitive.name not in ("all_gather", "convert_element_type", "reshape")


def _path(name: str) -> tuple:
    return tuple(map(jax.tree_util.DictKey, ("moe", name)))


def _one_device(x_MD, experts_MX, weights_MX, parameters, activation, capacity, devices):
    """One device's tokens: sorts their rows by expert, sends them through, puts the results back in order."""
    M, X = experts_MX.shape
    D = x_MD.shape[1]
    E = parameters["down"].shape[0] * devices
    known_MX = (experts_MX >= 0) & (experts_MX < E)
    dropped = jnp.float32(0)
    if capacity is None and devices == 1 and target.platform() == "cpu" and M * X <= FEW_ROWS:
        return _few_rows(
            x_MD, experts_MX, jnp.where(known_MX, weights_MX, 0), parameters, activation
        ), dropped
    # Rows of no expert go last, past every group, where the product is zero.
    experts_R = jnp.where(known_MX, experts_MX, E).reshape(-1)
    most = None
    if capacity is not None:
        most = math.ceil(capacity * devices * M * X / E)
        kept_R = _rank_in_expert(experts_R, E, devices) < most
        dropped = jnp.sum(~kept_R & (experts_R < E)).astype(jnp.float32)
        experts_R = jnp.where(kept_R, experts_R, E)
    order_R = jnp.argsort(experts_R, stable=True)
    inverse_R = jnp.zeros_like(order_R).at[order_R].set(jnp.arange(M * X, dtype=order_R.dtype))
    counts_E = jnp.bincount(experts_R, length=E + 1)[:E].astype(jnp.int32)

    x_RD = permute(jnp.broadcast_to(x_MD[:, None], (M, X, D)).reshape(M * X, D), order_R, inverse_R)
    if devices == 1:
        y_RD = _through_experts(x_RD, parameters, counts_E, activation)
    else:
        transport = exchange.transport(M * X, devices, E // devices, most)
        counts_nE = jax.lax.all_gather(counts_E, "expert")
        y_RD = _through_other_devices(x_RD, parameters, counts_nE, activation, transport)
    y_MXD = permute(y_RD, inverse_R, order_R).reshape(M, X, D)
    return jnp.sum(y_MXD.astype(jnp.float32) * weights_MX[:, :, None], axis=1).astype(x_MD.dtype), dropped


def _rank_in_expert(experts_R, E, devices):
    """How many rows of the same expert come before each: earlier ones, and those of earlier devices."""
    chosen_RE = (experts_R[:, None] == jnp.arange(E)).astype(jnp.int32)
    before_RE = jnp.cumsum(chosen_RE, axis=0) - chosen_RE
    if devices > 1:
        counts_nE = jax.lax.all_gather(jnp.sum(chosen_RE, axis=0), "expert")
        earlier = jnp.arange(devices)[:, None] < jax.lax.axis_index("expert")
        before_RE += jnp.sum(jnp.where(earlier, counts_nE, 0), axis=0)
    return jnp.sum(before_RE * chosen_RE, axis=1)


def _through_experts(x_RD, parameters, group_sizes_E, activation):
    """Rows sorted by expert through the experts that are here; rows past the groups give zero."""
    E, F, D = parameters["down"].shape
    bias = parameters.get("gate_up_bias")
    bias = None if bias is None else bias.reshape(E, 2 * F)
    h_RF = grouped_matmul(x_RD, parameters["gate_up"].reshape(E, D, 2 * F), group_sizes_E, bias)
    a_RF = _gated(activation, h_RF)
    return grouped_matmul(a_RF, parameters["down"], group_sizes_E, parameters.get("down_bias"))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gated(activation, h_RF):
    """The activation of the two halves of each row. The gradient keeps its input alone."""
    return activation(*jnp.split(h_RF, 2, axis=-1))


def _gated_bwd(activation, h_RF, g_RF):
    # Without the barrier a compiler finds the same terms in the forward pass, and keeps them all from there.
    h_RF, g_RF = jax.lax.optimization_barrier((h_RF, g_RF))
    halves = jnp.split(h_RF, 2, axis=-1)
    d_gate, d_up = jax.vjp(activation, *halves)[1](g_RF)
    # Written in place, each half in one pass: XLA for CPU joins two arrays number by number.
    start = (0,) * h_RF.ndim
    d_h_RF = jax.lax.dynamic_update_slice(jnp.zeros_like(h_RF), d_gate, start)
    return (jax.lax.dynamic_update_slice(d_h_RF, d_up, (*start[:-1], d_gate.shape[-1])),)


_gated.defvjp(lambda activation, h_RF: (_gated(activation, h_RF), h_RF), _gated_bwd)


def _round(x_RD, parameters, counts_nE, turn, activation, transport):
    there, back, group_sizes = transport.ways(counts_nE, x_RD.shape[0], turn)
    return back(_through_experts(there(x_RD), parameters, group_sizes, activation))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _through_other_devices(x_RD, parameters, counts_nE, activation, transport):
    """Rows sorted by expert through their experts, wherever those are, in as many rounds as it takes.

    The gradient keeps what the first round computed, and computes the further ones anew.
    """
    return _rounds_forward(x_RD, parameters, counts_nE, activation, transport)[0]


def _rounds_forward(x_RD, parameters, counts_nE, activation, transport):
    def one_round(x_RD, parameters, turn=0):
        return _round(x_RD, parameters, counts_nE, turn, activation, transport)

    y_RD, pull = jax.vjp(one_round, x_RD, parameters)
    y_RD = _further_rounds(
        counts_nE, transport, lambda turn, y_RD: y_RD + one_round(x_RD, parameters, turn), y_RD
    )
    return y_RD, (x_RD, parameters, counts_nE, pull)


def _rounds_backward(activation, transport, kept, g_RD):
    x_RD, parameters, counts_nE, pull = kept

    def further(turn, gradients):
        one_round = functools.partial(
            _round, counts_nE=counts_nE, turn=turn, activation=activation, transport=transport
        )
        return jax.tree.map(jnp.add, gradients, jax.vjp(one_round, x_RD, parameters)[1](g_RD))

    return *_further_rounds(counts_nE, transport, further, pull(g_RD)), None


_through_other_devices.defvjp(_rounds_forward, _rounds_backward)


def _further_rounds(counts_nE, transport, body, carry):
    """Folds rounds 1, 2, … into what the first one gave."""
    if transport.most_rounds == 1:
        return carry
    return jax.lax.fori_loop(1, transport.rounds(counts_nE), body, carry)


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

    # What is read in the place of no expert has weight zero.
    y_MXD = jnp.stack([jnp.stack([one_row(x_MD[m], experts_MX[m, x]) for x in range(X)]) for m in range(M)])
    return jnp.sum(y_MXD.astype(jnp.float32) * weights_MX[:, :, None], axis=1).astype(x_MD.dtype)
