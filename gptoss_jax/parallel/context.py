"""Context parallelism: the context axis of the mesh splits the tokens of each sequence.

With n devices along the axis, `split_sequences` cuts each sequence of T tokens into 2 n chunks, and gives
chunks i and 2 n - 1 - i to device i (zig-zag). In causal attention, an early chunk sees few keys and a late
one many; every such pair sees the same number. The model then runs on n rows of T / n tokens for each
sequence, which the context axis splits like the other batch axes split theirs, because everything except
attention treats each token by itself.

In attention, queries stay on their device. A full-attention layer all-gathers keys and values. A
sliding-window layer needs only the W - 1 keys before each chunk, its halo, from the device with the previous
chunk. The transposes of both (a reduce-scatter, and the opposite exchange) sum the gradients of keys and
values.

Letters: B rows of one device, T tokens of a row, C = T / 2 tokens per chunk, S keys.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from gptoss_jax.config import require
from gptoss_jax.kernels.attention.api import AttentionSpec, attention
from gptoss_jax.kernels.attention.cached import LayerCacheView, prefill_attention
from gptoss_jax.kernels.layer_view import LayerView
from gptoss_jax.parallel.mesh import SEQUENCES, batch_shards, current_axes, sequence_shards
from gptoss_jax.parallel.rules import HEADS_BTNH, ROWS, SEQUENCES_LBKSH, compute_spec

Result = TypeVar("Result")


class _Keys(NamedTuple):
    """Keys and values, and the segment and position of each key."""

    k_BSKH: jax.Array
    v_BSKH: jax.Array
    segment_ids_BS: jax.Array
    positions_BS: jax.Array


def context_size() -> int:
    """Returns the size of the context axis of the current mesh; 1 without a mesh."""
    return current_axes().get("context", 1)


def check_length(length: int, n: int, name: str = "data.seq_len") -> None:
    """Raises ValueError if a context axis of n devices cannot split sequences of this length."""
    allowed = f"must be a multiple of {2 * n}, twice mesh.context ({n})"
    require(n == 1 or length % (2 * n) == 0, name, length, allowed)


def pad_sequences(sequences: Any) -> Any:
    """Pads each sequence with zeros to a length that the context axis can split, in every array of a tree."""
    n = context_size()
    padding = -jax.tree.leaves(sequences)[0].shape[1] % (2 * n) if n > 1 else 0
    return jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (0, padding), *[(0, 0)] * (x.ndim - 2)]), sequences)


def split_sequences(sequences: Any) -> Any:
    """Splits each sequence over the context axis: [B, T, ...] -> [B n, T / n, ...], every array of a tree.

    No data is sent: each device takes its two chunks of the sequences that it has. Without a context axis,
    returns its input. Raises ValueError if the axis cannot split T, or the other axes B.
    """
    n = context_size()
    if n == 1:
        return sequences
    batch, length = jax.tree.leaves(sequences)[0].shape[:2]
    shards = sequence_shards(current_axes())
    allowed = f"must be a multiple of {shards} (devices that split it)"
    require(batch % shards == 0, "batch size", batch, allowed)
    check_length(length, n, "sequence length")

    def take_chunks(x):
        chunks = x.reshape(x.shape[0], 2 * n, -1, *x.shape[2:])
        device = lax.axis_index("context")
        pair = (lax.dynamic_index_in_dim(chunks, j, 1, keepdims=False) for j in (device, 2 * n - 1 - device))
        return jnp.concatenate([*pair], axis=1)

    return jax.shard_map(
        lambda tree: jax.tree.map(take_chunks, tree),
        in_specs=P(SEQUENCES), out_specs=ROWS, check_vma=False,
    )(sequences)  # fmt: skip


def join_sequences(rows: Any) -> Any:
    """Inverts `split_sequences`: all-gathers every array of a tree over the context axis."""
    if context_size() == 1:
        return rows
    return jax.shard_map(
        lambda tree: jax.tree.map(_gather_tokens, tree),
        in_specs=ROWS, out_specs=P(SEQUENCES), check_vma=False,
    )(rows)  # fmt: skip


def map_sequences(function: Callable[[Any], Result], sequences: Any) -> Result:
    """Applies `function` to sequences that are split over the context axis, and joins its results.

    Args:
      function: maps a tree of arrays [B, T, ...] to another one, token by token except for attention.
      sequences: the tree. Padded with zeros if the context axis does not divide T.
    """
    if context_size() == 1:
        return function(sequences)
    T = jax.tree.leaves(sequences)[0].shape[1]
    rows = split_sequences(pad_sequences(sequences))
    return jax.tree.map(lambda x: x[:, :T], join_sequences(function(rows)))


def context_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    positions_BT: jax.Array,
    spec: AttentionSpec,
    *,
    sinks_N: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Inside `shard_map`: attention to all tokens of the sequence, of which this device has two chunks.

    The arguments and the result are those of `kernels.attention.api.attention`, which this is without a
    context axis. Layers with sink tokens, or a window longer than a chunk, gather all keys.
    """
    keys = _Keys(k_BTKH, v_BTKH, segment_ids_BT, positions_BT)
    n, C = context_size(), q_BTNH.shape[1] // 2
    if n == 1:
        return attention(q_BTNH, *keys, spec, sinks_N=sinks_N, dropout_key=dropout_key)
    pairs: tuple[tuple[_Keys, int | jax.Array], ...]
    if spec.window is not None and 1 < spec.window <= C + 1 and not spec.sink_tokens:
        pairs = tuple((chunk, spec.window - 1) for chunk in _with_halos(keys, spec.window - 1))
    else:
        gathered, device = jax.tree.map(_gather_tokens, keys), lax.axis_index("context")
        pairs = (gathered, device * C), (gathered, (2 * n - 1 - device) * C)
    outs = []
    for index, (chunk_keys, offset) in enumerate(pairs):
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
        queries = q_BTNH[:, index * C : (index + 1) * C]
        outs.append(attention(queries, *chunk_keys, spec, sinks_N=sinks_N, dropout_key=key, offset=offset))
    return jnp.concatenate(outs, axis=1)


