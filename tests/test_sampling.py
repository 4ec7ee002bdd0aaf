"""Sampling: which tokens are filtered, in small literal cases, and the distribution of draws."""

import dataclasses
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from gptoss_jax.inference.sampling import SETTINGS, filter_logits, sample, sequence_keys, step_keys
from gptoss_jax.inference.sampling_params import SamplingParams

# Probabilities 0.4, 0.3, 0.2, 0.1, out of order, with an offset that must have no effect.
LOGITS = jnp.log(jnp.array([[0.2, 0.4, 0.1, 0.3]])) + 5
TIED = jnp.array([[1.0, 3.0, 3.0, 3.0]])

compiled_filter = jax.jit(filter_logits)
compiled_sample = jax.jit(sample)


def probabilities(filtered_BV):
    return jnp.exp(jax.nn.log_softmax(filtered_BV))


@pytest.mark.parametrize(
    ("logits", "settings", "expected"),
    [
        (LOGITS, {}, [0.2, 0.4, 0.1, 0.3]),
        (LOGITS, {"temperature": 0.5}, [4 / 30, 16 / 30, 1 / 30, 9 / 30]),
        (LOGITS, {"temperature": 1e-30}, [0, 1, 0, 0]),
        (LOGITS, {"top_k": 1}, [0, 1, 0, 0]),
        (LOGITS, {"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        (LOGITS, {"top_k": 9}, [0.2, 0.4, 0.1, 0.3]),
        (LOGITS, {"top_p": 1e-9}, [0, 1, 0, 0]),
        (LOGITS, {"top_p": 0.39}, [0, 1, 0, 0]),
        (LOGITS, {"top_p": 0.41}, [0, 4 / 7, 0, 3 / 7]),
        (LOGITS, {"top_p": 0.71}, [2 / 9, 4 / 9, 0, 3 / 9]),
        (LOGITS, {"top_p": 1.0}, [0.2, 0.4, 0.1, 0.3]),
        (LOGITS, {"min_p": 0.0}, [0.2, 0.4, 0.1, 0.3]),
        (LOGITS, {"min_p": 0.49}, [2 / 9, 4 / 9, 0, 3 / 9]),
        (LOGITS, {"min_p": 0.51}, [0, 4 / 7, 0, 3 / 7]),
        # Temperature comes first: at 0.5 the probabilities are 16, 9, 4 and 1 of 30.
        (LOGITS, {"temperature": 0.5, "top_p": 0.55}, [0, 16 / 25, 0, 9 / 25]),
        (LOGITS, {"temperature": 0.5, "top_p": 0.53}, [0, 1, 0, 0]),
        (LOGITS, {"temperature": 0.5, "min_p": 0.26}, [0, 16 / 25, 0, 9 / 25]),
        # Top-p applies to what top-k keeps: 0.4 of 0.7 is 0.571.
        (LOGITS, {"top_k": 2, "top_p": 0.57}, [0, 1, 0, 0]),
        (LOGITS, {"top_k": 2, "top_p": 0.58}, [0, 4 / 7, 0, 3 / 7]),
        (LOGITS, {"top_k": 3, "top_p": 0.9, "min_p": 0.7}, [0, 4 / 7, 0, 3 / 7]),
        # Of tied tokens, the lower ids are kept, as many as requested.
        (TIED, {"top_k": 1}, [0, 1, 0, 0]),
        (TIED, {"top_k": 2}, [0, 0.5, 0.5, 0]),
        (TIED, {"top_p": 0.5}, [0, 0.5, 0.5, 0]),
    ],
)
def test_filters(logits, settings, expected):
    static = probabilities(filter_logits(logits, **settings))
    np.testing.assert_allclose(static, [expected], atol=1e-6)
    np.testing.assert_array_equal(static == 0, [np.equal(expected, 0)])
    traced = probabilities(compiled_filter(logits, **settings))
    np.testing.assert_allclose(traced, [expected], atol=1e-6)


def test_the_table_of_settings_is_complete_and_its_values_have_no_effect():
    fields = {field.name for field in dataclasses.fields(SamplingParams)}
    assert SETTINGS.keys() == inspect.signature(sample).parameters.keys() & fields
    neutral = {name: np.array([value], dtype) for name, (value, dtype) in SETTINGS.items()}
    assert sample(LOGITS, sequence_keys(np.uint32([0])), **neutral) == 1  # greedy
    neutral["temperature"] = 1.0
    np.testing.assert_array_equal(filter_logits(LOGITS, **neutral), filter_logits(LOGITS))


@pytest.mark.parametrize("logits", [LOGITS, TIED])
@pytest.mark.parametrize("settings", [{}, {"top_k": 3, "top_p": 0.9, "min_p": 0.01}])
def test_temperature_zero_is_greedy(logits, settings):
    logits_BV, keys_B = jnp.tile(logits, (64, 1)), sequence_keys(jnp.arange(64, dtype=jnp.uint32))
    assert set(sample(logits_BV, keys_B, 0.0, **settings).tolist()) == {1}
    assert set(compiled_sample(logits_BV, keys_B, 0.0, **settings).tolist()) == {1}


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.5, "min_p": 0.1},
        {"temperature": 1.2, "top_k": 7, "top_p": 0.85},
        {"temperature": 1.8, "top_k": 9, "min_p": 0.15},
        {"temperature": 1.6, "top_p": 0.9, "min_p": 0.12},
        {"temperature": 2.0, "top_k": 9, "top_p": 0.9, "min_p": 0.2},
    ],
)
def test_draws_follow_the_filtered_distribution(settings):
    draws, V = 20_000, 13
    logits_V = 2 * jax.random.normal(jax.random.key(1), (V,))
    expected_V = np.asarray(probabilities(filter_logits(logits_V[None], **settings))[0], np.float64)
    tokens_B = compiled_sample(
        jnp.tile(logits_V, (draws, 1)), sequence_keys(jnp.arange(draws, dtype=jnp.uint32)), **settings
    )
    chex.assert_type(tokens_B, jnp.int32)
    observed_V = np.bincount(tokens_B, minlength=V)
    kept_V = expected_V > 0
    assert observed_V[~kept_V].sum() == 0
    expected_V = expected_V[kept_V] / expected_V[kept_V].sum() * draws
    assert expected_V.min() > 4
    assert stats.chisquare(observed_V[kept_V], expected_V).pvalue > 1e-3


