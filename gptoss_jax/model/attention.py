"""Grouped-query attention with alternating windows and learned sinks."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from gptoss_jax.config import SLIDING, ModelConfig
from gptoss_jax.kernels.attention.api import flash_attention
from gptoss_jax.kernels.attention.cached import decode_attention, prefill_attention, update_cache
from gptoss_jax.kernels.stack import Layer
from gptoss_jax.model import rope
from gptoss_jax.model.kv_cache import LayerCache
from gptoss_jax.parallel.rules import by_head, product, products


class Cached(NamedTuple):
    """What a layer needs to know of the cache."""

    stacks: LayerCache  # keys and values of this layer and others, [layers, B, K, S, H]
    layer: jax.Array | int  # which of them is this one
    lengths: jax.Array  # int32 [B], tokens read before
    counts: jax.Array  # int32 [B], how many of the row's first tokens are real


class Attention(nnx.Module):
    """Projections, rotation and attention of one layer."""

    def __init__(self, config: ModelConfig, layer_type: str, *, rngs: nnx.Rngs):
        D, N, K, H = (
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        normal = nnx.initializers.normal(config.initializer_range, jnp.float32)
        self.q = nnx.Param(normal(rngs.params(), (D, N, H)))
        self.k = nnx.Param(normal(rngs.params(), (D, K, H)))
        self.v = nnx.Param(normal(rngs.params(), (D, K, H)))
        self.out = nnx.Param(normal(rngs.params(), (N, H, D)))
        if config.attention_bias:
            self.q_bias = nnx.Param(jnp.zeros((N, H), jnp.float32))
            self.k_bias = nnx.Param(jnp.zeros((K, H), jnp.float32))
            self.v_bias = nnx.Param(jnp.zeros((K, H), jnp.float32))
            self.out_bias = nnx.Param(jnp.zeros(D, jnp.float32))
        if config.learned_sinks:
            self.sinks = nnx.Param(jnp.zeros(N, jnp.float32))
        self.config = config
        self.window = config.sliding_window if layer_type == SLIDING else None

    def __call__(
        self,
        x_BTD: jax.Array,
        segment_ids_BT: jax.Array,
        positions_BT: jax.Array,
        cos_sin: tuple[jax.Array, jax.Array],
        cached: Cached | None = None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Attends within the row, and to what was read before it where there is a cache.

        Returns [B, T, D] and the stacks of the cache with the row's keys and values in them (None without).
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
        sinks_N = jnp.asarray(self.sinks[...]) if config.learned_sinks else None
        cache = None
        if cached is None:
            y_BTNH = by_head(
                lambda q, k, v, sinks, key, positions, segments: flash_attention(
                    q, k, v, positions, segments, self.window, config.sink_tokens, sinks,
                    config.attention_dropout, key,
                ),
                (q_BTNH, k_BSKH, v_BSKH), sinks_N, dropout_key, positions_BT, segment_ids_BT,
            )  # fmt: skip
        else:
            y_BTNH, cache = self._with_cache(q_BTNH, k_BSKH, v_BSKH, cached, sinks_N)
        y_BTD = product(("attention", "out"), "BTNH,NHD->BTD", y_BTNH, self.out[...])
        return y_BTD + self.out_bias[...].astype(dtype) if config.attention_bias else y_BTD, cache

    def _with_cache(self, q_BTNH, k_BTKH, v_BTKH, cached, sinks_N) -> tuple[jax.Array, LayerCache]:
        """What the row's tokens see of themselves and the cache, and the cache with them. In a row of one
        token, as in decoding, padding gives zeros."""
        sink_tokens = self.config.sink_tokens if self.window is not None else 0
        lengths_B, counts_B = cached.lengths, cached.counts
        keys, values = (Layer(cached.stacks[name], cached.layer) for name in ("keys", "values"))
        after = update_cache(keys, values, k_BTKH, v_BTKH, lengths_B, counts_B, sink_tokens)
        if q_BTNH.shape[1] > 1:
            # Keys that the first of the new tokens see may lie where the last ones are written.
            y_BTNH = prefill_attention(
                q_BTNH, k_BTKH, v_BTKH, keys, values, lengths_B, counts_B, self.window, sink_tokens, sinks_N
            )
        else:
            seen_B = jnp.where(counts_B > 0, jnp.minimum(lengths_B + 1, keys.shape[2]), 0)
            layers = (Layer(stack, cached.layer) for stack in after)
            y_BTNH = decode_attention(q_BTNH, *layers, seen_B, sinks_N)
        return y_BTNH, dict(zip(("keys", "values"), after, strict=True))
