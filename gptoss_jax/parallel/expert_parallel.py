"""Expert parallelism: dispatches tokens to their experts and combines the results. Drops no tokens unless a
capacity is set.

Each (token, expert) pair is a row. A device sorts its rows by expert, so that the rows of an expert are
contiguous. If the mesh shards experts over the expert axis, each row is dispatched to the device of its
expert, and its result is combined on the device of its token (`all_to_all.py`); experts never move. The
expert axis also splits the batch, so its devices have different tokens.

Letters: M tokens, of the whole mesh in `apply_experts` and of one device in `_one_device`; X experts per
token; R = M X rows per device; E experts; n devices along the expert axis.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gptoss_jax.kernels.layer_view import LayerView, cast, read
from gptoss_jax.kernels.shapes import assert_shapes
from gptoss_jax.parallel import all_to_all
from gptoss_jax.parallel.all_to_all import Transport
from gptoss_jax.parallel.linear import Weight, gather_parameter, gathered_dimensions, tensor_psum
from gptoss_jax.parallel.mesh import current_axes
from gptoss_jax.parallel.rules import ROWS, compute_spec, storage_spec

Carry = TypeVar("Carry")
Parameters = Mapping[str, Weight]
# (rows sorted by expert [R, D], parameters, rows per expert [E]) -> [R, D], zero in rows past the groups.
ExpertFunction = Callable[[jax.Array, Parameters, jax.Array], jax.Array]
# Of the backward pass: x_RD, trained and frozen parameters, counts_nE, and the gradient of the first round.
Residuals = tuple[jax.Array, dict[str, Weight], dict[str, Weight], jax.Array, Callable]


class Routing(NamedTuple):
    """The experts of each token, and the weights of their outputs."""

    experts_MX: jax.Array  # int32; values outside [0, E) mean no expert and contribute zero
    weights_MX: jax.Array  # float32


def apply_experts(
    expert_function: ExpertFunction,
    x_MD: jax.Array,
    routing: Routing,
    parameters: Parameters,
    letters: Mapping[str, str],
    capacity_factor: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns the weighted sum of the outputs of each token's experts.

    Args:
      expert_function: computes the outputs of the experts on one device.
      x_MD: tokens of the whole mesh.
      parameters: expert parameters by name, sharded according to `letters`. On a mesh, they are cast to the
        dtype of `x_MD`, except packed ones; without, the function does so if needed. A LayerView is read only
        if a kernel requires an array, or if the mesh gathers it.
      letters: the letters of each parameter. If `down` is split along F, outputs are summed over the tensor
        axis; packed `down` is split along its outputs, which `model.moe.expert_outputs` gathers.
      capacity_factor: limits each expert to this multiple of its even share of the rows of the devices that
        exchange tokens (all rows, without an expert axis); excess rows (latest tokens first) are dropped and
        contribute zero. None drops nothing.

    Returns:
      [M, D] in the dtype of `x_MD`, and the number of dropped rows, float32.
    """
    assert_shapes("MD MX MX", x_MD, *routing)
    axes = current_axes()
    one_device = functools.partial(
        _one_device, expert_function, expert_devices=axes.get("expert", 1), capacity_factor=capacity_factor
    )
    if not axes:
        return one_device(x_MD, routing, parameters)
    stored = {
        name: storage_spec(letters[name], value.shape, axes, f"moe.{name}")
        for name, value in parameters.items()
    }
    used = {name: compute_spec(letters[name]) for name in parameters}
    is_gathered = any(gathered_dimensions(stored[name], used[name]) for name in parameters)
    is_partial_sum = axes["tensor"] > 1 and "down" in parameters

    def on_mesh(x_MD, routing, parameters):
        parameters = _cast(parameters, x_MD.dtype)
        if is_gathered:
            parameters = {
                name: gather_parameter(read(value), stored[name], used[name])
                for name, value in parameters.items()
            }
        if is_partial_sum and "down_bias" in parameters:
            # Add the bias only on the first tensor device, so that the psum counts it once.
            is_first = jax.lax.axis_index("tensor") == 0
            bias = read(parameters["down_bias"])
            parameters = parameters | {"down_bias": jnp.where(is_first, bias, 0)}
        y_MD, num_dropped = one_device(x_MD, routing, parameters)
        return tensor_psum(y_MD) if is_partial_sum else y_MD, num_dropped[None]

    if is_gathered:
        on_mesh = jax.checkpoint(on_mesh, policy=_saves_residual, prevent_cse=False)
    specs = {
        name: _view_spec(stored[name]) if isinstance(value, LayerView) else stored[name]
        for name, value in parameters.items()
    }
    y_MD, num_dropped = jax.shard_map(
        on_mesh, in_specs=(ROWS, ROWS, specs), out_specs=(ROWS, ROWS), check_vma=False
    )(x_MD, routing, dict(parameters))
    return y_MD, jnp.sum(num_dropped)


