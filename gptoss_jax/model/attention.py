"""Grouped-query attention with sliding windows in alternate layers, and learned sinks."""

from typing import NamedTuple

import jax
from flax import nnx

from gptoss_jax.config import SLIDING, ModelConfig
from gptoss_jax.kernels.attention.api import AttentionSpec
from gptoss_jax.kernels.attention.cached import (
    LayerCacheView,
    decode_attention,
    prefill_attention,
    update_cache,
)
from gptoss_jax.kernels.shapes import assert_shapes
from gptoss_jax.model import lora
from gptoss_jax.model.parameters import normal, zeros
from gptoss_jax.model.rope import apply_rope
from gptoss_jax.parallel.context import context_attention, context_prefill_attention
from gptoss_jax.parallel.linear import shard_map_heads


class Segments(NamedTuple):
    """The document of each token, and its position there."""

    ids_BT: jax.Array  # int32: documents count from 1, padding is 0
    positions_BT: jax.Array  # int32, increasing by one within a segment
    cos_sin: tuple[jax.Array, jax.Array]  # cos and sin of the rotary angles, float32 [B, T, H / 2]


class Attention(nnx.Module):
    """Attention of one layer: QKV projections, RoPE, softmax over the visible keys, output projection."""

    def __init__(self, config: ModelConfig, layer_type: str, *, rngs: nnx.Rngs):
        self.q, self.k, self.v, self.out = (
            nnx.Param(normal(config, f"attention.{name}", rngs)) for name in ("q", "k", "v", "out")
        )
        if config.attention_bias:
            self.q_bias, self.k_bias, self.v_bias, self.out_bias = (
                zeros(config, f"attention.{name}_bias") for name in ("q", "k", "v", "out")
            )
        if config.learned_sinks:
            self.sinks = zeros(config, "attention.sinks")
        lora.add_adapters(self, config, "attention", rngs)
        self.config = config
        window = config.sliding_window if layer_type == SLIDING else None
        self.spec = AttentionSpec(window, config.sink_tokens, config.attention_dropout)

    def __call__(
        self,
        x_BTD: jax.Array,
        segments: Segments,
        cache: LayerCacheView | None = None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCacheView | None]:
        """Attends to tokens of the same segment and, with a cache, to earlier tokens of the sequence.

        Returns [B, T, D], and the cache updated with the new keys and values.
        """
        assert_shapes("BTD BT BT", x_BTD, segments.ids_BT, segments.positions_BT)
        config, dtype = self.config, x_BTD.dtype
        q_BTNH, k_BTKH, v_BTKH = self.qkv(x_BTD, segments)
        sinks_N = self.sinks[...] if config.learned_sinks else None
        # All implementations of attention follow `kernels/attention/reference.py`, which has the sinks.
        if cache is None:
            y_BTNH = shard_map_heads(
                lambda q, k, v, sinks, key, ids, positions: context_attention(
                    q, k, v, ids, positions, self.spec, sinks_N=sinks, dropout_key=key
                ),
                (q_BTNH, k_BTKH, v_BTKH), sinks_N, dropout_key, segments.ids_BT, segments.positions_BT,
            )  # fmt: skip
        elif len(q_BTNH) > len(cache.lengths_B):  # a prefill that the context axis splits
            y_BTNH, k_BTKH, v_BTKH = context_prefill_attention(
                (q_BTNH, k_BTKH, v_BTKH), segments.positions_BT, cache, self.spec, sinks_N
            )
            cache = update_cache(cache, k_BTKH, v_BTKH, self.spec)
        else:
            updated = update_cache(cache, k_BTKH, v_BTKH, self.spec)
            if q_BTNH.shape[1] > 1:
                # Uses the old cache: the last new tokens may overwrite keys that the first ones attend to.
                y_BTNH = prefill_attention(q_BTNH, k_BTKH, v_BTKH, cache, self.spec, sinks_N=sinks_N)
            else:
                y_BTNH = decode_attention(q_BTNH, updated, sinks_N=sinks_N)
            cache = updated
        # Without adapters, adapted_einsum is a plain (sharded) einsum.
        (y_BTD,) = lora.adapted_einsum(self, "BTNH,NHD->BTD", y_BTNH, ("out",))
        return y_BTD + self.out_bias[...].astype(dtype) if config.attention_bias else y_BTD, cache

    def qkv(self, x_BTD: jax.Array, segments: Segments) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns queries [B, T, N, H] and keys, both after RoPE, and values; the latter two [B, T, K, H]."""
        config, dtype = self.config, x_BTD.dtype
        q_BTNH, k_BTKH, v_BTKH = lora.adapted_einsum(self, "BTD,DNH->BTNH", x_BTD, ("q", "k", "v"))
        if config.attention_bias:
            q_BTNH = q_BTNH + self.q_bias[...].astype(dtype)
            k_BTKH = k_BTKH + self.k_bias[...].astype(dtype)
            v_BTKH = v_BTKH + self.v_bias[...].astype(dtype)
        q_BTNH, k_BTKH = apply_rope(q_BTNH, segments.cos_sin), apply_rope(k_BTKH, segments.cos_sin)
        return q_BTNH, k_BTKH, v_BTKH
