"""Grouped-query attention over packed rows, with the fastest implementation for the backend."""

import jax
import jax.numpy as jnp

from gptoss_jax.kernels import backend, selection
from gptoss_jax.kernels.attention.blockwise import blockwise_attention
from gptoss_jax.kernels.attention.reference import AttentionSpec, attention_mask, reference_attention
from gptoss_jax.kernels.cpu import build
from gptoss_jax.kernels.cpu.attention import cpu_attention
from gptoss_jax.kernels.shapes import assert_shapes

# On CPU, rows of at most SHORT tokens are processed in chunks of CHUNK queries.
SHORT, CHUNK = 512, 64


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segment_ids_BS: jax.Array,
    positions_BS: jax.Array,
    spec: AttentionSpec,
    *,
    sinks_N: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
    offset: int | jax.Array | None = None,
) -> jax.Array:
    """Computes attention with the mask of `attention_mask`; differentiable in q, k, v and the sinks.

    Never materializes a [T, S] array; a sliding-window layer costs O(T * W). The implementations are
    equivalent:

    - TPU: splash attention. GPU: our Triton kernel, for head sizes up to 128 and at least the shared memory
      of an A100. CPU: our C++ kernel, for whole rows (no `offset`). None supports dropout, and
      only the Triton kernel sink tokens.
    - Otherwise: blockwise attention in plain XLA; on CPU, query-chunked attention for short rows.

    Args:
      q_BTNH, k_BSKH, v_BSKH: query head n uses key/value head n // G. The queries are tokens `offset`,
        `offset` + 1, … of the S tokens that have keys; by default, all of them.
      segment_ids_BS: documents count from 1, padding is 0; a negative id is for keys that no query sees. A
        segment must be contiguous in its row.
      positions_BS: must increase by one within a segment, and may start at any value.
      sinks_N: an additional logit in each head's softmax, without a value.
      dropout_key: enables dropout of the attention weights.
      offset: an int32 scalar, at most S - T; may be traced.

    Returns [B, T, N, H] in the dtype of `q_BTNH`. Raises AssertionError if shapes do not match.
    """
    inputs = q_BTNH, k_BSKH, v_BSKH, segment_ids_BS, positions_BS
    letters = "BTNH BTKH BTKH BT BT N" if offset is None else "BTNH BSKH BSKH BS BS N"
    sizes = assert_shapes(letters, *inputs, sinks_N)
    start = 0 if offset is None else offset
    dropout_key = dropout_key if spec.dropout > 0 else None
    # Imported lazily: Pallas backends are slow to import.
    if dropout_key is None and selection.is_enabled("attention"):
        if backend.platform() == "gpu" and fits_triton(sizes.H):
            from gptoss_jax.kernels.attention.pallas_triton import triton_attention

            return triton_attention(*inputs, spec, sinks_N=sinks_N, offset=start)
        if backend.platform() == "tpu" and spec.sink_tokens == 0:
            from gptoss_jax.kernels.attention.pallas_tpu import splash_attention

            return splash_attention(*inputs, spec, sinks_N=sinks_N, offset=start)
    is_whole = dropout_key is None and spec.sink_tokens == 0 and offset is None
    is_one_dtype = q_BTNH.dtype == k_BSKH.dtype == v_BSKH.dtype
    if is_whole and is_one_dtype and build.is_usable("attention", q_BTNH.dtype):
        return cpu_attention(q_BTNH, k_BSKH, v_BSKH, segment_ids_BS, spec, sinks_N=sinks_N)
    if backend.platform() == "cpu" and sizes.T <= SHORT and offset is None:
        return query_chunked_attention(*inputs, spec, sinks_N=sinks_N, dropout_key=dropout_key)
    return blockwise_attention(*inputs, spec, sinks_N=sinks_N, dropout_key=dropout_key, offset=start)


def fits_triton(head_size: int) -> bool:
    """Returns True if the blocks of our Triton kernel fit in shared memory: for head size 128, 32 KiB of q
    and three times 32 KiB of k and v."""
    memory = getattr(jax.devices()[0], "shared_memory_per_block_optin", None)
    return head_size <= 128 and (memory is None or memory >= 132 << 10)


def query_chunked_attention(
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
    """`attention` for short rows: applies the reference to a chunk of queries and the keys they can see.

    The backward pass reuses the attention weights; `blockwise_attention` recomputes them.
    """
    outs = []
    for start in range(0, q_BTNH.shape[1], CHUNK):
        # A segment's first tokens may be anywhere in the row.
        first = 0 if spec.window is None or spec.sink_tokens else max(0, start - spec.window + 1)
        queries, keys = slice(start, start + CHUNK), slice(first, start + CHUNK)
        of_queries, of_keys = ((segment_ids_BT[:, part], positions_BT[:, part]) for part in (queries, keys))
        mask_BTS = attention_mask(*of_queries, spec, *of_keys)
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, start)
        qkv = q_BTNH[:, queries], k_BTKH[:, keys], v_BTKH[:, keys]
        outs.append(
            reference_attention(*qkv, mask_BTS, sinks_N=sinks_N, dropout=spec.dropout, dropout_key=key)
        )
    return jnp.concatenate(outs, axis=1)