def test_settings_per_sequence():
    logits_BV = jnp.tile(LOGITS, (3, 1))
    filtered_BV = filter_logits(logits_BV, jnp.array([1.0, 0.5, 1.0]), top_k=jnp.array([4, 4, 2]))
    expected = [[0.2, 0.4, 0.1, 0.3], [4 / 30, 16 / 30, 1 / 30, 9 / 30], [0, 4 / 7, 0, 3 / 7]]
    np.testing.assert_allclose(probabilities(filtered_BV), expected, atol=1e-6)
    # Greedy sequences beside a sampled one: at temperature 1e6 draws are uniform.
    logits_BV, keys_B = jnp.tile(LOGITS, (99, 1)), sequence_keys(jnp.arange(99, dtype=jnp.uint32))
    tokens_B = np.asarray(sample(logits_BV, keys_B, jnp.array([0.0, 1e6, 0.0] * 33)))
    assert set(tokens_B[0::3].tolist()) == set(tokens_B[2::3].tolist()) == {1}
    assert set(tokens_B[1::3].tolist()) == {0, 1, 2, 3}


def test_keys():
    seeds_B = np.array([7, 0, 4294967295, 7, 12], np.uint32)
    keys_B = step_keys(sequence_keys(seeds_B), 3)
    for b, seed in enumerate(seeds_B):
        assert keys_B[b] == jax.random.fold_in(jax.random.key(seed), 3)
    # A traced seed, as in the decoder, gives the same key.
    assert jax.jit(sequence_keys)(seeds_B)[4] == sequence_keys(seeds_B)[4]
    # The draws of a sequence do not depend on the others in the batch.
    logits_BV = jax.random.normal(jax.random.key(0), (5, 50))
    together_B = compiled_sample(logits_BV, keys_B, 1.0, top_p=0.9)
    alone_B = [compiled_sample(logits_BV[b : b + 1], keys_B[b : b + 1], 1.0, top_p=0.9)[0] for b in range(5)]
    np.testing.assert_array_equal(together_B, alone_B)


@pytest.mark.parametrize(
    ("settings", "sorts"),
    [({}, 0), ({"min_p": 0.1}, 0), ({"top_k": 3}, 1), ({"top_k": 3, "top_p": 0.5, "min_p": 0.1}, 1)],
)
def test_at_most_one_sort(settings, sorts):
    jaxpr = jax.make_jaxpr(lambda x, keys: sample(x, keys, 1.0, **settings))(
        LOGITS, sequence_keys(jnp.zeros(1, jnp.uint32))
    )
    assert str(jaxpr).count(" sort[") == sorts
