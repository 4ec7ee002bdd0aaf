"""Top-k, top-p and min-p by sorting the vocabulary: the slow reference for `sampling.filter_logits`."""

import jax
import jax.numpy as jnp

from gptoss_jax.inference.sampling import SamplingSettings


def filter_logits(logits_BV: jax.Array, settings: SamplingSettings) -> jax.Array:
    """Same as `sampling.filter_logits`, up to rounding in sums of probabilities."""
    logits_BV = logits_BV - jnp.max(logits_BV, axis=1, keepdims=True)
    temperature_B1 = jnp.maximum(settings.temperature, jnp.finfo(jnp.float32).tiny)[:, None]
    scaled_BV = logits_BV / temperature_B1
    token_BV = jax.lax.broadcasted_iota(jnp.int32, logits_BV.shape, 1)
    sorted_BV, order_BV = jax.lax.sort((-logits_BV, token_BV), num_keys=1, is_stable=True)
    sorted_BV = -sorted_BV
    kept_BV = token_BV < settings.top_k[:, None]
    share_BV = jax.nn.softmax(jnp.where(kept_BV, sorted_BV / temperature_B1, -jnp.inf), axis=1)
    before_BV = jnp.cumsum(share_BV, axis=1) - share_BV
    # With rounding, the sum may reach 1 before the last token.
    kept_BV &= (before_BV < settings.top_p[:, None]) | (settings.top_p[:, None] >= 1)
    # A nonempty prefix of the sorted row is kept: comparing with its last token is enough.
    last_B1 = jnp.maximum(jnp.sum(kept_BV, axis=1, keepdims=True, dtype=jnp.int32) - 1, 0)
    min_logit_B1 = jnp.take_along_axis(sorted_BV, last_B1, axis=1)
    last_token_B1 = jnp.take_along_axis(order_BV, last_B1, axis=1)
    keep_BV = (logits_BV > min_logit_B1) | ((logits_BV == min_logit_B1) & (token_BV <= last_token_B1))
    keep_BV &= scaled_BV >= jnp.log(settings.min_p)[:, None]
    return jnp.where(keep_BV, scaled_BV, -jnp.inf)