def splits_prefill(length: int) -> bool:
    """Returns True if the context axis splits a prefill of `length` tokens per sequence; otherwise, as in
    decoding, it splits the batch."""
    n = context_size()
    return n > 1 and length % (2 * n) == 0


def prefill_shards(length: int) -> int:
    """Returns the number of shards of the sequences in a prefill of `length` tokens each."""
    return (sequence_shards if splits_prefill(length) else batch_shards)(current_axes())


def context_prefill_attention(
    heads: tuple[jax.Array, jax.Array, jax.Array],
    positions_BT: jax.Array,
    cache: LayerCacheView,
    spec: AttentionSpec,
    sinks_N: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`prefill_attention` of rows that `split_sequences` has split to a cache of whole sequences.

    Args:
      heads: queries [B n, T / n, N, H], and keys and values [B n, T / n, K, H], of new tokens.
      positions_BT: of the queries, [B n, T / n].
      cache: before `update_cache`, for B sequences.

    Returns the output for the queries, and keys and values of whole sequences, [B, T, K, H].
    """

    def one_device(heads, positions_BT, cache, sinks_N):
        q_BTNH, *keys = heads
        k_BSKH, v_BSKH = map(_gather_tokens, keys)
        out_BTNH = prefill_attention(
            q_BTNH, k_BSKH, v_BSKH, cache, spec, sinks_N=sinks_N, positions_BT=positions_BT
        )
        return out_BTNH, k_BSKH, v_BSKH

    stack = LayerView(SEQUENCES_LBKSH, P())  # type: ignore[arg-type]
    cache_specs = LayerCacheView(stack, stack, P(SEQUENCES), P(SEQUENCES))  # type: ignore[arg-type]
    whole = P(SEQUENCES, *HEADS_BTNH[1:])
    return jax.shard_map(
        one_device,
        in_specs=(HEADS_BTNH, ROWS, cache_specs, compute_spec("N")),
        out_specs=(HEADS_BTNH, whole, whole),
        check_vma=False,
    )(heads, positions_BT, cache, sinks_N)


def _gather_tokens(x: jax.Array) -> jax.Array:
    """Inside `shard_map`: all-gathers the chunks of each sequence, in order."""
    B, T, *rest = x.shape
    x_nBCC = lax.all_gather(x.reshape(B, 2, T // 2, *rest), "context")
    # Device i has chunks i and 2 n - 1 - i.
    chunks = jnp.concatenate([x_nBCC[:, :, 0], x_nBCC[::-1, :, 1]])
    return jnp.moveaxis(chunks, 0, 1).reshape(B, -1, *rest)


def _with_halos(keys: _Keys, halo: int) -> tuple[_Keys, _Keys]:
    """Inside `shard_map`: returns the keys of each of the two chunks, after the last `halo` keys of the chunk
    before it."""
    n, device = context_size(), lax.axis_index("context")
    C = keys.k_BSKH.shape[1] // 2
    early, late = jax.tree.map(lambda x: x[:, :C], keys), jax.tree.map(lambda x: x[:, C:], keys)
    early_tail, late_tail = (jax.tree.map(lambda x: x[:, C - halo :], chunk) for chunk in (early, late))
    # Early chunks ascend with the device, late ones descend. The late chunk of the last device follows its
    # early one. Nothing precedes the early chunk of device 0.
    ascending, descending = [(i, i + 1) for i in range(n - 1)], [(i + 1, i) for i in range(n - 1)]
    before_early = jax.tree.map(lambda x: lax.ppermute(x, "context", ascending), early_tail)
    before_early = before_early._replace(
        segment_ids_BS=jnp.where(device == 0, -1, before_early.segment_ids_BS)
    )
    before_late = jax.tree.map(
        lambda x, own: jnp.where(device == n - 1, own, lax.ppermute(x, "context", descending)),
        late_tail,
        early_tail,
    )

    def join(a, b):
        return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), a, b)

    return join(before_early, early), join(before_late, late)