def _view_spec(stored: P) -> LayerView:
    """Returns how a LayerView is sharded: a view with specs instead of arrays."""
    return LayerView(P(None, *stored), P())  # type: ignore[arg-type]


def _cast(parameters: Parameters, dtype: jnp.dtype) -> Parameters:
    """Casts parameters to `dtype`, except packed bytes."""
    return {name: value if _is_packed(value) else cast(value, dtype) for name, value in parameters.items()}


def _is_packed(value: jax.Array | LayerView) -> bool:
    """Returns True for MXFP4 bytes."""
    return value.dtype == jnp.uint8


def _saves_residual(primitive: Any, *inputs: Any, **parameters: Any) -> bool:
    """Rematerialization policy: saves all residuals except gathered experts, also cast or reshaped, which
    would be the full experts of all layers on every device. The backward pass reads them from their stack and
    gathers them again."""
    if primitive.name == "reduce_precision":
        # JAX marks residuals by one to their own precision; that of `cast_layer` rounds float32.
        return parameters["mantissa_bits"] == jnp.finfo(inputs[0].dtype).nmant
    names = ("all_gather", "convert_element_type", "reshape", "dynamic_slice", "squeeze")
    # The gather of experts that are not trained keeps its custom gradient as a call.
    return primitive.name not in names and not primitive.name.startswith("custom_vjp_call")


