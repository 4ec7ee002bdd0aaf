"""Tokens to their experts and back: on one device, or over the expert axis of a mesh, dropless.

Each (token, expert) pair is a row. A device sorts its rows by expert. Where the experts are spread over
devices, each row travels to its expert's device and the result travels back (`exchange`): experts never move.

Letters: M tokens and R = M * X rows of one device, E experts of all devices, n devices of the expert axis.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gptoss_jax.kernels import backend
from gptoss_jax.kernels.cpu import decode
from gptoss_jax.kernels.grouped_matmul.api import add_group_bias, grouped_matmul
from gptoss_jax.kernels.mxfp4.api import mxfp4_grouped_matmul
from gptoss_jax.kernels.stack import Layer
from gptoss_jax.parallel import all_to_all, mesh
from gptoss_jax.parallel.rules import gathered, gathers, parameter_spec, sum_over_tensor, used_spec

# Up to so many (token, expert) pairs, reading whole layers of experts costs more than all arithmetic.
FEW_PAIRS = 16
Activation = Callable[[jax.Array, jax.Array], jax.Array]
Parameters = dict[str, jax.Array]


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
    parameters: dict[str, jax.Array | Layer],
    activation: Activation,
    capacity: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The weighted sum of the outputs of each token's experts.

    Args:
      x_MD: tokens, of the whole mesh.
      experts_MX: int32, the experts of each token. A number outside 0 … E-1 stands for no expert and gives
        zero.
      weights_MX: float32, the share of each of them in the sum.
      parameters: `gate_up` [E, D, 2, F] and `down` [E, F, D], cast to the type of `x_MD`; or, packed in MXFP4
        and never unpacked as a whole, `gate_up_blocks` [E, 2 F, D / 32, 16], where the rows of gate and up
        take turns, `gate_up_scales` [E, 2 F, D / 32], `down_blocks` [E, D, F / 32, 16] and `down_scales` [E,
        D, F / 32]; with `gate_up_bias` [E, 2, F] and `down_bias` [E, D] where the model has them. On a mesh
        they lie where the path table stores them. They may be layers of stacks, of which only the experts
        that are needed are read, unless a mesh gathers them first.
      activation: (gate_RF, up_RF) -> [R, F]; where parameters are layers of stacks, a `SwiGLU`.
      capacity: None drops nothing. A number lets an expert take at most so many times its even share of the
        rows of those devices that exchange tokens (all rows, without an expert axis); rows beyond, the last
        tokens' first, count zero.

    Returns:
      [M, D] in the type of `x_MD`, and the number of rows that were dropped, float32.
    """
    axes = mesh.current_axes()
    one_part = functools.partial(
        _one_device, activation=activation, capacity=capacity, devices=axes.get("expert", 1)
    )
    if not axes:
        return one_part(x_MD, experts_MX, weights_MX, *_flattened(parameters, x_MD.dtype))
    stored = {name: parameter_spec(_path(name), value.shape, axes) for name, value in parameters.items()}
    used = {name: used_spec(_path(name), value.ndim) for name, value in parameters.items()}
    is_gathered = any(gathers(stored[name], used[name]) for name in parameters)
    if is_gathered:
        # Of the layer alone.
        parameters = {name: jnp.asarray(value) for name, value in parameters.items()}
    split = axes["tensor"] > 1
    # Of packed experts a device gives some of the outputs, whole: nothing is a part of a sum.
    summed = split and not _is_packed(parameters)

    def on_mesh(x_MD, experts_MX, weights_MX, parameters):
        parameters, stack = _flattened(parameters, x_MD.dtype)
        parameters = {name: gathered(value, stored[name], used[name]) for name, value in parameters.items()}
        if summed and "down_bias" in parameters:
            # It belongs to the whole sum over the tensor axis, so only one device of the axis may add it.
            first = jax.lax.axis_index("tensor") == 0
            parameters = parameters | {"down_bias": jnp.where(first, parameters["down_bias"], 0)}
        y_MD, dropped = one_part(x_MD, experts_MX, weights_MX, parameters, stack)
        return sum_over_tensor(y_MD) if summed else y_MD, dropped[None]

    if is_gathered:
        on_mesh = jax.checkpoint(on_mesh, policy=_is_kept, prevent_cse=False)

    places = {
        name: Layer(P(None, *stored[name]), P()) if isinstance(value, Layer) else stored[name]
        for name, value in parameters.items()
    }
    y_MD, dropped = jax.shard_map(
        on_mesh,
        in_specs=(P(mesh.BATCH), P(mesh.BATCH), P(mesh.BATCH), places),
        out_specs=(P(mesh.BATCH), P(mesh.BATCH)),
        check_vma=False,
    )(x_MD, experts_MX, weights_MX, parameters)
    return y_MD, jnp.sum(dropped)


