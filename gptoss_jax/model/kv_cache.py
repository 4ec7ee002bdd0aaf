"""Keys and values of the tokens read so far: a pytree that is passed in and handed back, never changed in
place. Full layers have a slot for every token there is room for, sliding layers a ring of the window's."""

import dataclasses

import jax
import jax.numpy as jnp

from gptoss_jax.config import SLIDING, ModelConfig

LayerCache = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """What a batch of sequences has read, each its own number of tokens.

    `layers` has one entry for each layer of the period of `layer_types`: its keys and values are
    [repetitions, B, K, S, H]. `lengths` is int32 [B]: tokens read so far. A sequence must not read more than
    there is room for in the full layers.
    """

    layers: list[LayerCache]
    lengths: jax.Array


def slots_of_layers(config: ModelConfig, length: int) -> list[int]:
    """Slots that each layer of the period has in a cache with room for `length` tokens."""
    ring = config.sink_tokens + config.sliding_window
    return [min(length, ring) if kind == SLIDING else length for kind in config.period]


def make_cache(config: ModelConfig, batch: int, length: int, dtype: jnp.dtype) -> Cache:
    """An empty cache with room for `length` tokens of `batch` sequences."""
    repetitions = config.num_hidden_layers // len(config.period)
    heads, size = config.num_key_value_heads, config.head_dim
    layers = [
        {name: jnp.zeros((repetitions, batch, heads, slots, size), dtype) for name in ("keys", "values")}
        for slots in slots_of_layers(config, length)
    ]
    return Cache(layers, jnp.zeros(batch, jnp.int32))


def grow(config: ModelConfig, cache: Cache, length: int) -> Cache:
    """The same cache with room for `length` tokens, which is more than it has.

    A ring that has no slot for the whole window yet has not closed, so its slots stay where they are too.
    """

    def wider(layer, slots):
        more = {name: slots - part.shape[3] for name, part in layer.items()}
        return {
            name: jnp.pad(part, ((0, 0), (0, 0), (0, 0), (0, more[name]), (0, 0)))
            for name, part in layer.items()
        }

    slots = slots_of_layers(config, length)
    return Cache(
        [wider(layer, count) for layer, count in zip(cache.layers, slots, strict=True)], cache.lengths
    )
