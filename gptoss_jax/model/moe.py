"""Mixture of experts: the router and the SwiGLU experts."""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from gptoss_jax.config import ModelConfig
from gptoss_jax.config.model import EXPERT_TARGETS
from gptoss_jax.kernels.cpu import build, decode
from gptoss_jax.kernels.cpu import swiglu as cpu_swiglu
from gptoss_jax.kernels.grouped_matmul.api import add_group_bias, grouped_matmul
from gptoss_jax.kernels.layer_view import LayerView
from gptoss_jax.kernels.mxfp4 import codec
from gptoss_jax.kernels.mxfp4.api import mxfp4_grouped_matmul
from gptoss_jax.kernels.shapes import assert_shapes
from gptoss_jax.model import lora
from gptoss_jax.model.parameters import LETTERS, normal, zeros
from gptoss_jax.parallel.expert_parallel import Routing, apply_experts
from gptoss_jax.parallel.linear import shard_map_batch, tensor_all_gather, tensor_psum
from gptoss_jax.parallel.mesh import current_axes

RouterStats = dict[str, jax.Array]


class MoE(nnx.Module):
    """Routes each token to its top-k experts and returns the weighted sum of their outputs."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.router = nnx.Param(normal(config, "moe.router", rngs))
        # Gate and up are separate along P; in packed weights, their rows alternate as in the published
        # checkpoints.
        gate_up_EDPF, down_EFD = normal(config, "moe.gate_up", rngs), normal(config, "moe.down", rngs)
        if config.expert_format == "mxfp4":
            E, D, P, F = gate_up_EDPF.shape
            gate_up_EUD = gate_up_EDPF.swapaxes(1, -1).reshape(E, F * P, D)
            gate_up, down = codec.quantize(gate_up_EUD), codec.quantize(down_EFD.swapaxes(1, 2))
            self.gate_up_blocks, self.gate_up_scales = map(nnx.Param, gate_up)
            self.down_blocks, self.down_scales = map(nnx.Param, down)
        else:
            self.gate_up, self.down = nnx.Param(gate_up_EDPF), nnx.Param(down_EFD)
        if config.router_bias:
            self.router_bias = zeros(config, "moe.router_bias")
        if config.expert_bias:
            self.gate_up_bias = zeros(config, "moe.gate_up_bias")
            self.down_bias = zeros(config, "moe.down_bias")
        lora.add_adapters(self, config, "moe", rngs)
        self.config = config

    def __call__(
        self, x_BTD: jax.Array, token_mask_BT: jax.Array, capacity_factor: float | None = None
    ) -> tuple[jax.Array, RouterStats]:
        """Returns the combined expert outputs, [B, T, D], zero at padding, and the router statistics.

        Args:
          token_mask_BT: bool; False at padding, which is not routed.
          capacity_factor: see `parallel.expert_parallel.apply_experts`; None drops no tokens.
        """
        config = self.config
        assert_shapes("BTD BT", x_BTD, token_mask_BT)
        B, T, D = x_BTD.shape
        x_MD, token_mask_M = x_BTD.reshape(B * T, D), token_mask_BT.reshape(-1)
        logits_ME, experts_MX, weights_MX = self.route(x_MD)
        routing = Routing(jnp.where(token_mask_M[:, None], experts_MX, -1), weights_MX)
        parameters = self.expert_parameters()
        swiglu = SwiGLU(config.swiglu_alpha, config.swiglu_limit, config.swiglu_up_offset)
        is_adapted = "gate_up_lora_a" in parameters or "down_lora_a" in parameters
        # The router is a view only if there is a cache; the decode kernels are not differentiable.
        is_decoding = isinstance(self.router.get_value(), LayerView) and capacity_factor is None
        if is_decoding and not is_adapted and decode.supports_experts(x_MD, parameters):
            y_MD, num_dropped = decode.experts(x_MD, *routing, parameters, swiglu), jnp.float32(0)
        else:
            letters = {name: LETTERS[f"moe.{name}"] for name in parameters}
            scalings = {target: lora.scaling(config, target) for target in EXPERT_TARGETS}
            function = functools.partial(expert_outputs, swiglu, scalings=scalings)
            y_MD, num_dropped = apply_experts(function, x_MD, routing, parameters, letters, capacity_factor)
        stats = router_stats(logits_ME, experts_MX, token_mask_M)
        num_rows = jnp.maximum(jnp.sum(token_mask_M, dtype=jnp.int32) * config.num_experts_per_tok, 1)
        return y_MD.reshape(B, T, D), stats | {"dropped": num_dropped / num_rows}

    def route(self, x_MD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns the router logits, float32 [M, E], the top experts of each token, int32 [M, X], and their
        weights, float32 [M, X], which sum to 1."""
        (logits_ME,) = lora.adapted_einsum(self, "MD,De->Me", x_MD.astype(jnp.float32), ("router",))
        if self.config.router_bias:
            logits_ME = logits_ME + self.router_bias[...]
        # Without shard_map, the compiler all-gathers the tokens for top-k.
        experts_MX, weights_MX = shard_map_batch(
            functools.partial(top_experts, experts_per_token=self.config.num_experts_per_tok), logits_ME
        )
        return logits_ME, experts_MX, weights_MX

    def expert_parameters(self) -> dict[str, jax.Array | LayerView]:
        """Returns the weights (dense or MXFP4, as stored), biases and adapters of the experts by name."""
        names = (
            name.removeprefix("moe.") for name in LETTERS if name.startswith(("moe.gate_up", "moe.down"))
        )
        return {name: getattr(self, name).get_value() for name in names if hasattr(self, name)}