def _is_packed(parameters: dict[str, jax.Array | Layer]) -> bool:
    return "down_blocks" in parameters


def _typed(value, dtype):
    """Numbers in a type; packed bytes as they are."""
    return value if value.dtype == jnp.uint8 else value.astype(dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Stack:
    """Where matrices are those of several layers' experts, one after another: which are the layer's own."""

    first: jax.Array | int
    count: int = dataclasses.field(metadata={"static": True})
    all: int = dataclasses.field(metadata={"static": True})

    def sizes(self, counts_E):
        """The rows of each matrix, from those of each expert."""
        return jax.lax.dynamic_update_slice(jnp.zeros(self.all, jnp.int32), counts_E, (self.first,))


def _flattened(parameters: dict[str, jax.Array | Layer], dtype) -> tuple[Parameters, _Stack | None]:
    """The matrices of all layers of their stacks, where they are in stacks and need not be cast, with the
    biases of the layer that is meant."""
    parameters = {name: _typed(value, dtype) for name, value in parameters.items()}
    matrices = {name: value for name, value in parameters.items() if not name.endswith("_bias")}
    biases = {name: jnp.asarray(value) for name, value in parameters.items() if name not in matrices}
    if not all(isinstance(value, Layer) for value in matrices.values()):
        return {name: jnp.asarray(value) for name, value in matrices.items()} | biases, None
    flat = {name: value.stack.reshape(-1, *value.shape[1:]) for name, value in matrices.items()}
    (name, layer), *_ = matrices.items()
    count = layer.shape[0]
    return flat | biases, _Stack(layer.index * count, count, flat[name].shape[0])


def _is_kept(primitive, *_, **__) -> bool:
    """What the gradient keeps: all but the gathered experts, in whatever form, which it gathers again. Kept,
    those of all layers would be whole on every device."""
    return primitive.name not in ("all_gather", "convert_element_type", "reshape")


def _path(name: str) -> tuple:
    return tuple(map(jax.tree_util.DictKey, ("moe", name)))


def _one_device(x_MD, experts_MX, weights_MX, parameters, stack=None, *, activation, capacity, devices):
    """One device's tokens: sorts their rows by expert, sends them through, puts the results back in order."""
    M, X = experts_MX.shape
    D = x_MD.shape[1]
    E = (stack.count if stack else next(iter(parameters.values())).shape[0]) * devices
    known_MX = (experts_MX >= 0) & (experts_MX < E)
    dropped = jnp.float32(0)
    if capacity is None and devices == 1:
        few_MX = jnp.where(known_MX, weights_MX, 0)
        kernel = "decode_mxfp4_experts" if _is_packed(parameters) else "decode_experts"
        if stack and decode.suits(kernel, M, x_MD.dtype):
            y_MD = decode.experts(x_MD, experts_MX, few_MX, parameters, stack.first, E, activation)
            return y_MD, dropped
        if backend.platform() == "cpu" and M * X <= FEW_PAIRS and not _is_packed(parameters):
            first = stack.first if stack else 0
            return _few_rows(x_MD, experts_MX, few_MX, parameters, activation, first), dropped
    # Rows of no expert go last, past every group, where the product is zero.
    experts_R = jnp.where(known_MX, experts_MX, E).reshape(-1)
    most = None
    if capacity is not None:
        most = math.ceil(capacity * devices * M * X / E)
        kept_R = _rank_in_expert(experts_R, E, devices) < most
        dropped = jnp.sum(~kept_R & (experts_R < E), dtype=jnp.float32)
        experts_R = jnp.where(kept_R, experts_R, E)
    row_R = jnp.arange(M * X, dtype=jnp.int32)
    _, order_R = jax.lax.sort_key_val(experts_R, row_R, is_stable=True)
    inverse_R = jnp.zeros_like(order_R).at[order_R].set(row_R)
    counts_E = jnp.zeros(E + 1, jnp.int32).at[experts_R].add(1)[:E]

    x_RD = permute(jnp.broadcast_to(x_MD[:, None], (M, X, D)).reshape(M * X, D), order_R, inverse_R)
    if devices == 1:
        y_RD = _through_experts(x_RD, parameters, counts_E, activation, stack)
    else:
        transport = all_to_all.transport(M * X, devices, E // devices, most)
        counts_nE = jax.lax.all_gather(counts_E, "expert")
        y_RD = _through_other_devices(x_RD, parameters, counts_nE, stack, activation, transport)
    y_MXD = permute(y_RD, inverse_R, order_R).reshape(M, X, D)
    return jnp.sum(y_MXD.astype(jnp.float32) * weights_MX[:, :, None], axis=1).astype(x_MD.dtype), dropped


def _rank_in_expert(experts_R, E, devices):
    """How many rows of the same expert come before each: earlier ones, and those of earlier devices."""
    chosen_RE = (experts_R[:, None] == jnp.arange(E, dtype=jnp.int32)).astype(jnp.int32)
    before_RE = jnp.cumsum(chosen_RE, axis=0, dtype=jnp.int32) - chosen_RE
    if devices > 1:
        counts_nE = jax.lax.all_gather(jnp.sum(chosen_RE, axis=0, dtype=jnp.int32), "expert")
        earlier = jnp.arange(devices, dtype=jnp.int32)[:, None] < jax.lax.axis_index("expert")
        before_RE += jnp.sum(jnp.where(earlier, counts_nE, 0), axis=0, dtype=jnp.int32)
    return jnp.sum(before_RE * chosen_RE, axis=1, dtype=jnp.int32)


def _through_experts(x_RD, parameters, counts_E, activation, stack=None):
    """Rows sorted by expert through the experts that are here; rows past the groups give zero."""
    if _is_packed(parameters):
        return _through_packed(x_RD, parameters, counts_E, activation, stack)
    bias, down_bias = parameters.get("gate_up_bias"), parameters.get("down_bias")
    bias = None if bias is None else bias.reshape(bias.shape[0], -1)
    gate_up, down = parameters["gate_up"], parameters["down"]
    gate_up = gate_up.reshape(*gate_up.shape[:2], -1)
    if stack is None:
        a_RF = _gated(activation, grouped_matmul(x_RD, gate_up, counts_E, bias))
        return grouped_matmul(a_RF, down, counts_E, down_bias)
    sizes = stack.sizes(counts_E)
    a_RF = _gated(activation, _with_bias(grouped_matmul(x_RD, gate_up, sizes), bias, counts_E))
    return _with_bias(grouped_matmul(a_RF, down, sizes), down_bias, counts_E)


def _through_packed(x_RD, parameters, counts_E, activation, stack):
    """The same with packed experts, of which a device of the tensor axis has some of the outputs."""
    sizes = stack.sizes(counts_E) if stack else counts_E
    blocks, scales, bias = (parameters.get(f"gate_up_{part}") for part in ("blocks", "scales", "bias"))
    # The gate and the linear half of a number of the activation stand beside each other.
    bias = None if bias is None else bias.swapaxes(1, 2).reshape(bias.shape[0], -1)
    h_RF = _with_bias(mxfp4_grouped_matmul(x_RD, blocks, scales, sizes), bias, counts_E)
    gate_RF, up_RF = jnp.moveaxis(h_RF.reshape(x_RD.shape[0], -1, 2), -1, 0)
    a_RF = _all_outputs(activation(gate_RF, up_RF))
    y_RD = mxfp4_grouped_matmul(a_RF, parameters["down_blocks"], parameters["down_scales"], sizes)
    return _with_bias(_all_outputs(y_RD), parameters.get("down_bias"), counts_E)


def _with_bias(y_RF, bias_EF, counts_E):
    return y_RF if bias_EF is None else add_group_bias(y_RF, bias_EF, counts_E)


def _all_outputs(y_RF):
    split = mesh.current_axes().get("tensor", 1) > 1
    return jax.lax.all_gather(y_RF, "tensor", axis=1, tiled=True) if split else y_RF


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


def _round(x_RD, parameters, counts_nE, stack, turn, activation, transport):
    there, back, group_sizes = transport.ways(counts_nE, x_RD.shape[0], turn)
    return back(_through_experts(there(x_RD), parameters, group_sizes, activation, stack))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _through_other_devices(x_RD, parameters, counts_nE, stack, activation, transport):
    """Rows sorted by expert through their experts, wherever those are, in as many rounds as it takes.

    The gradient keeps what the first round computed, and computes the further ones anew.
    """
    return _rounds_forward(x_RD, parameters, counts_nE, stack, activation, transport)[0]


def _rounds_forward(x_RD, parameters, counts_nE, stack, activation, transport):
    def one_round(x_RD, parameters, turn=0):
        return _round(x_RD, parameters, counts_nE, stack, turn, activation, transport)

    y_RD, pull = jax.vjp(one_round, x_RD, parameters)
    y_RD = _further_rounds(
        counts_nE, transport, lambda turn, y_RD: y_RD + one_round(x_RD, parameters, turn), y_RD
    )
    return y_RD, (x_RD, parameters, counts_nE, stack, pull)


def _rounds_backward(activation, transport, kept, g_RD):
    x_RD, parameters, counts_nE, stack, pull = kept

    def further(turn, gradients):
        def one_round(x_RD, parameters):
            return _round(x_RD, parameters, counts_nE, stack, turn, activation, transport)

        return jax.tree.map(jnp.add, gradients, jax.vjp(one_round, x_RD, parameters)[1](g_RD))

    return *_further_rounds(counts_nE, transport, further, pull(g_RD)), None, None


_through_other_devices.defvjp(_rounds_forward, _rounds_backward)


def _further_rounds(counts_nE, transport, body, carry):
    """Folds rounds 1, 2, … into what the first one gave."""
    if transport.most_rounds == 1:
        return carry
    return jax.lax.fori_loop(1, transport.rounds(counts_nE), body, carry)


def _few_rows(x_MD, experts_MX, weights_MX, parameters, activation, first):
    """The same where rows are few, as in decoding: each reads its own expert's matrices and no other's.
    `first`: which of the matrices is that of expert 0."""
    M, X = experts_MX.shape
    F, D = parameters["down"].shape[1:]

    def pick(name, expert):
        return jax.lax.dynamic_index_in_dim(parameters[name], expert, keepdims=False)

    def one_row(x_D, expert):
        h_F = jnp.dot(x_D, pick("gate_up", first + expert).reshape(D, 2 * F), precision="highest")
        if "gate_up_bias" in parameters:
            h_F = h_F + pick("gate_up_bias", expert).reshape(2 * F)
        y_D = jnp.dot(activation(h_F[:F], h_F[F:]), pick("down", first + expert), precision="highest")
        return y_D + pick("down_bias", expert) if "down_bias" in parameters else y_D

    # What is read in the place of no expert has weight zero.
    y_MXD = jnp.stack([jnp.stack([one_row(x_MD[m], experts_MX[m, x]) for x in range(X)]) for m in range(M)])
    return jnp.sum(y_MXD.astype(jnp.float32) * weights_MX[:, :, None], axis=1).astype(x_MD.dtype)
