"""Sampling from logits: bias, penalties and grammar mask, then temperature, top-k, top-p and min-p.

The steps apply in this order, each filter to the tokens that the earlier ones kept. Ties go to the lower
token id, so `top_k=1` equals greedy decoding even where logits tie. Log-probabilities are the model's own,
computed from the logits before any of these steps.

Sampling parameters are arrays with one row per sequence, so new values never recompile. A step that no
sequence in the batch uses is skipped at run time (`jax.lax.cond`): greedy decoding draws no random numbers. A
sequence that does not use a step gets the same bits whether or not others do.

Letters: B sequences, V vocabulary, J entries of logit_bias, U 32-bit words of a token mask, K top tokens.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.inference.sampling_params import MAX_LOGIT_BIAS, MAX_TOP_LOGPROBS, SamplingParams

# Disables top-k.
MAX_TOP_K = np.iinfo(np.int32).max
INFINITY_BITS = 0x7F800000

Array = jax.Array | np.ndarray  # on the devices, or on the host
T = TypeVar("T")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """The fields of `SamplingParams` that are used on the device, as arrays with one row per sequence."""

    temperature: Array  # float32 [B]
    top_k: Array  # int32 [B]
    top_p: Array  # float32 [B]
    min_p: Array  # float32 [B]
    presence_penalty: Array  # float32 [B]
    frequency_penalty: Array  # float32 [B]
    bias_token_BJ: Array  # int32, -1 where unused
    bias_BJ: Array  # float32

    @classmethod
    def of(cls, params: Sequence[SamplingParams | None]) -> Self:
        """Returns the settings as NumPy arrays. None stands for an empty row: greedy, without filters."""
        rows = [SamplingParams() if one is None else one for one in params]

        def column(name, dtype, neutral=0):
            values = [getattr(one, name) for one in rows]
            return np.array([neutral if value is None else value for value in values], dtype)

        bias_token_BJ = np.full((len(rows), MAX_LOGIT_BIAS), -1, np.int32)
        bias_BJ = np.zeros((len(rows), MAX_LOGIT_BIAS), np.float32)
        for b, one in enumerate(rows):
            for j, (token, bias) in enumerate(one.logit_bias):
                bias_token_BJ[b, j], bias_BJ[b, j] = token, bias
        return cls(
            temperature=column("temperature", np.float32),
            top_k=column("top_k", np.int32, MAX_TOP_K),
            top_p=column("top_p", np.float32, 1.0),
            min_p=column("min_p", np.float32),
            presence_penalty=column("presence_penalty", np.float32),
            frequency_penalty=column("frequency_penalty", np.float32),
            bias_token_BJ=bias_token_BJ,
            bias_BJ=bias_BJ,
        )

    def where(self, is_wanted_B: jax.Array) -> Self:
        """Returns the settings with the other rows reset to defaults, which skip all steps."""
        neutral = type(self).of([None])
        return jax.tree.map(
            lambda x, y: jnp.where(is_wanted_B.reshape(-1, *[1] * (x.ndim - 1)), x, y), self, neutral
        )


def sequence_keys(seed_B: Array) -> jax.Array:
    """Returns one random key per sequence, [B], from its seed (uint32)."""
    return jax.vmap(jax.random.key)(seed_B)


def step_keys(key_B: jax.Array, step: jax.Array | int) -> jax.Array:
    """Returns the keys, [B], for sampling token number `step` (from 0; an array [B] or one for all)."""
    return jax.vmap(jax.random.fold_in)(key_B, jnp.broadcast_to(step, key_B.shape))


def make_token_mask(tokens: Iterable[int], vocab_size: int) -> np.ndarray:
    """Returns a token mask, int32 [U]: bit t % 32 of word t // 32 is set if `tokens` contains t."""
    bits_U = np.zeros(num_mask_words(vocab_size), np.uint32)
    tokens = np.unique(np.fromiter(tokens, np.int64))
    np.bitwise_or.at(bits_U, tokens // 32, np.uint32(1) << (tokens % 32).astype(np.uint32))
    return bits_U.view(np.int32)


def num_mask_words(vocab_size: int) -> int:
    """Returns the number of 32-bit words in a token mask."""
    return -(-vocab_size // 32)


def is_in_token_mask(mask_BU: Array, token_B: jax.Array) -> jax.Array:
    """Returns bool [B]: True where a row's token mask contains its token."""
    word_B = jnp.take_along_axis(mask_BU, token_B[:, None] // 32, axis=1)[:, 0]
    return (word_B >> (token_B % 32)) & 1 == 1


def adjust_logits(
    logits_BV: jax.Array, settings: SamplingSettings, counts_BV: jax.Array, allowed_BU: jax.Array
) -> jax.Array:
    """Applies logit biases, presence and frequency penalties, and the grammar mask.

    Args:
      logits_BV: float32.
      settings: one row per sequence.
      counts_BV: int32, how often each token has been sampled; used only if a penalty is nonzero.
      allowed_BU: int32, token mask of the tokens that the grammar allows next; -1 allows all. The logits of
        other tokens become -inf.
    """
    V = logits_BV.shape[1]

    def add_bias(logits_BV):
        # V is out of range, so unused entries are dropped; -1 would index the last token.
        token_BJ = jnp.where(settings.bias_token_BJ < 0, V, settings.bias_token_BJ)
        return jax.vmap(lambda row, token, bias: row.at[token].add(bias, mode="drop"))(
            logits_BV, token_BJ, settings.bias_BJ
        )

    def subtract_penalties(logits_BV):
        presence_BV = settings.presence_penalty[:, None] * (counts_BV > 0)
        return logits_BV - presence_BV - settings.frequency_penalty[:, None] * counts_BV

    def mask(logits_BV):
        bits_BU32 = (allowed_BU[:, :, None] >> jnp.arange(32, dtype=jnp.int32)) & 1
        bits_BV = bits_BU32.reshape(len(bits_BU32), -1)[:, :V]
        return jnp.where(bits_BV == 1, logits_BV, -jnp.inf)

    has_penalty_B = (settings.presence_penalty != 0) | (settings.frequency_penalty != 0)
    logits_BV = _if_any(settings.bias_token_BJ >= 0, add_bias, logits_BV)
    logits_BV = _if_any(has_penalty_B, subtract_penalties, logits_BV)
    return _if_any(allowed_BU != -1, mask, logits_BV)


def sample(logits_BV: jax.Array, key_B: jax.Array, settings: SamplingSettings) -> jax.Array:
    """Samples one token per sequence, int32 [B].

    Args:
      logits_BV: float32, the result of `adjust_logits`.
      key_B: one per sequence, so that a sample does not depend on the rest of the batch. Unused if greedy.
      settings: temperature 0 is greedy; for the other fields see `filter_logits`.
    """

    def draw(greedy_B):
        filtered_BV = filter_logits(logits_BV, settings)
        # `jax.random.categorical`, but the barrier keeps `_argmax` from computing the noise twice.
        noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, logits_BV.shape[1:], jnp.float32))(key_B)
        sampled_B = _argmax(jax.lax.optimization_barrier(noise_BV + filtered_BV))
        return jnp.where(settings.temperature == 0, greedy_B, sampled_B)

    return _if_any(settings.temperature > 0, draw, _argmax(logits_BV))


def filter_logits(logits_BV: jax.Array, settings: SamplingSettings) -> jax.Array:
    """Returns logits divided by the temperature (above 0), shifted to a maximum of 0; -inf if filtered out.

    Settings used:
      temperature: divides the logits.
      top_k: keeps the k most likely tokens.
      top_p: keeps the smallest set of most likely tokens whose probabilities add up to at least this
        (Holtzman et al. 2020).
      min_p: keeps the tokens at least this many times as likely as the most likely one (Nguyen et al. 2024).
    """
    temperature_B1 = jnp.maximum(settings.temperature, jnp.finfo(jnp.float32).tiny)[:, None]
    # Subtract before dividing: a tiny temperature could otherwise give inf - inf.
    distance_BV = jnp.max(logits_BV, axis=1, keepdims=True) - logits_BV

    def keep_top_k(distance_BV):
        return _keep_nearest(distance_BV, jnp.ones_like(distance_BV), settings.top_k.astype(jnp.float32))

    def keep_top_p(distance_BV):
        weight_BV = jnp.exp(-distance_BV / temperature_B1)
        # 1 keeps every token: with rounding, the sum may reach the total before the last token.
        share_B = jnp.where(settings.top_p >= 1, jnp.inf, settings.top_p)
        return _keep_nearest(distance_BV, weight_BV, share_B * jnp.sum(weight_BV, axis=1))

    distance_BV = _if_any(settings.top_k < logits_BV.shape[1], keep_top_k, distance_BV)
    distance_BV = _if_any(settings.top_p < 1, keep_top_p, distance_BV)
    scaled_BV = -distance_BV / temperature_B1
    return jnp.where(scaled_BV >= jnp.log(settings.min_p)[:, None], scaled_BV, -jnp.inf)


def top_logprobs(logits_BV: jax.Array, is_wanted_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the K most likely tokens, int32 [B, K], and their log-probabilities, float32 [B, K].

    K is min(MAX_TOP_LOGPROBS, V). Sorted by probability, ties by token id. If no row is wanted, nothing is
    computed and the results are 0.
    """
    K = min(MAX_TOP_LOGPROBS, logits_BV.shape[1])
    B = len(logits_BV)

    def best(_):
        best_BK, token_BK = jax.lax.top_k(logits_BV, K)
        return token_BK, best_BK - jax.nn.logsumexp(logits_BV, axis=1, keepdims=True)

    return _if_any(is_wanted_B, best, (jnp.zeros((B, K), jnp.int32), jnp.zeros((B, K), jnp.float32)))


def token_logprobs(logits_BV: jax.Array, token_B: jax.Array) -> jax.Array:
    """Returns the log-probability of each row's token, float32 [B]."""
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=1)[:, 0]
    return chosen_B - jax.nn.logsumexp(logits_BV, axis=1)


def _if_any(is_wanted: Array, step: Callable[[T], T], x: T) -> T:
    """Returns `step(x)` if an element of `is_wanted` is True, else `x`."""
    return jax.lax.cond(jnp.any(is_wanted), step, lambda x: x, x)


def _argmax(x_BV: jax.Array) -> jax.Array:
    """`jax.lax.argmax` over the vocabulary, written as two reductions that vectorize on CPU."""
    V = x_BV.shape[1]
    token_BV = jax.lax.broadcasted_iota(jnp.int32, x_BV.shape, 1)
    is_max_BV = x_BV == jnp.max(x_BV, axis=1, keepdims=True)
    # A row with NaN has no maximum; it yields the last token.
    return jnp.min(jnp.where(is_max_BV, token_BV, V - 1), axis=1)


def _keep_nearest(distance_BV: jax.Array, weight_BV: jax.Array, goal_B: Array) -> jax.Array:
    """Keeps the nearest tokens until their weights add up to `goal_B`; of equals, the lower ids. Others: inf.

    Finds the distance of the last token to keep by bisection over its bits: nonnegative floats sort like
    their bit patterns. 31 reductions over the vocabulary cost far less than sorting it.

    Args:
      distance_BV: float32, at least 0, with a 0 in each row.
      weight_BV: float32, at least 0, equal for equal distances.
      goal_B: float32.
    """
    goal_B = jnp.maximum(goal_B, jnp.finfo(jnp.float32).tiny)  # keeps one token

    def from_bits(bits_B):
        return jax.lax.bitcast_convert_type(jnp.minimum(bits_B, INFINITY_BITS), jnp.float32)[:, None]

    def weight_below(bits_B):
        return jnp.sum(jnp.where(distance_BV < from_bits(bits_B), weight_BV, 0), axis=1)

    def set_bit(i, bits_B):
        larger_B = bits_B | (jnp.int32(1) << (30 - i))
        return jnp.where(weight_below(larger_B) < goal_B, larger_B, bits_B)

    bits_B = jax.lax.fori_loop(0, 31, set_bit, jnp.zeros(goal_B.shape, jnp.int32))
    last_B1 = from_bits(bits_B)
    is_last_BV = (distance_BV == last_B1) & jnp.isfinite(last_B1)
    count_B = jnp.sum(is_last_BV, axis=1, dtype=jnp.int32)
    weight_B = jnp.max(jnp.where(is_last_BV, weight_BV, 0), axis=1)
    left_B = goal_B - weight_below(bits_B)

    def keep_first(is_last_BV):
        before_BV = jnp.cumsum(is_last_BV, axis=1, dtype=jnp.int32) - 1
        return is_last_BV & (before_BV * weight_B[:, None] < left_B[:, None])

    is_last_BV = _if_any((count_B - 1) * weight_B >= left_B, keep_first, is_last_BV)
    return jnp.where((distance_BV < last_B1) | is_last_BV, distance_BV, jnp.inf)
