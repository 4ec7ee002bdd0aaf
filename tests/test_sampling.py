"""Sampling: which tokens are filtered, in small literal cases and against sorting, and the draws."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from gptoss_jax.inference import sampling, sampling_reference
from gptoss_jax.inference.sampling import (
    SamplingSettings,
    filter_logits,
    sample,
    sequence_keys,
    step_keys,
)
from gptoss_jax.inference.sampling_params import SamplingParams

# Probabilities 0.4, 0.3, 0.2, 0.1, out of order, with an offset that must have no effect.
LOGITS = jnp.log(jnp.array([[0.2, 0.4, 0.1, 0.3]])) + 5
TIED = jnp.array([[1.0, 3.0, 3.0, 3.0]])

compiled_filter = jax.jit(filter_logits)
compiled_reference = jax.jit(sampling_reference.filter_logits)
compiled_sample = jax.jit(sample)


def settings_of(batch=1, **values):
    """Settings of `batch` sequences: neutral, with a temperature of 1, but for the given values or arrays."""
    neutral = SamplingSettings.of([SamplingParams(temperature=1.0)] * batch)
    dtypes = {name: getattr(neutral, name).dtype for name in values}
    arrays = {name: np.resize(value, batch).astype(dtypes[name]) for name, value in values.items()}
    return dataclasses.replace(neutral, **arrays)


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
    for function in (compiled_filter, compiled_reference):
        shares = probabilities(function(logits, settings_of(**settings)))
        np.testing.assert_allclose(shares, [expected], atol=1e-6)
        np.testing.assert_array_equal(shares == 0, [np.equal(expected, 0)])


def test_filters_equal_those_of_the_sorted_vocabulary():
    rng, B, V = np.random.default_rng(0), 3000, 37
    # Ties, infinities and neighboring floats.
    special = np.float32([-np.inf, -3, -1, 0, -0.0, 1, np.nextafter(np.float32(1), np.float32(2)), 2.5, 80])
    logits_BV = rng.choice(special, (B, V))
    is_random_BV = rng.random((B, V)) < rng.random((B, 1))
    logits_BV = np.where(is_random_BV, 3 * rng.standard_normal((B, V), np.float32), logits_BV)
    logits_BV[np.arange(B), rng.integers(0, V, B)] = rng.choice([3, 81], B)
    settings = settings_of(
        B,
        temperature=rng.choice([1e-30, 0.3, 1.0, 4.0], B),
        top_k=rng.choice([*range(1, V + 3), *[2**31 - 1] * V], B),
        top_p=rng.choice([1e-6, 0.3, 0.5, 0.9, 0.999, 1.0, 1.0, 1.0], B) * rng.choice([0.8, 1.0], B),
        min_p=rng.choice([0.0, 0.0, 0.01, 0.5], B),
    )
    filtered_BV, reference_BV = compiled_filter(logits_BV, settings), compiled_reference(logits_BV, settings)
    kept_BV = np.isfinite(filtered_BV)
    np.testing.assert_array_equal(filtered_BV[kept_BV], reference_BV[kept_BV])
    # Sums of probabilities are rounded: next to an edge, top_p may keep a token more or less.
    for edge in (0.99999, 1.00001):
        moved = dataclasses.replace(settings, top_p=np.minimum(settings.top_p * np.float32(edge), 1))
        moved_BV = np.isfinite(compiled_reference(logits_BV, moved))
        assert np.all(kept_BV >= moved_BV if edge < 1 else kept_BV <= moved_BV)
    assert 0.1 < kept_BV.mean() < 0.9


def test_neutral_settings_keep_every_token_and_the_same_draw():
    logits_BV = 3 * jax.random.normal(jax.random.key(2), (8, 4100))
    keys_B = sequence_keys(jnp.arange(8, dtype=jnp.uint32))
    np.testing.assert_array_equal(
        compiled_filter(logits_BV, settings_of(8)), logits_BV - jnp.max(logits_BV, axis=1, keepdims=True)
    )
    expected_B = jax.vmap(jax.random.categorical)(keys_B, logits_BV)
    np.testing.assert_array_equal(compiled_sample(logits_BV, keys_B, settings_of(8)), expected_B)
    # Beside sequences with filters, which the same program then computes.
    mixed = settings_of(8, top_k=[3, 2**31 - 1] * 4, top_p=[0.5, 1.0] * 4, min_p=[0.1, 0.0] * 4)
    np.testing.assert_array_equal(compiled_sample(logits_BV, keys_B, mixed)[1::2], expected_B[1::2])


@pytest.mark.parametrize("logits", [LOGITS, TIED])
@pytest.mark.parametrize("settings", [{}, {"top_k": 3, "top_p": 0.9, "min_p": 0.01}])
def test_temperature_zero_is_greedy(logits, settings):
    logits_BV, keys_B = jnp.tile(logits, (64, 1)), sequence_keys(jnp.arange(64, dtype=jnp.uint32))
    settings = settings_of(64, temperature=0.0, **settings)
    assert set(compiled_sample(logits_BV, keys_B, settings).tolist()) == {1}


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
    expected_V = np.asarray(
        probabilities(filter_logits(logits_V[None], settings_of(**settings)))[0], np.float64
    )
    keys_B = sequence_keys(jnp.arange(draws, dtype=jnp.uint32))
    tokens_B = compiled_sample(jnp.tile(logits_V, (draws, 1)), keys_B, settings_of(draws, **settings))
    chex.assert_type(tokens_B, jnp.int32)
    observed_V = np.bincount(tokens_B, minlength=V)
    kept_V = expected_V > 0
    assert observed_V[~kept_V].sum() == 0
    expected_V = expected_V[kept_V] / expected_V[kept_V].sum() * draws
    assert expected_V.min() > 4
    assert stats.chisquare(observed_V[kept_V], expected_V).pvalue > 1e-3


def test_settings_per_sequence():
    logits_BV = jnp.tile(LOGITS, (3, 1))
    filtered_BV = compiled_filter(logits_BV, settings_of(3, temperature=[1.0, 0.5, 1.0], top_k=[4, 4, 2]))
    expected = [[0.2, 0.4, 0.1, 0.3], [4 / 30, 16 / 30, 1 / 30, 9 / 30], [0, 4 / 7, 0, 3 / 7]]
    np.testing.assert_allclose(probabilities(filtered_BV), expected, atol=1e-6)
    # Greedy sequences beside a sampled one: at temperature 1e6 draws are uniform.
    logits_BV, keys_B = jnp.tile(LOGITS, (99, 1)), sequence_keys(jnp.arange(99, dtype=jnp.uint32))
    tokens_B = np.asarray(compiled_sample(logits_BV, keys_B, settings_of(99, temperature=[0.0, 1e6, 0.0])))
    assert set(tokens_B[0::3].tolist()) == set(tokens_B[2::3].tolist()) == {1}
    assert set(tokens_B[1::3].tolist()) == {0, 1, 2, 3}


def test_keys():
    seeds_B = np.array([7, 0, 4294967295, 7, 12], np.uint32)
    keys_B = step_keys(sequence_keys(seeds_B), 3)
    for b, seed in enumerate(seeds_B):
        assert keys_B[b] == jax.random.fold_in(jax.random.key(seed), 3)
    # A traced seed, as in the decoder, gives the same key.
    assert jax.jit(sequence_keys)(seeds_B)[4] == sequence_keys(seeds_B)[4]
    assert step_keys(keys_B, jnp.arange(5))[2] == step_keys(keys_B[2:3], 2)[0]


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_row_has_the_same_bits_whatever_the_others_ask_for(batch):
    V = 1001
    logits_BV = 3 * jax.random.normal(jax.random.key(0), (8, V))
    params = [
        SamplingParams(temperature=0.9, top_p=0.9, presence_penalty=1.5, logit_bias={7: 3.0}),
        SamplingParams(temperature=1.0),
        SamplingParams(),
        SamplingParams(temperature=0.7, top_k=40, frequency_penalty=0.3),
        SamplingParams(temperature=1.3, min_p=0.02, top_p=0.7, top_k=500),
        SamplingParams(temperature=1.0, top_p=0.5),
        None,
        SamplingParams(temperature=1.0, logit_bias=[(0, -100), (V - 1, 5)]),
    ]
    counts_BV = jax.random.randint(jax.random.key(1), (8, V), 0, 3)
    allowed_BU = np.full((8, sampling.num_mask_words(V)), -1, np.int32)
    allowed_BU[3] = sampling.make_token_mask(range(0, V, 3), V)
    settings, keys_B = SamplingSettings.of(params), sequence_keys(jnp.arange(8, dtype=jnp.uint32))

    arguments = logits_BV, keys_B, settings, counts_BV, allowed_BU

    @jax.jit
    def run(logits_BV, keys_B, settings, counts_BV, allowed_BU):
        adjusted_BV = sampling.adjust_logits(logits_BV, settings, counts_BV, allowed_BU)
        return adjusted_BV, filter_logits(adjusted_BV, settings), sample(adjusted_BV, keys_B, settings)

    together = run(*arguments)
    for start in range(0, 8, batch):
        rows = slice(start, start + batch)
        some, expected = (jax.tree.map(lambda x: x[rows], tree) for tree in (arguments, together))  # noqa: B023
        chex.assert_trees_all_equal(run(*some), expected)


def test_adjusted_logits():
    params = [
        SamplingParams(logit_bias={3: -100.0, 0: 2.5}),
        SamplingParams(presence_penalty=0.5, frequency_penalty=0.25),
        SamplingParams(presence_penalty=-1.0, logit_bias={1: 1.0}),
        SamplingParams(),
    ]
    counts_BV = np.array([[0, 3, 0, 0], [0, 1, 2, 0], [4, 0, 0, 0], [1, 1, 1, 1]], np.int32)
    allowed_BU = np.array(
        [[-1], [-1], sampling.make_token_mask([0, 1], 4), sampling.make_token_mask([3], 4)], np.int32
    )
    logits_BV = np.tile(np.float32([1, 2, 3, 4]), (4, 1))
    inf = np.inf
    expected = [[3.5, 2, 3, -96], [1, 1.25, 2, 4], [2, 3, -inf, -inf], [-inf, -inf, -inf, 4]]
    adjusted_BV = sampling.adjust_logits(logits_BV, SamplingSettings.of(params), counts_BV, allowed_BU)
    np.testing.assert_array_equal(adjusted_BV, expected)


def test_token_masks():
    tokens = [0, 31, 32, 63, 64, 95, 96, 31]
    bits_U = sampling.make_token_mask(tokens, 97)
    np.testing.assert_array_equal(
        bits_U, np.array([0x80000001, 0x80000001, 0x80000001, 1], np.uint32).view(np.int32)
    )
    is_set_B = sampling.is_in_token_mask(jnp.tile(bits_U, (97, 1)), jnp.arange(97))
    assert np.flatnonzero(is_set_B).tolist() == sorted(set(tokens))
    assert sampling.make_token_mask([], 64).tolist() == [0, 0]


def test_log_probabilities():
    logits_BV = jnp.concatenate([jnp.tile(LOGITS, (2, 1)), jnp.log(jnp.array([[0.25, 0.3, 0.25, 0.2]]))])
    token_BK, logprob_BK = jax.jit(sampling.top_logprobs)(logits_BV, np.array([False, True, False]))
    np.testing.assert_array_equal(token_BK[1:], [[1, 3, 0, 2], [1, 0, 2, 3]])
    np.testing.assert_allclose(
        jnp.exp(logprob_BK[1:]), [[0.4, 0.3, 0.2, 0.1], [0.3, 0.25, 0.25, 0.2]], rtol=1e-6
    )
    # The chosen token has the same bits in both.
    for k in range(4):
        np.testing.assert_array_equal(sampling.token_logprobs(logits_BV, token_BK[:, k]), logprob_BK[:, k])
    token_BK, _ = sampling.top_logprobs(jnp.zeros((2, 50)), np.array([True, False]))
    assert token_BK[0].tolist() == list(range(20))
    for array in sampling.top_logprobs(jnp.ones((2, 50)), np.array([False, False])):
        np.testing.assert_array_equal(array, np.zeros((2, 20)))


def test_rows_split_over_devices():
    B, V = 16, 300
    mesh = jax.make_mesh((4, 2), ("rows", "columns"))
    logits_BV = jax.random.normal(jax.random.key(3), (B, V))
    settings = settings_of(B, top_k=[5, 300], top_p=[0.5, 0.9, 1.0], presence_penalty=[0.5, 0.0])
    keys_B = sequence_keys(jnp.arange(B, dtype=jnp.uint32))
    counts_BV = jnp.ones((B, V), jnp.int32)
    allowed_BU = jnp.full((B, sampling.num_mask_words(V)), -1, jnp.int32)

    @jax.jit
    def run(logits_BV, keys_B, settings, counts_BV, allowed_BU):
        return sample(sampling.adjust_logits(logits_BV, settings, counts_BV, allowed_BU), keys_B, settings)

    arguments = logits_BV, keys_B, settings, counts_BV, allowed_BU
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))
    np.testing.assert_array_equal(run(*jax.device_put(arguments, rows)), run(*arguments))


def test_nothing_sorts_the_vocabulary_and_greedy_rows_draw_nothing():
    jaxpr = str(jax.make_jaxpr(sample)(LOGITS, sequence_keys(jnp.zeros(1, jnp.uint32)), settings_of()))
    assert " sort[" not in jaxpr and "top_k[" not in jaxpr and "cond[" in jaxpr
    assert "random_bits" not in jaxpr[: jaxpr.index("cond[")]
