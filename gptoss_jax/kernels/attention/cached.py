"""Attention with a KV cache, for several new tokens (prefill) or one (decode).

A cache has S slots per sequence. The first `sink_tokens` tokens have fixed slots; the remaining slots are a
ring buffer for all other tokens. A full-attention layer has a slot for every token, so its ring never wraps
around.

Letters: B sequences, T queries, C new tokens, S slots, N query heads, K key/value heads, H head size,
R = T N / K rows. Queries are the new tokens unless their positions are given.
"""

import dataclasses
import functools
from typing import Self

import jax
import jax.numpy as jnp
from jax import lax

from gptoss_jax.kernels import backend
from gptoss_jax.kernels.attention.blockwise import init_softmax, update_softmax
from gptoss_jax.kernels.attention.reference import (
    AttentionSpec,
    einsum,
    group_heads,
    in_window_or_sink,
    masked,
    reference_attention,
    ungroup_heads,
)
from gptoss_jax.kernels.cpu import decode
from gptoss_jax.kernels.layer_view import LayerView
from gptoss_jax.kernels.shapes import assert_shapes

BLOCK = 512  # slots per block of scores


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCacheView:
    """One layer of the cache, and the lengths of its sequences."""

    keys: LayerView  # [B, K, slots, H]
    values: LayerView
    lengths_B: jax.Array  # int32, number of tokens before this call
    counts_B: jax.Array  # int32, number of new tokens in each row; the rest is padding

    @classmethod
    def of(
        cls, stacks: dict[str, jax.Array], index: jax.Array | int, lengths_B: jax.Array, counts_B: jax.Array
    ) -> Self:
        """Returns a view of layer `index` of stacked `keys` and `values`."""
        return cls(LayerView(stacks["keys"], index), LayerView(stacks["values"], index), lengths_B, counts_B)

    @property
    def stacks(self) -> dict[str, jax.Array]:
        return {"keys": self.keys.stack, "values": self.values.stack}


def slot_index(positions: jax.Array, slots: int, sink_tokens: int) -> jax.Array:
    """Maps each position to its slot in a cache with `slots` slots."""
    ring = slots - sink_tokens
    return jnp.where(positions < slots, positions, sink_tokens + (positions - sink_tokens) % ring)


def slot_positions(lengths_B: jax.Array, index_S: jax.Array, slots: int, sink_tokens: int) -> jax.Array:
    """Maps each slot to its token's position after `lengths_B` tokens, [B, S]; -1 if it is empty."""
    last_B1 = lengths_B[:, None] - 1
    ring_BS = last_B1 - (last_B1 - index_S) % (slots - sink_tokens)
    ring_BS = jnp.where(ring_BS >= sink_tokens, ring_BS, -1)
    return jnp.where(index_S < sink_tokens, jnp.where(index_S <= last_B1, index_S, -1), ring_BS)


def update_cache(
    cache: LayerCacheView, k_BTKH: jax.Array, v_BTKH: jax.Array, spec: AttentionSpec
) -> LayerCacheView:
    """Writes the first `counts_B` of T new tokens to their slots. Does not advance `lengths_B`:
    `Transformer.hidden_states` does, once for all layers."""
    sizes = assert_shapes(
        "BKSH BKSH BTKH BTKH B B", cache.keys, cache.values, k_BTKH, v_BTKH, cache.lengths_B, cache.counts_B
    )
    new_T = jnp.arange(sizes.T, dtype=jnp.int32)
    positions_BT = cache.lengths_B[:, None] + new_T
    # If there are more new tokens than ring slots, only the last ones are written.
    ring_start_B = cache.lengths_B + cache.counts_B - (sizes.S - spec.sink_tokens)
    is_written_BT = (positions_BT < spec.sink_tokens) | (positions_BT >= ring_start_B[:, None])
    slots_BT = slot_index(positions_BT, sizes.S, spec.sink_tokens)
    slots_BT = jnp.where(is_written_BT & (new_T < cache.counts_B[:, None]), slots_BT, sizes.S)
    rows_B1 = jnp.arange(sizes.B, dtype=jnp.int32)[:, None]

    def update(layer, new_BTKH):
        at = layer.stack.at[layer.index, rows_B1, :, slots_BT]
        return LayerView(at.set(new_BTKH.astype(layer.dtype), mode="drop"), layer.index)

    keys, values = update(cache.keys, k_BTKH), update(cache.values, v_BTKH)
    return dataclasses.replace(cache, keys=keys, values=values)


