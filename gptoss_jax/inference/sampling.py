"""Logits to tokens: greedy, temperature, top-k, top-p and min-p, as pure functions.

They apply in the order temperature, top-k, top-p, min-p, each to what the earlier ones kept. Among equal
logits the lower token id comes first, so `top_k=1` is greedy decoding even where logits tie.

Every setting is a number or an array, one for all sequences or one for each ([B]), static or traced. A filter
that is None, or a temperature that is Python's 0, costs nothing: no sort, no random numbers. Under jit,
values of traced settings do not recompile; which filters are None does.
"""

import jax
import jax.numpy as jnp
import numpy as np

Setting = float | int | jax.Array

# Fields of `SamplingParams` that `sample` takes: the neutral value, for sequences without one, and the dtype.
SETTINGS = {
    "temperature": (0.0, np.float32),
    "top_k": (np.iinfo(np.int32).max, np.int32),
    "top_p": (1.0, np.float32),
    "min_p": (0.0, np.float32),
}


def sequence_keys(seed_B: jax.Array) -> jax.Array:
    """Returns random keys [B], each from its sequence's seed (uint32)."""
    return jax.vmap(jax.random.key)(seed_B)


def step_keys(key_B: jax.Array, step: jax.Array | int) -> jax.Array:
    """Returns the keys [B] with which the sequences draw token number `step` (from 0)."""
    return jax.vmap(jax.random.fold_in, (0, None))(key_B, step)


def sample(
    logits_BV: jax.Array,
    key_B: jax.Array,
    temperature: Setting = 0.0,
    top_k: Setting | None = None,
    top_p: Setting | None = None,
    min_p: Setting | None = None,
) -> jax.Array:
    """Draws one token for each sequence, int32 [B].

    Args:
      logits_BV: float32.
      key_B: one for each sequence, so that its draw does not depend on the others. Unused if greedy.
      temperature: divides the logits; 0 takes the most likely token.
      top_k, top_p, min_p: see `filter_logits`.
    """
    greedy_B = jax.lax.argmax(logits_BV, 1, jnp.int32)
    if isinstance(temperature, (int, float)) and temperature == 0:
        return greedy_B
    filtered_BV = filter_logits(logits_BV, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    sampled_B = jax.vmap(jax.random.categorical)(key_B, filtered_BV).astype(jnp.int32)
    return jnp.where(jnp.asarray(temperature) == 0, greedy_B, sampled_B)


def filter_logits(
    logits_BV: jax.Array,
    temperature: Setting = 1.0,
    top_k: Setting | None = None,
    top_p: Setting | None = None,
    min_p: Setting | None = None,
) -> jax.Array:
    """Returns logits divided by the temperature (above 0), with a maximum of 0; -inf for removed tokens.

    Args:
      logits_BV: float32.
      temperature: divides the logits.
      top_k: keeps the k most likely tokens.
      top_p: keeps the smallest set of most likely tokens whose probabilities add up to at least this
        (Holtzman et al. 2020).
      min_p: keeps the tokens at least this many times as likely as the most likely one (Nguyen et al. 2024).
    """
    # Shifted first: then no temperature, however small, can produce two infinities to subtract.
    logits_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)
    temperature = jnp.maximum(_column(temperature), jnp.finfo(jnp.float32).tiny)
    scaled_BV = logits_BV / temperature
    keep_BV = jnp.ones_like(logits_BV, dtype=bool)
    if top_k is not None or top_p is not None:
        token_BV = jax.lax.broadcasted_iota(jnp.int32, logits_BV.shape, 1)
        sorted_BV, order_BV = jax.lax.sort((-logits_BV, token_BV), num_keys=1, is_stable=True)
        sorted_BV = -sorted_BV
        kept_BV = jnp.ones_like(keep_BV)
        if top_k is not None:
            kept_BV &= token_BV < _column(top_k, jnp.int32)
        if top_p is not None:
            share_BV = jax.nn.softmax(jnp.where(kept_BV, sorted_BV / temperature, -jnp.inf), axis=-1)
            before_BV = jnp.cumsum(share_BV, axis=-1) - share_BV
            # A sum of rounded probabilities may reach 1 before the last one.
            kept_BV &= (before_BV < _column(top_p)) | (_column(top_p) >= 1)
        # A prefix of the sorted row is kept, so its last element decides for every token: no scatter over the
        # vocabulary.
        last_B1 = jnp.maximum(jnp.sum(kept_BV, axis=-1, keepdims=True, dtype=jnp.int32) - 1, 0)
        min_logit_B1 = jnp.take_along_axis(sorted_BV, last_B1, axis=-1)
        tie_B1 = jnp.take_along_axis(order_BV, last_B1, axis=-1)
        keep_BV &= (logits_BV > min_logit_B1) | ((logits_BV == min_logit_B1) & (token_BV <= tie_B1))
    if min_p is not None:
        keep_BV &= scaled_BV >= jnp.log(_column(min_p))
    return jnp.where(keep_BV, scaled_BV, -jnp.inf)


def _column(setting: Setting, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """Returns the setting as [1] or [B, 1], which broadcasts against [B, V]."""
    return jnp.asarray(setting, dtype)[..., None]
