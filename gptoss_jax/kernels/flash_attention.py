"""Grouped-query attention with a mask rule and learned sinks: the plain reference, and the form that skips
what is never visible.

Letters: B batch, T queries, S keys, N query heads, K key/value heads, G = N / K, H head size.
"""

import jax
import jax.numpy as jnp

from gptoss_jax.kernels import target

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


def reference_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask_BTS: jax.Array,
    sinks_N: jax.Array | None = None,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention with the whole score matrix. Query head n uses key/value head n // G.

    A sink is one more logit in each head's softmax, unscaled, unmasked and without a value, so the weights of
    the keys add up to less than one. Softmax in float32. Returns [B, T, N, H] in the type of `q_BTNH`.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    G = N // K
    sum_type = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    # The products are batched matrix products over [B, K]: XLA for CPU is slow with any other arrangement.
    q_BKRH = (q_BTNH * jnp.asarray(H**-0.5, q_BTNH.dtype)).reshape(B, T, K, G, H)
    q_BKRH = q_BKRH.transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    k_BKHS, v_BKSH = k_BSKH.transpose(0, 2, 3, 1), v_BSKH.transpose(0, 2, 1, 3)
    scores = jnp.matmul(q_BKRH, k_BKHS, precision="highest", preferred_element_type=sum_type)
    scores = jnp.where(mask_BTS[:, None, None], scores.reshape(B, K, G, T, S), MASKED)
    largest = jnp.max(scores, axis=-1, keepdims=True)
    if sinks_N is not None:
        sinks = sinks_N.astype(scores.dtype).reshape(1, K, G, 1, 1)
        largest = jnp.maximum(largest, sinks)
    largest = jax.lax.stop_gradient(largest)
    weights = jnp.exp(scores - largest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if sinks_N is not None:
        total = total + jnp.exp(sinks - largest)
    if dropout_key is not None and dropout > 0:
        weights = jnp.where(
            jax.random.bernoulli(dropout_key, 1 - dropout, weights.shape), weights / (1 - dropout), 0
        )
    out = jnp.matmul(
        weights.astype(v_BSKH.dtype).reshape(B, K, G * T, S),
        v_BKSH,
        precision="highest",
        preferred_element_type=sum_type,
    )
    out = out.reshape(B, K, G, T, H) / total
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H).astype(q_BTNH.dtype)


def query_block(length: int, platform: str) -> int:
    """Queries that are worked through at once: small blocks skip more, but the program grows with their
    number, which the compilers for accelerators take badly."""
    return max(64, -(-length // (16 if platform == "cpu" else 8)))


def self_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array,
    window: int | None,
    sink_tokens: int = 0,
    sinks_N: jax.Array | None = None,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Attention of rows to themselves, in blocks of queries that read only the keys they may see.

    Positions must rise by one or more from token to token of a segment: then no key after a query's place in
    the row is visible to it, and no key `window` places or more before. Returns [B, T, N, H].
    """
    T = q_BTNH.shape[1]
    block = query_block(T, target.platform())
    outs = []
    for start in range(0, T, block):
        stop = min(start + block, T)
        # The first tokens of a segment may lie anywhere in the row.
        first = 0 if window is None or sink_tokens else max(0, start - window + 1)
        queries, keys = slice(start, stop), slice(first, stop)
        mask_BTS = visible(
            positions_BT[:, queries],
            segment_ids_BT[:, queries],
            positions_BT[:, keys],
            segment_ids_BT[:, keys],
            window,
            sink_tokens,
        )
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, start)
        outs.append(
            reference_attention(
                q_BTNH[:, queries], k_BTKH[:, keys], v_BTKH[:, keys], mask_BTS, sinks_N, dropout, key
            )
        )
    return jnp.concatenate(outs, axis=1)
