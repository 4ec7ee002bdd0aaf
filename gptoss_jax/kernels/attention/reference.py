"""Reference attention: the settings of a layer, the mask rule, and softmax attention.

Letters: B batch, T queries, S keys, N query heads, K key/value heads, G = N / K, H head size, R = G * T.
"""

import dataclasses

import jax
import jax.numpy as jnp

MASK_VALUE = -1e30  # finite, so that a query without visible keys does not produce NaN


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """Static settings of an attention layer; changing them triggers recompilation.

    Attributes:
      window: number of keys that a query sees, including its own; None for full attention.
      sink_tokens: number of tokens at the start of a document that stay visible beyond the window; 0 in
        gpt-oss, and always 0 in full attention, where it has no effect. Unrelated to learned sinks
        (`sinks_N`).
      dropout: dropout rate of the attention weights, if a `dropout_key` is given.
    """

    window: int | None = None
    sink_tokens: int = 0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.window is None:
            object.__setattr__(self, "sink_tokens", 0)


def in_window_or_sink(distance: jax.Array, key_position: jax.Array, spec: AttentionSpec) -> jax.Array:
    """Returns True where a key is within the window or is a sink token, elementwise; `distance` is query
    minus key position.

    In a sliding-window layer, a query sees the last `window` keys and the first `sink_tokens`.
    """
    if spec.window is None:
        return jnp.ones_like(distance, bool)
    near = distance < spec.window
    return near | (key_position < spec.sink_tokens) if spec.sink_tokens else near


def attention_mask(
    segment_ids_BT: jax.Array,
    positions_BT: jax.Array,
    spec: AttentionSpec,
    key_segment_ids_BS: jax.Array | None = None,
    key_positions_BS: jax.Array | None = None,
) -> jax.Array:
    """Returns the attention mask, bool [B, T, S], True where a query sees a key. Keys default to the queries.

    A key is visible if it is in the query's segment, at or before the query, and `in_window_or_sink`.
    """
    if key_segment_ids_BS is None or key_positions_BS is None:
        key_segment_ids_BS, key_positions_BS = segment_ids_BT, positions_BT
    distance_BTS = positions_BT[:, :, None] - key_positions_BS[:, None]
    is_same_BTS = segment_ids_BT[:, :, None] == key_segment_ids_BS[:, None]
    return (
        (distance_BTS >= 0) & is_same_BTS & in_window_or_sink(distance_BTS, key_positions_BS[:, None], spec)
    )


def segment_starts(segment_ids_BT: jax.Array) -> jax.Array:
    """Returns the index within the row at which each token's segment starts, int32 [B, T]."""
    index_T = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)
    is_start_BT = jnp.diff(segment_ids_BT, axis=1, prepend=segment_ids_BT[:, :1]) != 0
    return jax.lax.cummax(jnp.where(is_start_BT, index_T, 0), axis=1)


