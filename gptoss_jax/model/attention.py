"""Grouped-query attention with alternating windows and learned sinks."""

import jax
import jax.numpy as jnp
from flax import nnx

from gptoss_jax.config import SLIDING, ModelConfig
from gptoss_jax.kernels.flash_attention import flash_attention, reference_attention
from gptoss_jax.kernels.mask import visible
from gptoss_jax.model import kv_cache, rope
from gptoss_jax.parallel.sharding import by_head, product, products


class Attention(nnx.Module):
    """Projections, rotation and attention of one layer."""

    def __init__(self, config: ModelConfig, layer_type: str, *, rngs: nnx.Rngs):
        D, N, K, H = (
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        normal = nnx.initializers.normal(config.initializer_range)
        self.q = nnx.Param(normal(rngs.params(), (D, N, H)))
        self.k = nnx.Param(normal(rngs.params(), (D, K, H)))
        self.v = nnx.Param(normal(rngs.params(), (D, K, H)))
        self.out = nnx.Param(normal(rngs.params(), (N, H, D)))
        if config.attention_bias:
            self.q_bias = nnx.Param(jnp.zeros((N, H)))
            self.k_bias = nnx.Param(jnp.zeros((K, H)))
            self.v_bias = nnx.Param(jnp.zeros((K, H)))
            self.out_bias = nnx.Param(jnp.zeros(D))
        if config.learned_sinks:
            self.sinks = nnx.Param(jnp.zeros(N))
        self.config = config
        self.window = config.sliding_window if layer_type == SLIDING else None

    def __call__(
        self,
        x_BTD: jax.Array,
        segment_ids_BT: jax.Array,
        positions_BT: jax.Array,
        cos_sin: tuple[jax.Array, jax.Array],
        cache: dict[str, jax.Array] | None = None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array] | None]:
        """Attends within the row, or to the cache, which gets the row's keys and values first.

        Returns [B, T, D] and the new cache of this layer (None without one).
        """
        config, dtype = self.config, x_BTD.dtype

        weights = {("attention", name): getattr(self, name)[...] for name in "qkv"}
        q_BTNH, k_BSKH, v_BSKH = products("BTD,DNH->BTNH", x_BTD, weights)
        if config.attention_bias:
            q_BTNH, k_BSKH, v_BSKH = (
                y + bias[...].astype(dtype)
                for y, bias in ((q_BTNH, self.q_bias), (k_BSKH, self.k_bias), (v_BSKH, self.v_bias))
            )
        q_BTNH, k_BSKH = rope.rotate(q_BTNH, cos_sin), rope.rotate(k_BSKH, cos_sin)
        sinks_N = self.sinks[...] if config.learned_sinks else None
        if cache is None:
            y_BTNH = by_head(
                lambda q, k, v, sinks, key, positions, segments: flash_attention(
                    q, k, v, positions, segments, self.window, config.sink_tokens, sinks,
                    config.attention_dropout, key,
                ),
                (q_BTNH, k_BSKH, v_BSKH), sinks_N, dropout_key, positions_BT, segment_ids_BT,
            )  # fmt: skip
        else:
            cache = kv_cache.write(cache, k_BSKH, v_BSKH, positions_BT, segment_ids_BT)
            k_BSKH, v_BSKH = cache["keys"].astype(dtype), cache["values"].astype(dtype)
            # A slot is a position, and every slot up to a query's own has been written by its own sequence.
            slots_BS = jnp.broadcast_to(jnp.arange(k_BSKH.shape[1]), k_BSKH.shape[:2])
            ones_BS = jnp.ones_like(slots_BS)
            mask_BTS = visible(
                positions_BT, segment_ids_BT, slots_BS, ones_BS, self.window, config.sink_tokens
            )
            y_BTNH = reference_attention(q_BTNH, k_BSKH, v_BSKH, mask_BTS, sinks_N)
        y_BTD = product(("attention", "out"), "BTNH,NHD->BTD", y_BTNH, self.out[...])
        return y_BTD + self.out_bias[...].astype(dtype) if config.attention_bias else y_BTD, cache
