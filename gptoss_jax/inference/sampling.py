"""Logits to tokens, as pure functions: bias, penalties and masks, then temperature, top-k, top-p and min-p.

They apply in this order, each filter to what the earlier ones kept. Among equal logits the lower token id
comes first, so `top_k=1` is greedy decoding even where logits tie. Log-probabilities are the model's own,
those of the logits before all of this.

The settings of all sequences are arrays, one row each, so values never recompile. A step that no sequence
of the batch asks for is skipped at run time (`jax.lax.cond`): greedy decoding draws no random numbers. A
sequence with neutral settings has the same bits whether others ask for a step or not.

Letters: B sequences, V vocabulary, J entries of logit_bias, U 32-bit words of a token mask, K best tokens.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.inference.sampling_params import MAX_LOGIT_BIAS, MAX_TOP_LOGPROBS, SamplingParams

# Keeps every token.
MAX_TOP_K = np.iinfo(np.int32).max
INFINITY_BITS = 0x7F800000

Array = jax.Array | np.ndarray  # on the devices, or on the host
T = TypeVar("T")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """The fields of `SamplingParams` that decoding needs, as arrays with one row for each sequence."""

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
        """Returns the settings as NumPy arrays. None is a row without a sequence: greedy, without filters."""
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
        """Returns the settings with neutral ones, which cost nothing, in the other rows."""
        neutral = type(self).of([None])
        return jax.tree.map(
            lambda x, y: jnp.where(is_wanted_B.reshape(-1, *[1] * (x.ndim - 1)), x, y), self, neutral
        )


def sequence_keys(seed_B: Array) -> jax.Array:
    """Returns random keys [B], each from its sequence's seed (uint32)."""
    return jax.vmap(jax.random.key)(seed_B)


def step_keys(key_B: jax.Array, step: jax.Array | int) -> jax.Array:
    """Returns the keys [B] with which the sequences draw token number `step` (from 0), [B] or one for all."""
    return jax.vmap(jax.random.fold_in)(key_B, jnp.broadcast_to(step, key_B.shape))


def token_bits(tokens: Iterable[int], vocab_size: int) -> np.ndarray:
    """Returns a token mask, int32 [U]: bit t % 32 of word t // 32 is set if `tokens` holds t."""
    bits_U = np.zeros(num_words(vocab_size), np.uint32)
    tokens = np.unique(np.fromiter(tokens, np.int64))
    np.bitwise_or.at(bits_U, tokens // 32, np.uint32(1) << (tokens % 32).astype(np.uint32))
    return bits_U.view(np.int32)


def num_words(vocab_size: int) -> int:
    """Returns the number of 32-bit words of a token mask."""
    return -(-vocab_size // 32)


def is_bit_set(bits_BU: Array, token_B: jax.Array) -> jax.Array:
    """Returns bool [B]: True where a row's token mask holds its token."""
    word_B = jnp.take_along_axis(bits_BU, token_B[:, None] // 32, axis=1)[:, 0]
    return (word_B >> (token_B % 32)) & 1 == 1


def adjust_logits(
    logits_BV: jax.Array, settings: SamplingSettings, counts_BV: jax.Array, allowed_BU: jax.Array
) -> jax.Array:
    """Adds the biases, subtracts the penalties, and sets tokens that a grammar excludes to -inf.

    Args:
      logits_BV: float32.
      settings: one row for each sequence.
      counts_BV: int32, how many times each token has been sampled; read only if a penalty is not 0.
      allowed_BU: int32, the tokens that the grammar allows next as a token mask; -1 allows all.
    """
    V = logits_BV.shape[1]

    def add_bias(logits_BV):
        # Out of range, so that unused entries are dropped: -1 would be the last token.
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
    """Draws one token for each sequence, int32 [B].

    Args:
      logits_BV: float32, the result of `adjust_logits`.
      key_B: one for each sequence, so that its draw does not depend on the others. Unused if greedy.
      settings: a temperature of 0 takes the most likely token; for the rest see `filter_logits`.
    """

    def draw(greedy_B):
        filtered_BV = filter_logits(logits_BV, settings)
        # `jax.random.categorical`, but the barrier keeps `_argmax` from computing the noise twice.
        noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, logits_BV.shape[1:], jnp.float32))(key_B)
        sampled_B = _argmax(jax.lax.optimization_barrier(noise_BV + filtered_BV))
        return jnp.where(settings.temperature == 0, greedy_B, sampled_B)

    return _if_any(settings.temperature > 0, draw, _argmax(logits_BV))


def filter_logits(logits_BV: jax.Array, settings: SamplingSettings) -> jax.Array:
    """Returns logits divided by the temperature (above 0), with a maximum of 0; -inf for removed tokens.

    Settings used:
      temperature: divides the logits.
      top_k: keeps the k most likely tokens.
      top_p: keeps the smallest set of most likely tokens whose probabilities add up to at least this
        (Holtzman et al. 2020).
      min_p: keeps the tokens at least this many times as likely as the most likely one (Nguyen et al. 2024).
    """
    temperature_B1 = jnp.maximum(settings.temperature, jnp.finfo(jnp.float32).tiny)[:, None]
    # Subtracted first: then no temperature, however small, can produce two infinities to subtract.
    distance_BV = jnp.max(logits_BV, axis=1, keepdims=True) - logits_BV

    def keep_top_k(distance_BV):
        return _keep_nearest(distance_BV, jnp.ones_like(distance_BV), settings.top_k.astype(jnp.float32))

    def keep_top_p(distance_BV):
        weight_BV = jnp.exp(-distance_BV / temperature_B1)
        # At 1 every token stays: a sum of rounded probabilities may reach the total before the last one.
        share_B = jnp.where(settings.top_p >= 1, jnp.inf, settings.top_p)
        return _keep_nearest(distance_BV, weight_BV, share_B * jnp.sum(weight_BV, axis=1))

    distance_BV = _if_any(settings.top_k < logits_BV.shape[1], keep_top_k, distance_BV)
    distance_BV = _if_any(settings.top_p < 1, keep_top_p, distance_BV)
    scaled_BV = -distance_BV / temperature_B1
    return jnp.where(scaled_BV >= jnp.log(settings.min_p)[:, None], scaled_BV, -jnp.inf)


def top_logprobs(logits_BV: jax.Array, is_wanted_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the K most likely tokens, int32 [B, K], and their log-probabilities, float32 [B, K].

    K is MAX_TOP_LOGPROBS, or V if that is less. The best come first, and of equals the lower token id. If no
    row is wanted, nothing is computed and all are 0.
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
    """`jax.lax.argmax` over the vocabulary, as two reductions that vectorize on CPU."""
    V = x_BV.shape[1]
    token_BV = jax.lax.broadcasted_iota(jnp.int32, x_BV.shape, 1)
    is_max_BV = x_BV == jnp.max(x_BV, axis=1, keepdims=True)
    # A row of NaN has no maximum: its token is the last.
    return jnp.min(jnp.where(is_max_BV, token_BV, V - 1), axis=1)


def _keep_nearest(distance_BV: jax.Array, weight_BV: jax.Array, goal_B: Array) -> jax.Array:
    """Keeps the nearest tokens until their weights add up to `goal_B`; of equals, the lower ids. Others: inf.

    Bisection finds the distance of the last token kept, bit by bit: floats of at least 0 are ordered as their
    bit patterns. 31 sums over the vocabulary cost far less than sorting it.

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