def _one_device(
    expert_function: ExpertFunction,
    x_MD: jax.Array,
    routing: Routing,
    parameters: Parameters,
    *,
    expert_devices: int,
    capacity_factor: float | None,
) -> tuple[jax.Array, jax.Array]:
    """Runs on each device (on a mesh, inside `shard_map`): sorts its rows by expert, applies the experts, and
    sums the results per token."""
    experts_MX, weights_MX = routing
    M, X = experts_MX.shape
    D = x_MD.shape[1]
    E = next(iter(parameters.values())).shape[0] * expert_devices
    # Rows without an expert are sorted to the end, past all groups, where the result is zero.
    experts_R = jnp.where((experts_MX >= 0) & (experts_MX < E), experts_MX, E).reshape(-1)
    num_dropped, max_rows = jnp.float32(0), None
    if capacity_factor is not None:
        max_rows = math.ceil(capacity_factor * expert_devices * M * X / E)
        is_kept_R = _rank_in_expert(experts_R, E, expert_devices) < max_rows
        num_dropped = jnp.sum(~is_kept_R & (experts_R < E), dtype=jnp.float32)
        experts_R = jnp.where(is_kept_R, experts_R, E)
    row_R = jnp.arange(M * X, dtype=jnp.int32)
    _, order_R = jax.lax.sort_key_val(experts_R, row_R, is_stable=True)
    inverse_R = jnp.zeros_like(order_R).at[order_R].set(row_R)
    counts_E = jnp.zeros(E + 1, jnp.int32).at[experts_R].add(1)[:E]

    x_RD = all_to_all.gather_rows(
        jnp.broadcast_to(x_MD[:, None], (M, X, D)).reshape(M * X, D), order_R, inverse_R
    )
    if expert_devices == 1:
        y_RD = expert_function(x_RD, parameters, counts_E)
    else:
        transport = all_to_all.transport(M * X, expert_devices, E // expert_devices, max_rows)
        counts_nE = jax.lax.all_gather(counts_E, "expert")
        y_RD = _on_expert_devices(x_RD, parameters, counts_nE, expert_function, transport)
    y_MXD = all_to_all.gather_rows(y_RD, inverse_R, order_R).reshape(M, X, D)
    y_MD = jnp.sum(y_MXD.astype(jnp.float32) * weights_MX[:, :, None], axis=1)
    return y_MD.astype(x_MD.dtype), num_dropped


def _rank_in_expert(experts_R: jax.Array, E: int, expert_devices: int) -> jax.Array:
    """Returns the number of rows of the same expert before each row, on this device and on earlier ones."""
    one_hot_RE = (experts_R[:, None] == jnp.arange(E, dtype=jnp.int32)).astype(jnp.int32)
    before_RE = jnp.cumsum(one_hot_RE, axis=0, dtype=jnp.int32) - one_hot_RE
    if expert_devices > 1:
        counts_nE = jax.lax.all_gather(jnp.sum(one_hot_RE, axis=0, dtype=jnp.int32), "expert")
        is_earlier_n1 = jnp.arange(expert_devices, dtype=jnp.int32)[:, None] < jax.lax.axis_index("expert")
        before_RE += jnp.sum(jnp.where(is_earlier_n1, counts_nE, 0), axis=0, dtype=jnp.int32)
    return jnp.sum(before_RE * one_hot_RE, axis=1, dtype=jnp.int32)


def _round(
    x_RD: jax.Array,
    parameters: Parameters,
    counts_nE: jax.Array,
    index: jax.Array | int,
    expert_function: ExpertFunction,
    transport: Transport,
) -> jax.Array:
    """Runs round `index`: dispatches the rows of this round to their experts and combines the results."""
    plan = transport.plan_round(counts_nE, x_RD.shape[0], index)
    return plan.combine(expert_function(plan.dispatch(x_RD), parameters, plan.group_sizes_L))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _on_expert_devices(
    x_RD: jax.Array,
    parameters: Parameters,
    counts_nE: jax.Array,
    expert_function: ExpertFunction,
    transport: Transport,
) -> jax.Array:
    """Applies the experts of all devices to rows sorted by expert, in one or more rounds of `transport`.

    The backward pass reuses the residuals of the first round, and recomputes any other rounds, which are
    rare.
    """
    return _rounds(x_RD, dict(parameters), {}, counts_nE, expert_function, transport)[0]


def _rounds_forward(
    x_RD: Any,
    parameters: Mapping[str, Any],
    counts_nE: Any,
    expert_function: ExpertFunction,
    transport: Transport,
) -> tuple[jax.Array, Residuals]:
    """The arguments are `jax.custom_derivatives.CustomVJPPrimal`s."""
    trained: dict[str, Weight] = {}
    frozen: dict[str, Weight] = {}
    for name, primals in parameters.items():
        # A LayerView has two leaves.
        is_trained = any(primal.perturbed for primal in jax.tree.leaves(primals))
        (trained if is_trained else frozen)[name] = jax.tree.map(lambda primal: primal.value, primals)
    arguments = x_RD.value, trained, frozen, counts_nE.value
    y_RD, pullback = _rounds(*arguments, expert_function=expert_function, transport=transport)
    return y_RD, (*arguments, pullback)


def _rounds(
    x_RD: jax.Array,
    trained: dict[str, Weight],
    frozen: dict[str, Weight],
    counts_nE: jax.Array,
    expert_function: ExpertFunction,
    transport: Transport,
) -> tuple[jax.Array, Callable]:
    """Returns the result, and the VJP function of the first round."""

    def one_round(x_RD, trained, index=0):
        return _round(x_RD, trained | frozen, counts_nE, index, expert_function, transport)

    y_RD, pullback = jax.vjp(one_round, x_RD, trained)
    y_RD = _further_rounds(
        counts_nE, transport, lambda index, y_RD: y_RD + one_round(x_RD, trained, index), y_RD
    )
    return y_RD, pullback


def _rounds_backward(
    expert_function: ExpertFunction, transport: Transport, residuals: Residuals, g_RD: jax.Array
) -> tuple[jax.Array, dict[str, Any], None]:
    x_RD, trained, frozen, counts_nE, pullback = residuals

    def add_round(index, gradients):
        def one_round(x_RD, trained):
            return _round(x_RD, trained | frozen, counts_nE, index, expert_function, transport)

        return jax.tree.map(jnp.add, gradients, jax.vjp(one_round, x_RD, trained)[1](g_RD))

    dx_RD, gradients = _further_rounds(counts_nE, transport, add_round, pullback(g_RD))
    return dx_RD, gradients | dict.fromkeys(frozen), None


# Symbolic zeros show which parameters are differentiated: neither frozen ones nor packed bytes.
_on_expert_devices.defvjp(_rounds_forward, _rounds_backward, symbolic_zeros=True)


def _further_rounds(
    counts_nE: jax.Array, transport: Transport, body: Callable[[jax.Array, Carry], Carry], carry: Carry
) -> Carry:
    """Folds rounds 1, 2, … into the result of round 0, `carry`."""
    if transport.max_rounds == 1:
        return carry
    return jax.lax.fori_loop(1, transport.num_rounds(counts_nE), body, carry)
