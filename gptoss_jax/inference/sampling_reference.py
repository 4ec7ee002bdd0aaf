"""Top-k, top-p and min-p by sorting the vocabulary: the slow, plain reference of `sampling.filter_logits`."""

import jax
import jax.numpy as jnp

from gptoss_jax.inference.sampling import SamplingSettings


def filter_logits(logits_BV: jax.Array, settings: SamplingSettings) -> jax.Array:
    """Returns what `sampling.filter_logits` returns, but for the rounding of sums of probabilities."""
    logits_BV = logits_BV - jnp.max(logits_BV, axis=1, keepdims=True)
    scaled_BV = logits_BV / jnp.maximum(settings.temperature, jnp.finfo(jnp.float32).tiny)[:, None]
    token_BV = jax.lax.broadcasted_iota(jnp.int32, logits_BV.shape, 1)
    _, order_BV = jax.lax.sort((-logits_BV, token_BV), num_keys=1, is_stable=True)
    sorted_BV = jnp.take_along_axis(scaled_BV, order_BV, axis=1)
    kept_BV = token_BV < settings.top_k[:, None]
    share_BV = jax.nn.softmax(jnp.where(kept_BV, sorted_BV, -jnp.inf), axis=1)
    before_BV = jnp.cumsum(share_BV, axis=1) - share_BV
    # The first token stays, however small top_p is; all stay if it is 1, however the sum is rounded.
    top_p_B1 = settings.top_p[:, None]
    kept_BV &= (before_BV < top_p_B1) | (top_p_B1 >= 1) | (token_BV == 0)
    kept_BV &= sorted_BV >= jnp.log(settings.min_p)[:, None]
    rank_BV = jnp.argsort(order_BV, axis=1)
    return jnp.where(jnp.take_along_axis(kept_BV, rank_BV, axis=1), scaled_BV, -jnp.inf)
