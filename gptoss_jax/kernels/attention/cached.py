"""Attention to a cache of keys and values: where a token's slot is, and what a piece of a sequence sees.

A cache has S slots for each sequence. The first `sink_tokens` tokens keep theirs; all others share a ring of
the rest, which a sequence that is shorter does not fill. A full layer has a slot for every token, so that its
ring never closes.

Letters: B sequences, T new tokens, S slots, N query heads, K key/value heads, G = N / K, H head size.
"""

import jax
import jax.numpy as jnp
from jax import lax

from gptoss_jax.kernels.attention.mask import MASKED
from gptoss_jax.kernels.cpu import decode
from gptoss_jax.kernels.layer_view import LayerView

# Slots that are looked at together: a piece's scores are as many numbers for each query and head.
BLOCK = 512


def slot_index(positions: jax.Array, slots: int, sink_tokens: int) -> jax.Array:
    """The slot of the token at each position."""
    ring = slots - sink_tokens
    return jnp.where(positions < slots, positions, sink_tokens + (positions - sink_tokens) % ring)


def slot_positions(lengths_B: jax.Array, slots: jax.Array, size: int, sink_tokens: int) -> jax.Array:
    """The position of the token in each slot after `lengths_B` tokens, [B, slots]; -1 where there is none.

    Args:
      slots: numbers of slots of a cache that has `size` of them.
    """
    last_B1 = lengths_B[:, None] - 1
    ring_BS = last_B1 - (last_B1 - slots) % (size - sink_tokens)
    ring_BS = jnp.where(ring_BS >= sink_tokens, ring_BS, -1)
    return jnp.where(slots < sink_tokens, jnp.where(slots <= last_B1, slots, -1), ring_BS)


def update_cache(
    keys: LayerView,
    values: LayerView,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    lengths_B,
    counts_B,
    sink_tokens: int,
) -> tuple[jax.Array, jax.Array]:
    """The stacks of keys and values with the first `counts_B` of T new tokens in their slots of one layer."""
    B, T = k_BTKH.shape[:2]
    slots = keys.shape[2]
    positions_BT = lengths_B[:, None] + jnp.arange(T, dtype=jnp.int32)
    # Of those that share a slot the last one counts.
    stays_BT = (positions_BT < sink_tokens) | (
        positions_BT >= (lengths_B + counts_B)[:, None] - (slots - sink_tokens)
    )
    is_new_BT = jnp.arange(T, dtype=jnp.int32) < counts_B[:, None]
    slots_BT = jnp.where(stays_BT & is_new_BT, slot_index(positions_BT, slots, sink_tokens), slots)
    rows_B1 = jnp.arange(B, dtype=jnp.int32)[:, None]

    def put(layer, new_BTKH):
        return layer.stack.at[layer.index, rows_B1, :, slots_BT].set(
            new_BTKH.astype(layer.dtype), mode="drop"
        )

    return put(keys, k_BTKH), put(values, v_BTKH)


