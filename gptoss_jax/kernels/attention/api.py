"""Grouped-query attention with a mask rule and learned sinks: the plain reference, and the choice of the form
that a program is compiled with.

Letters: B batch, T queries, S keys, N query heads, K key/value heads, G = N / K, H head size.
"""

import jax
import jax.numpy as jnp

from gptoss_jax.kernels import backend, selection
from gptoss_jax.kernels.attention.blockwise import blockwise_attention
from gptoss_jax.kernels.attention.mask import MASKED, visible

# Rows of so many tokens at most are worked through in whole strips of keys on CPU.
SHORT = 512


def flash_attention(
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
    """Attention of rows to themselves by the mask rule (`mask.visible`), differentiable in q, k, v and the
    sinks.

    Positions must rise by one from token to token of a segment, and a segment must be one piece of its row.
    Nothing here has T x T numbers, and a sliding layer costs O(T * W). What is chosen, all of one function:

    - TPU: splash attention; GPU: our Triton kernel, for heads of up to 128 and cards with the shared memory
      of an A100 or more. Neither does dropout, nor splash attention sink tokens; it reads no positions.
    - Everywhere else: blocks in plain XLA; on CPU, short rows in strips.

    Args:
      q_BTNH, k_BTKH, v_BTKH: query head n uses key/value head n // G.
      window: keys that a query sees, its own included; None for all before it.
      sink_tokens: the first tokens of a segment, which stay visible.
      sinks_N: one more logit in each head's softmax, without a value.
      dropout_key: turns dropout of the attention weights on.

    Returns:
      [B, T, N, H] in the type of `q_BTNH`.
    """
    inputs = (q_BTNH, k_BTKH, v_BTKH, positions_BT, segment_ids_BT, window, sink_tokens, sinks_N)
    platform = backend.platform()
    drops = dropout_key is not None and dropout > 0
    has_kernel = not drops and selection.is_enabled("attention")
    # Imported lazily: Pallas backends are slow to import.
    if platform == "gpu" and has_kernel and fits_triton(q_BTNH.shape[3]):
        from gptoss_jax.kernels.attention.pallas_triton import triton_attention

        return triton_attention(*inputs)
    if platform == "tpu" and has_kernel and (window is None or sink_tokens == 0):
        from gptoss_jax.kernels.attention.pallas_tpu import splash_attention

        return splash_attention(*inputs)
    if platform == "cpu" and q_BTNH.shape[1] <= SHORT:
        return strip_attention(*inputs, dropout, dropout_key)
    return blockwise_attention(*inputs, dropout, dropout_key)


def fits_triton(head_size: int) -> bool:
    """Whether the blocks of our Triton kernel fit the GPU's shared memory, 129 KiB for heads of 128."""
    memory = getattr(jax.devices()[0], "shared_memory_per_block_optin", None)
    return head_size <= 128 and (memory is None or memory >= 132 << 10)


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
        kept = jax.random.bernoulli(dropout_key, jnp.float32(1 - dropout), weights.shape)
        weights = jnp.where(kept, weights / (1 - dropout), 0)
    out = jnp.matmul(
        weights.astype(v_BSKH.dtype).reshape(B, K, G * T, S),
        v_BKSH,
        precision="highest",
        preferred_element_type=sum_type,
    )
    out = out.reshape(B, K, G, T, H) / total
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H).astype(q_BTNH.dtype)


def strip_attention(
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
    """The same for short rows: the reference, a few queries at a time with the keys that they may see.

    The gradient keeps the weights, where `blockwise_attention` computes them twice.
    """
    T, block = q_BTNH.shape[1], 64
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
