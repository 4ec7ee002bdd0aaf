"""The router and its experts."""

import jax
import jax.numpy as jnp
from flax import nnx

from gptoss_jax.config import ModelConfig
from gptoss_jax.kernels.mxfp4 import codec
from gptoss_jax.kernels.swiglu import SwiGLU
from gptoss_jax.parallel.expert_parallel import apply_experts
from gptoss_jax.parallel.rules import by_device, product

RouterStats = dict[str, jax.Array]


def route(logits_ME: jax.Array, experts_per_token: int) -> tuple[jax.Array, jax.Array]:
    """The top X experts of each token (ties: the lower index), and the softmax over their logits alone,
    float32."""
    top_MX, experts_MX = jax.lax.top_k(logits_ME, experts_per_token)
    return experts_MX, jax.nn.softmax(top_MX.astype(jnp.float32), axis=-1)


def router_stats(logits_ME: jax.Array, experts_MX: jax.Array, real_M: jax.Array) -> RouterStats:
    """What the balance losses need, over the real tokens alone.

    Returns `load` [E], the share of assignments each expert got (sums to 1), `probability` [E], the mean of
    the softmax over all experts, and `z`, the mean squared logsumexp of the logits.
    """
    weight_M = real_M.astype(jnp.float32)
    count = jnp.maximum(jnp.sum(weight_M), 1)
    chosen_ME = jnp.sum(jax.nn.one_hot(experts_MX, logits_ME.shape[1], dtype=jnp.float32), axis=1)
    log_total_M = jax.nn.logsumexp(logits_ME, axis=-1)
    probability_ME = jnp.exp(logits_ME - log_total_M[:, None])
    return {
        "load": weight_M @ chosen_ME / (count * experts_MX.shape[1]),
        "probability": weight_M @ probability_ME / count,
        "z": jnp.sum(weight_M * log_total_M**2) / count,
    }


class MoE(nnx.Module):
    """A layer of routed SwiGLU experts."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D, E, F = config.hidden_size, config.num_local_experts, config.intermediate_size
        normal = nnx.initializers.normal(config.initializer_range, jnp.float32)
        self.router = nnx.Param(normal(rngs.params(), (D, E)))
        # Gate and up stand apart, each whole: the published layout's interleaving is undone when weights are
        # read, but in packed ones.
        gate_up, down = normal(rngs.params(), (E, D, 2, F)), normal(rngs.params(), (E, F, D))
        if config.expert_format == "mxfp4":
            # As published: groups run along the input axis, which stands last, and the rows of gate and up
            # take turns.
            rows = gate_up.swapaxes(1, -1).reshape(E, 2 * F, D), down.swapaxes(1, 2)
            for name, weights in zip(("gate_up", "down"), rows, strict=True):
                blocks, scales = codec.pack(weights)
                setattr(self, f"{name}_blocks", nnx.Param(blocks))
                setattr(self, f"{name}_scales", nnx.Param(scales))
        else:
            self.gate_up, self.down = nnx.Param(gate_up), nnx.Param(down)
        if config.router_bias:
            self.router_bias = nnx.Param(jnp.zeros(E, jnp.float32))
        if config.expert_bias:
            self.gate_up_bias = nnx.Param(jnp.zeros((E, 2, F), jnp.float32))
            self.down_bias = nnx.Param(jnp.zeros((E, D), jnp.float32))
        self.config = config

    def __call__(
        self, x_BTD: jax.Array, real_BT: jax.Array, capacity: float | None = None
    ) -> tuple[jax.Array, RouterStats]:
        """Sends each real token to its experts; the rows of padding come out as zeros.

        Returns [B, T, D] and the router's statistics.
        """
        config = self.config
        B, T, D = x_BTD.shape
        x_MD, real_M = x_BTD.reshape(B * T, D), real_BT.reshape(-1)
        logits_ME = product(("moe", "router"), "MD,DE->ME", x_MD.astype(jnp.float32), self.router[...])
        if config.router_bias:
            logits_ME = logits_ME + self.router_bias[...]
        # Left to itself, the compiler brings all tokens to every device to find the largest logits.
        experts_MX, weights_MX = by_device(
            lambda logits: route(logits, config.num_experts_per_tok), logits_ME
        )
        y_MD, dropped = apply_experts(
            x_MD,
            jnp.where(real_M[:, None], experts_MX, -1),
            weights_MX,
            self.expert_parameters(),
            SwiGLU(config.swiglu_alpha, config.swiglu_limit, config.swiglu_up_offset),
            capacity,
        )
        stats = router_stats(logits_ME, experts_MX, real_M)
        asked = jnp.maximum(jnp.sum(real_M, dtype=jnp.int32) * config.num_experts_per_tok, 1)
        return y_MD.reshape(B, T, D), stats | {"dropped": dropped / asked}

    def expert_parameters(self) -> dict[str, jax.Array]:
        """The experts' matrices and biases as they are held, by name: `gate_up` [E, D, 2, F] and `down` [E,
        F, D], or `gate_up_blocks`, `gate_up_scales`, …."""
        packed = self.config.expert_format == "mxfp4"
        parts = ["_blocks", "_scales"] if packed else [""]
        parts += ["_bias"] * self.config.expert_bias
        return {
            name: getattr(self, name)[...] for name in (n + p for n in ("gate_up", "down") for p in parts)
        }