def prefill_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    keys: LayerView,
    values: LayerView,
    lengths_B: jax.Array,
    counts_B: jax.Array,
    window: int | None,
    sink_tokens: int,
    sinks_N: jax.Array | None,
) -> jax.Array:
    """T new tokens of each sequence, the first `counts_B` of them real, over themselves and the `lengths_B`
    tokens before them, which are in the cache; the mask rule is that of `mask.visible`.

    Slots are looked at in blocks, as many as the longest sequence has filled, so memory does not grow with
    the cache. Returns [B, T, N, H]; softmax in float32.
    """
    B, T, N, H = q_BTNH.shape
    K, S = k_BTKH.shape[2], keys.shape[2]
    queries_BT = lengths_B[:, None] + jnp.arange(T, dtype=jnp.int32)
    sum_type = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    q = (q_BTNH * jnp.asarray(H**-0.5, q_BTNH.dtype)).reshape(B, T, K, N // K, H)
    q_BKRH = q.transpose(0, 2, 3, 1, 4).reshape(B, K, N // K * T, H)

    def block(carry, k_BKSH, v_BKSH, positions_BS):
        """Takes more keys into account, whose positions are -1 where there is none."""
        ahead_BTS = queries_BT[:, :, None] - positions_BS[:, None]
        mask_BTS = (ahead_BTS >= 0) & (positions_BS >= 0)[:, None]
        if window is not None:
            mask_BTS &= (ahead_BTS < window) | (positions_BS < sink_tokens)[:, None]
        k_BKSH, v_BKSH = k_BKSH.astype(q_BTNH.dtype), v_BKSH.astype(q_BTNH.dtype)
        scores = _product("bkrh,bksh->bkrs", q_BKRH, k_BKSH, sum_type)
        scores = jnp.where(mask_BTS[:, None, None], scores.reshape(B, K, N // K, T, -1), MASKED)
        largest, total, out = carry
        now = jnp.maximum(largest, jnp.max(scores, axis=-1))
        weights, before = jnp.exp(scores - now[..., None]), jnp.exp(largest - now)
        # What sees nothing in this block: exp(0) is not its weight.
        weights = jnp.where(mask_BTS[:, None, None], weights, 0)
        more = weights.astype(q_BTNH.dtype).reshape(B, K, N // K * T, -1)
        more = _product("bkrs,bksh->bkrh", more, v_BKSH, sum_type).reshape(out.shape)
        return now, total * before + jnp.sum(weights, axis=-1), out * before[..., None] + more

    shape = (B, K, N // K, T)
    carry = jnp.full(shape, MASKED, sum_type), jnp.zeros(shape, sum_type), jnp.zeros((*shape, H), sum_type)
    if sinks_N is not None:
        sinks = jnp.broadcast_to(sinks_N.astype(sum_type).reshape(K, N // K, 1), shape)
        carry = sinks, jnp.ones(shape, sum_type), carry[2]

    size = min(BLOCK, S)
    blocks = -(-jnp.minimum(jnp.max(lengths_B), S) // size)

    def cached(i, carry):
        # The last block may begin earlier, so that it ends with the slots; what was seen is left out.
        start, zero = jnp.minimum(i * size, S - size), jnp.int32(0)
        slots = start + jnp.arange(size, dtype=jnp.int32)
        positions_BS = slot_positions(lengths_B, slots, S, sink_tokens)
        positions_BS = jnp.where(slots >= i * size, positions_BS, -1)
        parts = (
            lax.dynamic_slice(p.stack, (p.index, zero, zero, start, zero), (1, B, K, size, H))
            for p in (keys, values)
        )
        return block(carry, *(part[0] for part in parts), positions_BS)

    carry = lax.fori_loop(0, blocks, cached, carry)
    new_BT = jnp.where(jnp.arange(T, dtype=jnp.int32) < counts_B[:, None], queries_BT, -1)
    _, total, out = block(carry, k_BTKH.transpose(0, 2, 1, 3), v_BTKH.transpose(0, 2, 1, 3), new_BT)
    # A query that sees nothing is padding: zeros.
    out = out / jnp.where(total > 0, total, 1)[..., None]
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H).astype(q_BTNH.dtype)


def decode_attention(
    q_BTNH: jax.Array, keys: LayerView, values: LayerView, counts_B: jax.Array, sinks_N: jax.Array | None
) -> jax.Array:
    """One new token of each sequence, T = 1, over the first `counts_B` slots, which hold all that it sees,
    itself included; a count of 0 gives zeros."""
    B, _, N, H = q_BTNH.shape
    K, S = keys.shape[1:3]
    if decode.is_supported("decode_attention", B, q_BTNH.dtype) and keys.dtype == jnp.float32:
        return decode.attention(q_BTNH[:, 0], keys, values, counts_B, sinks_N)[:, None]
    sum_type = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    q_BKGH = (q_BTNH * jnp.asarray(H**-0.5, q_BTNH.dtype)).reshape(B, K, N // K, H)
    k_BKSH, v_BKSH = (part.read().astype(q_BTNH.dtype) for part in (keys, values))
    scores = _product("bkgh,bksh->bkgs", q_BKGH, k_BKSH, sum_type)
    mask_BS = jnp.arange(S, dtype=jnp.int32) < counts_B[:, None]
    scores = jnp.where(mask_BS[:, None, None], scores, MASKED)
    largest = jnp.max(scores, axis=-1, keepdims=True)
    sinks = None if sinks_N is None else sinks_N.astype(sum_type).reshape(1, K, N // K, 1)
    if sinks is not None:
        largest = jnp.maximum(largest, sinks)
    weights = jnp.where(mask_BS[:, None, None], jnp.exp(scores - largest), 0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sinks - largest)
    out = _product("bkgs,bksh->bkgh", weights.astype(q_BTNH.dtype), v_BKSH, sum_type)
    out = out / jnp.where(total > 0, total, 1)
    return out.reshape(B, 1, N, H).astype(q_BTNH.dtype)


def _product(equation: str, a: jax.Array, b: jax.Array, result_type: jnp.dtype) -> jax.Array:
    return jnp.einsum(equation, a, b, precision="highest", preferred_element_type=result_type)
