"""From logits to tokens: greedy, temperature, top-k, top-p and min-p, as pure functions.

The order is temperature, top-k, top-p, min-p; each works on what the ones before have left. Of equal logits
the lower token id comes first everywhere, so that `top_k=1` is greedy decoding even where logits tie.

`temperature`, `top_k`, `top_p` and `min_p` may be numbers or arrays, one for all sequences or one for each
([B]), static or traced. A filter that is None and a temperature that is Python's 0 cost nothing: no sort, no
random numbers. Under jit, traced values recompile nothing; which filters are None does.
"""

import jax
import jax.numpy as jnp

Setting = float | int | jax.Array


def sequence_keys(seeds_B: jax.Array) -> jax.Array:
    """One random key for each sequence [B], from its own seed (uint32) alone."""
    return jax.vmap(jax.random.key)(seeds_B)


def step_keys(keys_B: jax.Array, step: jax.Array | int) -> jax.Array:
    """The keys with which the sequences draw their token number `step` (from 0)."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys_B, step)


def sample(
    logits_BV: jax.Array,
    keys_B: jax.Array,
    temperature: Setting = 0.0,
    top_k: Setting | None = None,
    top_p: Setting | None = None,
    min_p: Setting | None = None,
) -> jax.Array:
    """One token for each sequence, int32 [B].

    Args:
      logits_BV: float32.
      keys_B: one for each sequence, so that what it draws does not depend on the others. Greedy reads none.
      temperature: logits are divided by it; where it is 0 the likeliest token is taken.
      top_k: keeps the k likeliest tokens.
      top_p: keeps the smallest set of likeliest tokens whose probabilities add up to at least this
        (Holtzman et al. 2020).
      min_p: keeps the tokens at least this many times as likely as the likeliest (Nguyen et al. 2024).
    """
    greedy_B = jax.lax.argmax(logits_BV, 1, jnp.int32)
    if _is_zero(temperature):
        return greedy_B
    filtered_BV = _filter(logits_BV, temperature, top_k, top_p, min_p)
    drawn_B = jax.vmap(jax.random.categorical)(keys_B, filtered_BV).astype(jnp.int32)
    return jnp.where(jnp.asarray(temperature) == 0, greedy_B, drawn_B)


def filtered_log_probs(
    logits_BV: jax.Array,
    temperature: Setting = 1.0,
    top_k: Setting | None = None,
    top_p: Setting | None = None,
    min_p: Setting | None = None,
) -> jax.Array:
    """Log of the probability that `sample` draws each token with, float32 [B, V]; -inf stands for never."""
    V = logits_BV.shape[-1]
    greedy_BV = jnp.log(jax.nn.one_hot(jnp.argmax(logits_BV, axis=-1), V))
    if _is_zero(temperature):
        return greedy_BV
    drawn_BV = jax.nn.log_softmax(_filter(logits_BV, temperature, top_k, top_p, min_p), axis=-1)
    return jnp.where(_column(temperature) == 0, greedy_BV, drawn_BV)


def _is_zero(temperature: Setting) -> bool:
    return isinstance(temperature, (int, float)) and temperature == 0


def _column(setting: Setting, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """The setting as [1] or [B, 1], which broadcasts against [B, V]."""
    return jnp.asarray(setting, dtype)[..., None]


def _filter(logits_BV, temperature, top_k, top_p, min_p) -> jax.Array:
    """Logits over temperature, the largest 0, and -inf for what is cut away."""
    # The largest first becomes 0: no temperature, however small, can then make two infinities to subtract.
    logits_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)
    temperature = jnp.maximum(_column(temperature), jnp.finfo(jnp.float32).tiny)
    scaled_BV = logits_BV / temperature
    keep_BV = jnp.ones_like(logits_BV, dtype=bool)
    if top_k is not None or top_p is not None:
        token_BV = jax.lax.broadcasted_iota(jnp.int32, logits_BV.shape, 1)
        falling_BV, order_BV = jax.lax.sort((-logits_BV, token_BV), num_keys=1, is_stable=True)
        falling_BV = -falling_BV
        first_BV = jnp.ones_like(keep_BV)
        if top_k is not None:
            first_BV &= token_BV < _column(top_k, jnp.int32)
        if top_p is not None:
            share_BV = jax.nn.softmax(jnp.where(first_BV, falling_BV / temperature, -jnp.inf), axis=-1)
            before_BV = jnp.cumsum(share_BV, axis=-1) - share_BV
            # A sum of rounded shares may reach 1 before the last of them.
            first_BV &= (before_BV < _column(top_p)) | (_column(top_p) >= 1)
        # What is kept is a beginning of the sorted row, so its last element tells for every token whether it
        # is kept: no scatter over the vocabulary.
        last_B1 = jnp.maximum(jnp.sum(first_BV, axis=-1, keepdims=True, dtype=jnp.int32) - 1, 0)
        least_B1 = jnp.take_along_axis(falling_BV, last_B1, axis=-1)
        tie_B1 = jnp.take_along_axis(order_BV, last_B1, axis=-1)
        keep_BV &= (logits_BV > least_B1) | ((logits_BV == least_B1) & (token_BV <= tie_B1))
    if min_p is not None:
        keep_BV &= scaled_BV >= jnp.log(_column(min_p))
    return jnp.where(keep_BV, scaled_BV, -jnp.inf)
