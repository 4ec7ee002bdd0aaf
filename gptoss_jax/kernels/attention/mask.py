"""Which keys a query sees."""

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite, so that a query which sees no key gives no NaN


def visible(
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array,
    key_positions_BS: jax.Array,
    key_segment_ids_BS: jax.Array,
    window: int | None,
    sink_tokens: int = 0,
) -> jax.Array:
    """The mask rule: bool [B, T, S], whether each query sees each key.

    A key is visible in its own segment, at or before the query, and in a sliding layer (`window` is not None)
    only when it is one of the `window` latest, the query's own included, or one of the segment's first
    `sink_tokens`.
    """
    ahead_BTS = positions_BT[:, :, None] - key_positions_BS[:, None, :]
    mask_BTS = (ahead_BTS >= 0) & (segment_ids_BT[:, :, None] == key_segment_ids_BS[:, None, :])
    if window is None:
        return mask_BTS
    near_BTS = ahead_BTS < window
    if sink_tokens:
        near_BTS |= key_positions_BS[:, None, :] < sink_tokens
    return mask_BTS & near_BTS


def segment_starts(segment_ids_BT: jax.Array) -> jax.Array:
    """Where in the row each token's segment begins, int32 [B, T]."""
    index_T = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)
    starts_BT = jnp.diff(segment_ids_BT, axis=1, prepend=segment_ids_BT[:, :1]) != 0
    return jax.lax.cummax(jnp.where(starts_BT, index_T, 0), axis=1)