def prefill_attention(
    q_BTNH: jax.Array,
    k_BCKH: jax.Array,
    v_BCKH: jax.Array,
    cache: LayerCacheView,
    spec: AttentionSpec,
    *,
    sinks_N: jax.Array | None = None,
    positions_BT: jax.Array | None = None,
) -> jax.Array:
    """Attention of T new tokens per sequence to each other and to the earlier tokens in the cache.

    Slots are read in blocks, up to the length of the longest sequence, so memory does not grow with the
    cache. Returns [B, T, N, H]; softmax in float32. Outputs at padding are meaningless but finite.

    Args:
      cache: before `update_cache`, which may overwrite ring slots that the first new tokens still attend to.
      positions_BT: the position of each query, if the queries are only some of the new tokens.
    """
    B = q_BTNH.shape[0]
    if positions_BT is None:
        positions_BT = cache.lengths_B[:, None] + jnp.arange(q_BTNH.shape[1], dtype=jnp.int32)
    rows = q_BTNH, k_BCKH, v_BCKH, positions_BT, (cache.lengths_B, cache.counts_B)
    attend = functools.partial(_attend_rows, cache=cache, spec=spec, sinks_N=sinks_N)
    if B == 1 or backend.platform() != "cpu" or backend.is_multi_device():
        return attend(jnp.int32(0), *rows)
    # XLA's rounding on CPU depends on the number of rows: compute one at a time to make them independent.
    one_row = jax.tree.map(lambda x: x[:, None], (jnp.arange(B, dtype=jnp.int32), *rows))
    return lax.map(lambda row: attend(row[0][0], *row[1:]), one_row)[:, 0]


def _attend_rows(
    first_row: jax.Array,
    q_BTNH: jax.Array,
    k_BCKH: jax.Array,
    v_BCKH: jax.Array,
    positions_BT: jax.Array,
    lengths_and_counts: tuple[jax.Array, jax.Array],
    *,
    cache: LayerCacheView,
    spec: AttentionSpec,
    sinks_N: jax.Array | None,
) -> jax.Array:
    """`prefill_attention` for B sequences of the cache, starting at `first_row`, with their lengths and
    counts of new tokens."""
    lengths_B, counts_B = lengths_and_counts
    inputs = q_BTNH, k_BCKH, v_BCKH, positions_BT, sinks_N, lengths_B, counts_B
    sizes = assert_shapes("BTNH BCKH BCKH BT N B B", *inputs)
    S = cache.keys.shape[2]
    q_BKRH = group_heads(q_BTNH, sizes.K)

    def update(state, k_BKSH, v_BKSH, positions_BS):
        """Updates the state with a block of keys; a position of -1 means no key."""
        distance_BTS = positions_BT[:, :, None] - positions_BS[:, None]
        is_key_BTS = (distance_BTS >= 0) & (positions_BS >= 0)[:, None]
        mask_BTS = is_key_BTS & in_window_or_sink(distance_BTS, positions_BS[:, None], spec)
        scores_BKRS = einsum("BKRH,BKSH->BKRS", q_BKRH, k_BKSH.astype(q_BKRH.dtype))
        return update_softmax(state, masked(scores_BKRS, mask_BTS), v_BKSH.astype(q_BKRH.dtype))

    block = min(BLOCK, S)
    blocks = -(-jnp.minimum(jnp.max(lengths_B), S) // block)

    def update_from_cache(i, state):
        # The last block may overlap the previous one, to end at the last slot; slots already seen are masked.
        start, zero = jnp.minimum(i * block, S - block), jnp.int32(0)
        index_S = start + jnp.arange(block, dtype=jnp.int32)
        positions_BS = slot_positions(lengths_B, index_S, S, spec.sink_tokens)
        k_BKSH, v_BKSH = (
            lax.dynamic_slice(
                x.stack, (x.index, first_row, zero, start, zero), (1, sizes.B, sizes.K, block, sizes.H)
            )[0]
            for x in (cache.keys, cache.values)
        )
        return update(state, k_BKSH, v_BKSH, jnp.where(index_S >= i * block, positions_BS, -1))

    state = lax.fori_loop(0, blocks, update_from_cache, init_softmax(q_BKRH, sinks_N))
    new_C = jnp.arange(sizes.C, dtype=jnp.int32)
    positions_BC = jnp.where(new_C < counts_B[:, None], lengths_B[:, None] + new_C, -1)
    state = update(state, k_BCKH.transpose(0, 2, 1, 3), v_BCKH.transpose(0, 2, 1, 3), positions_BC)
    out_BKRH = state.out_BKRH / state.total_BKR[..., None]
    return ungroup_heads(out_BKRH, sizes.T).astype(q_BTNH.dtype)


def decode_attention(
    q_BTNH: jax.Array, cache: LayerCacheView, *, sinks_N: jax.Array | None = None
) -> jax.Array:
    """Attention of one new token per sequence (T = 1) to the cache, which already includes it.

    The size of a ring equals the window, so all filled slots are visible and no window mask is needed.
    Returns [B, 1, N, H], zeros for padding.
    """
    sizes = assert_shapes("B1NH BKSH BKSH N", q_BTNH, cache.keys, cache.values, sinks_N)
    seen_B = jnp.where(cache.counts_B > 0, jnp.minimum(cache.lengths_B + 1, sizes.S), 0)
    if decode.is_supported("decode_attention", sizes.B, q_BTNH.dtype, cache.keys.dtype):
        return decode.attention(q_BTNH[:, 0], cache.keys, cache.values, seen_B, sinks_N)[:, None]
    k_BSKH, v_BSKH = (x.read().astype(q_BTNH.dtype).transpose(0, 2, 1, 3) for x in (cache.keys, cache.values))
    mask_BTS = (jnp.arange(sizes.S, dtype=jnp.int32) < seen_B[:, None])[:, None]
    out_BTNH = reference_attention(q_BTNH, k_BSKH, v_BSKH, mask_BTS, sinks_N=sinks_N)
    return jnp.where((seen_B > 0)[:, None, None, None], out_BTNH, 0)
