"""Keys and values of the tokens read so far: a pytree that is passed in and handed back, never changed in
place."""

import jax
import jax.numpy as jnp

from gptoss_jax.config import ModelConfig

LayerCache = dict[str, jax.Array]


def make_cache(config: ModelConfig, batch: int, length: int, dtype: jnp.dtype) -> list[LayerCache]:
    """Room for `length` tokens (S) of `batch` sequences in every layer.

    One entry for each layer of the period of `layer_types`; its keys and values are [repetitions, B, S, K,
    H].
    """
    period = config.period
    shape = (config.num_hidden_layers // len(period), batch, length)
    shape += (config.num_key_value_heads, config.head_dim)
    return [{"keys": jnp.zeros(shape, dtype), "values": jnp.zeros(shape, dtype)} for _ in period]


def write(
    cache: LayerCache,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array,
) -> LayerCache:
    """Puts the keys and values of one layer at their positions; those of padding (segment 0) are dropped.

    A token's slot is its position. A query sees no slot past its own position, so that slots which were never
    written, or were written by an answer that has been taken back, are never read.
    """
    length = cache["keys"].shape[1]
    slots_BT = jnp.where(segment_ids_BT > 0, positions_BT, length)
    rows_B1 = jnp.arange(k_BTKH.shape[0])[:, None]
    return {
        "keys": cache["keys"].at[rows_B1, slots_BT].set(k_BTKH.astype(cache["keys"].dtype), mode="drop"),
        "values": cache["values"]
        .at[rows_B1, slots_BT]
        .set(v_BTKH.astype(cache["values"].dtype), mode="drop"),
    }
