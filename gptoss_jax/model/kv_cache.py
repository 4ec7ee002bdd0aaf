"""The KV cache: an immutable pytree, passed in and returned.

Full-attention layers have a slot for every token. Sliding-window layers have fixed slots for the sink tokens
(0 in gpt-oss; unrelated to the learned sinks), then a ring buffer of at most the window size.
"""

import dataclasses

import jax
import jax.numpy as jnp

from gptoss_jax.config import SLIDING, ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of a batch of sequences, which may have different lengths.

    A sequence must not exceed the number of slots in the full-attention layers.
    """

    # For each layer in the period of `layer_types`: `keys` and `values`, [repetitions, B, K, slots, H].
    layers: list[dict[str, jax.Array]]
    # int32 [B]: number of tokens so far.
    lengths: jax.Array


def slots_of_layers(config: ModelConfig, length: int) -> list[int]:
    """Returns the number of slots in each layer of the period, for a cache of `length` tokens."""
    ring = config.sink_tokens + config.sliding_window
    return [min(length, ring) if kind == SLIDING else length for kind in config.period]


def init_cache(config: ModelConfig, batch: int, length: int, dtype: jnp.dtype) -> KVCache:
    """Returns an empty cache for `batch` sequences of up to `length` tokens."""
    repetitions = config.num_hidden_layers // len(config.period)
    heads, size = config.num_key_value_heads, config.head_dim
    layers = [
        {name: jnp.zeros((repetitions, batch, heads, slots, size), dtype) for name in ("keys", "values")}
        for slots in slots_of_layers(config, length)
    ]
    return KVCache(layers, jnp.zeros(batch, jnp.int32))


def grow(config: ModelConfig, cache: KVCache, length: int) -> KVCache:
    """Grows the cache to `length` tokens, which must exceed its current capacity.

    A ring that still has fewer slots than window plus sink tokens has never wrapped around, so its tokens
    keep their slots.
    """
    layers = [
        {
            name: jnp.pad(stack, ((0, 0), (0, 0), (0, 0), (0, slots - stack.shape[3]), (0, 0)))
            for name, stack in layer.items()
        }
        for layer, slots in zip(cache.layers, slots_of_layers(config, length), strict=True)
    ]
    return KVCache(layers, cache.lengths)