def reference_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask_BTS: jax.Array,
    *,
    sinks_N: jax.Array | None = None,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Computes softmax attention with the full score matrix. Query head n uses key/value head n // G.

    A sink is an additional logit in each head's softmax that is neither scaled nor masked and has no value
    vector, so the attention weights sum to less than one. Softmax in float32. Returns [B, T, N, H] in the
    dtype of `q_BTNH`.
    """
    K = k_BSKH.shape[2]
    q_BKRH, k_BKHS, v_BKSH = (
        group_heads(q_BTNH, K),
        k_BSKH.transpose(0, 2, 3, 1),
        v_BSKH.transpose(0, 2, 1, 3),
    )
    scores_BKRS = masked(einsum("BKRH,BKHS->BKRS", q_BKRH, k_BKHS), mask_BTS)
    largest_BKR1 = jnp.max(scores_BKRS, axis=-1, keepdims=True)
    if sinks_N is not None:
        sinks_KR1 = sinks_of_rows(sinks_N, K, scores_BKRS.shape[2])[..., None].astype(scores_BKRS.dtype)
        largest_BKR1 = jnp.maximum(largest_BKR1, sinks_KR1)
    largest_BKR1 = jax.lax.stop_gradient(largest_BKR1)
    weights_BKRS = jnp.exp(scores_BKRS - largest_BKR1)
    total_BKR1 = jnp.sum(weights_BKRS, axis=-1, keepdims=True)
    if sinks_N is not None:
        total_BKR1 += jnp.exp(sinks_KR1 - largest_BKR1)
    weights_BKRS = apply_dropout(weights_BKRS, dropout, dropout_key).astype(v_BSKH.dtype)
    out_BKRH = einsum("BKRS,BKSH->BKRH", weights_BKRS, v_BKSH) / total_BKR1
    return ungroup_heads(out_BKRH, q_BTNH.shape[1]).astype(q_BTNH.dtype)


def reference_attention_weights(
    q_BTNH: jax.Array, k_BSKH: jax.Array, mask_BTS: jax.Array, *, sinks_N: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns the softmax of `reference_attention` for inspection: the attention weights, float32
    [B, N, T, S], and the probability of each head's sink, float32 [B, N, T], zero without sinks.

    For each query, they sum to 1.
    """
    B, T, N, _ = q_BTNH.shape
    q_BKRH, k_BKHS = group_heads(q_BTNH, k_BSKH.shape[2]), k_BSKH.transpose(0, 2, 3, 1)
    scores_BKRS = masked(einsum("BKRH,BKHS->BKRS", q_BKRH, k_BKHS), mask_BTS)
    scores_BNTS = scores_BKRS.reshape(B, N, T, -1)
    sinks_N = jnp.full(N, MASK_VALUE) if sinks_N is None else sinks_N.astype(scores_BNTS.dtype)
    sinks_BNT1 = jnp.broadcast_to(sinks_N[:, None, None], (B, N, T, 1))
    weights_BNTS = jax.nn.softmax(jnp.concatenate([scores_BNTS, sinks_BNT1], axis=-1), axis=-1)
    return weights_BNTS[..., :-1], weights_BNTS[..., -1]


def group_heads(q_BTNH: jax.Array, K: int) -> jax.Array:
    """Scales queries and groups them by key/value head: [B, K, R, H], each of the G heads' tokens in order.

    All einsums are then batched matmuls over [B, K]; XLA on CPU is slow for any other layout.
    """
    B, T, N, H = q_BTNH.shape
    q_BTKGH = (q_BTNH * jnp.asarray(H**-0.5, q_BTNH.dtype)).reshape(B, T, K, N // K, H)
    return q_BTKGH.transpose(0, 2, 3, 1, 4).reshape(B, K, N // K * T, H)


def ungroup_heads(out_BKRH: jax.Array, T: int) -> jax.Array:
    """Inverts the layout of `group_heads`; returns [B, T, N, H]."""
    B, K, R, H = out_BKRH.shape
    return out_BKRH.reshape(B, K, R // T, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, -1, H)


def sinks_of_rows(sinks_N: jax.Array, K: int, R: int) -> jax.Array:
    """Returns the sink of each row's head, [K, R]."""
    return jnp.repeat(sinks_N.reshape(K, -1), R * K // sinks_N.size, axis=1)


def masked(scores_BKRS: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """Sets the scores of masked keys to `MASK_VALUE`."""
    shape, (T, S) = scores_BKRS.shape, mask_BTS.shape[1:]
    scores_BKGTS = scores_BKRS.reshape(*shape[:2], -1, T, S)
    return jnp.where(mask_BTS[:, None, None], scores_BKGTS, MASK_VALUE).reshape(shape)


def apply_dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Applies inverted dropout, in the dtype of `x`; the identity if `key` is None or `rate` is 0."""
    if key is None or rate == 0:
        return x
    is_kept = jax.random.bernoulli(key, jnp.float32(1 - rate), x.shape)
    return jnp.where(is_kept, x / (1 - rate), 0).astype(x.dtype)


def einsum(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Einsum in full precision; accumulates in and returns float32 or wider."""
    result_type = jnp.promote_types(a.dtype, jnp.float32)
    return jnp.einsum(equation, a, b, precision="highest", preferred_element_type=result_type)