def top_experts(logits_ME: jax.Array, experts_per_token: int) -> tuple[jax.Array, jax.Array]:
    """Returns the top-k experts of each token, int32 [M, X] (the lower index wins ties), and the softmax over
    only their logits, float32 [M, X]."""
    top_MX, experts_MX = jax.lax.top_k(logits_ME, experts_per_token)
    return experts_MX, jax.nn.softmax(top_MX.astype(jnp.float32), axis=-1)


def router_stats(logits_ME: jax.Array, experts_MX: jax.Array, token_mask_M: jax.Array) -> RouterStats:
    """Returns statistics for the router losses, over the tokens in the mask.

    `load` [E] is the fraction of assignments to each expert (sums to 1), `probability` [E] the mean softmax
    over all experts, and `z` the mean squared logsumexp of the logits.
    """
    assert_shapes("ME MX M", logits_ME, experts_MX, token_mask_M)
    weight_M = token_mask_M.astype(jnp.float32)
    count = jnp.maximum(jnp.sum(weight_M), 1)
    one_hot_ME = jnp.sum(jax.nn.one_hot(experts_MX, logits_ME.shape[1], dtype=jnp.float32), axis=1)
    log_total_M = jax.nn.logsumexp(logits_ME, axis=-1)
    probability_ME = jnp.exp(logits_ME - log_total_M[:, None])
    return {
        "load": weight_M @ one_hot_ME / (count * experts_MX.shape[1]),
        "probability": weight_M @ probability_ME / count,
        "z": jnp.sum(weight_M * log_total_M**2) / count,
    }


def expert_outputs(
    swiglu: "SwiGLU",
    x_RD: jax.Array,
    parameters: dict,
    group_sizes_E: jax.Array,
    scalings: Mapping[str, float] | None = None,
) -> jax.Array:
    """Applies the experts of one device to rows sorted by expert: `swiglu(x gate_up + bias) down + bias`.

    Args:
      parameters: expert parameters, dense or packed, as arrays or views of one layer.
      group_sizes_E: int32, rows per expert. Rows past their sum have a result of zero.
      scalings: scaling of the adapters of `gate_up` and `down`, if any.
    """
    bias, down_bias = parameters.get("gate_up_bias"), parameters.get("down_bias")

    def adapter_inputs(name, x_RD):
        """Returns `scaling x A`, or None; a partial sum over the inputs on this device."""
        a = parameters.get(f"{name}_lora_a")
        return None if a is None else (scalings or {})[name] * grouped_matmul(x_RD, a, group_sizes_E)

    def add_adapter(name, y_RF, h_Rr):
        if h_Rr is None:
            return y_RF
        return y_RF + grouped_matmul(h_Rr, parameters[f"{name}_lora_b"], group_sizes_E)

    h_Rr = adapter_inputs("gate_up", x_RD)
    if "down" in parameters:
        h_RF = grouped_matmul(x_RD, parameters["gate_up"], group_sizes_E, bias)
        a_RF = swiglu_halves(swiglu, add_adapter("gate_up", h_RF, h_Rr))
        y_RD = grouped_matmul(a_RF, parameters["down"], group_sizes_E, down_bias)
        return add_adapter("down", y_RD, adapter_inputs("down", a_RF))
    # Packed: rows of gate and up are interleaved, and the tensor axis splits outputs, which are all-gathered
    # here. Dense outputs are summed over that axis in `apply_experts` instead.
    weights = {
        name: (parameters[f"{name}_blocks"], parameters[f"{name}_scales"]) for name in ("gate_up", "down")
    }
    bias_EU = None if bias is None else bias.swapaxes(1, 2).reshape(bias.shape[0], -1)
    h_RU = mxfp4_grouped_matmul(x_RD, *weights["gate_up"], group_sizes_E, bias_EU)
    gate_RF, up_RF = jnp.moveaxis(h_RU.reshape(x_RD.shape[0], -1, 2), -1, 0)
    if h_Rr is not None:
        delta_RF = grouped_matmul(h_Rr, parameters["gate_up_lora_b"], group_sizes_E)
        gate_RF, up_RF = jax.tree.map(jnp.add, (gate_RF, up_RF), tuple(jnp.split(delta_RF, 2, axis=-1)))
    a_RF = swiglu_pair(swiglu, gate_RF, up_RF)
    h_Rr = adapter_inputs("down", a_RF)
    if h_Rr is not None and current_axes().get("tensor", 1) > 1:
        h_Rr = tensor_psum(h_Rr)
    # The bias is added after the gather because, unlike the rows of `down`, it is not split.
    a_RF = tensor_all_gather(a_RF)
    y_RD = tensor_all_gather(mxfp4_grouped_matmul(a_RF, *weights["down"], group_sizes_E))
    return add_group_bias(add_adapter("down", y_RD, h_Rr), down_bias, group_sizes_E)


