"""The KV cache: a pytree that is passed in and returned, never changed in place.

Full-attention layers have a slot for every token that fits; sliding layers have a ring of at most their
window's size, after the slots of sink tokens (0 in gpt-oss; unrelated to the learned sinks), which stay.
"""

import dataclasses

import jax
import jax.numpy as jnp

from gptoss_jax.config import SLIDING, ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of a batch of sequences, which may have read different numbers of tokens.

    A sequence must not read more tokens than the full layers have slots.
    """

    # For each layer of the period of `layer_types`: `keys` and `values`, [repetitions, B, K, slots, H].
    layers: list[dict[str, jax.Array]]
    # int32 [B]: tokens read so far.
    lengths: jax.Array


def slots_of_layers(config: ModelConfig, length: int) -> list[int]:
    """Returns the slots of each layer of the period in a cache for `length` tokens."""
    ring = config.sink_tokens + config.sliding_window
    return [min(length, ring) if kind == SLIDING else length for kind in config.period]


def init_cache(config: ModelConfig, batch: int, length: int, dtype: jnp.dtype) -> KVCache:
    """Returns an empty cache for `length` tokens of `batch` sequences."""
    repetitions = config.num_hidden_layers // len(config.period)
    heads, size = config.num_key_value_heads, config.head_dim
    layers = [
        {name: jnp.zeros((repetitions, batch, heads, slots, size), dtype) for name in ("keys", "values")}
        for slots in slots_of_layers(config, length)
    ]
    return KVCache(layers, jnp.zeros(batch, jnp.int32))


def grow(config: ModelConfig, cache: KVCache, length: int) -> KVCache:
    """Returns the cache with room for `length` tokens, which must exceed its current room.

    A ring with fewer slots than window plus sink tokens has not wrapped yet, so its tokens keep their slots.
    """
    layers = [
        {
            name: jnp.pad(stack, ((0, 0), (0, 0), (0, 0), (0, slots - stack.shape[3]), (0, 0)))
            for name, stack in layer.items()
        }
        for layer, slots in zip(cache.layers, slots_of_layers(config, length), strict=True)
    ]
    return KVCache(layers, cache.lengths)