class SwiGLU(NamedTuple):
    """gpt-oss's gated activation: gate * sigmoid(alpha * gate) * (up + up_offset) (docs/math.md).

    Clamps the gate from above only, and `up` on both sides.
    """

    alpha: float
    limit: float | None
    up_offset: float

    def __call__(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        if self.limit is not None:
            gate = jnp.minimum(gate, self.limit)
            up = jnp.clip(up, -self.limit, self.limit)
        return gate * jax.nn.sigmoid(self.alpha * gate) * (up + self.up_offset)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def swiglu_pair(swiglu: SwiGLU, gate_RF: jax.Array, up_RF: jax.Array) -> jax.Array:
    """SwiGLU with a custom gradient that saves only the inputs."""
    return swiglu(gate_RF, up_RF)


def _swiglu_pair_bwd(
    swiglu: SwiGLU, inputs: tuple[jax.Array, jax.Array], g_RF: jax.Array
) -> tuple[jax.Array, jax.Array]:
    # Without the barrier, XLA's CSE would save the terms of the forward pass instead of recomputing them.
    inputs, g_RF = jax.lax.optimization_barrier((inputs, g_RF))
    return jax.vjp(swiglu.__call__, *inputs)[1](g_RF)


swiglu_pair.defvjp(lambda swiglu, *inputs: (swiglu(*inputs), inputs), _swiglu_pair_bwd)


def swiglu_halves(swiglu: SwiGLU, h_RF: jax.Array) -> jax.Array:
    """SwiGLU of the two halves of each row, [R, 2 F] -> [R, F]; the gradient saves only the input."""
    if build.is_usable("swiglu", h_RF.dtype):
        return cpu_swiglu.swiglu_halves(swiglu, h_RF)
    return xla_swiglu_halves(swiglu, h_RF)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def xla_swiglu_halves(swiglu: SwiGLU, h_RF: jax.Array) -> jax.Array:
    """`swiglu_halves` in plain XLA."""
    return swiglu(*jnp.split(h_RF, 2, axis=-1))


def _xla_swiglu_halves_bwd(swiglu: SwiGLU, h_RF: jax.Array, g_RF: jax.Array) -> tuple[jax.Array]:
    # Barrier as above, placed before the split because the split's result would be copied.
    h_RF, g_RF = jax.lax.optimization_barrier((h_RF, g_RF))
    halves = jnp.split(h_RF, 2, axis=-1)
    d_gate, d_up = jax.vjp(swiglu.__call__, *halves)[1](g_RF)
    # Writes each half in place: XLA on CPU concatenates element by element.
    start = (0,) * h_RF.ndim
    d_h_RF = jax.lax.dynamic_update_slice(jnp.zeros_like(h_RF), d_gate, start)
    return (jax.lax.dynamic_update_slice(d_h_RF, d_up, (*start[:-1], d_gate.shape[-1])),)


xla_swiglu_halves.defvjp(lambda swiglu, h_RF: (xla_swiglu_halves(swiglu, h_RF), h_RF), _xla_swiglu_halves_bwd)
