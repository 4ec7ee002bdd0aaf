"""Rotary embedding against the released model's constants (docs/math.md, "Forward pass") and by hand."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.config import ModelConfig, RopeScaling
from gptoss_jax.model import rope

RELEASED = ModelConfig()


def test_golden_constants():
    low, high = rope.yarn_correction_range(RELEASED)
    assert low == pytest.approx(8.092779115512402, rel=1e-14)
    assert high == pytest.approx(17.39802450158856, rel=1e-14)
    frequencies, concentration = rope.inverse_frequencies(RELEASED)
    assert frequencies.shape == (32,)
    assert concentration == pytest.approx(1.3465735902799727, rel=1e-14)
    np.testing.assert_allclose(
        frequencies[[0, 8, 9, 12, 17, 31]],
        [1.0, 0.050813273, 0.031705696, 0.006794959, 1.29318694e-4, 3.0235114e-7],
        rtol=1e-7,
    )


def test_frequencies_match_the_reference_bit_for_bit():
    # From transformers 5.23's GptOssRotaryEmbedding; torch's own powers are not always correctly rounded.
    expected = [
        0x3f800000, 0x3f306535, 0x3ef316a2, 0x3ea77faa, 0x3e66d3fa, 0x3e1f0cfd, 0x3ddb2f9f, 0x3d970764,
        0x3d502194, 0x3d01ddd5, 0x3c9e646f, 0x3c3dec94, 0x3bdea840, 0x3b7cfe14, 0x3b093803, 0x3a89f778,
        0x39ef543c, 0x390799b9, 0x3820adc6, 0x37dd6dfc, 0x37989328, 0x375242fa, 0x3710e12c, 0x36c7a82b,
        0x3689928c, 0x363d9647, 0x3602a245, 0x35b40668, 0x35781728, 0x352af200, 0x34eb93eb, 0x34a252d3,
    ]  # fmt: skip
    frequencies, _ = rope.inverse_frequencies(RELEASED)
    assert frequencies.dtype == np.float32
    off = frequencies.view(np.int32) - np.array(expected, np.int32)
    assert np.abs(off).max() <= 1 and np.count_nonzero(off) <= 2


def test_truncated_correction_range_is_integral():
    scaling = dataclasses.replace(RELEASED.rope_scaling, truncate=True)
    assert rope.yarn_correction_range(dataclasses.replace(RELEASED, rope_scaling=scaling)) == (8, 18)


def test_frequencies_without_scaling():
    config = ModelConfig(head_dim=6, rope_theta=1000.0, rope_scaling=None)
    frequencies, concentration = rope.inverse_frequencies(config)
    np.testing.assert_allclose(frequencies, [1.0, 0.1, 0.01], rtol=2e-7)
    assert concentration == 1.0


def test_a_factor_of_one_changes_nothing():
    config = ModelConfig(head_dim=6, rope_theta=1000.0, rope_scaling=RopeScaling(factor=1.0))
    frequencies, concentration = rope.inverse_frequencies(config)
    np.testing.assert_allclose(frequencies, [1.0, 0.1, 0.01], rtol=2e-7)
    assert concentration == 1.0


def test_cos_and_sin_tables():
    config = ModelConfig(head_dim=6, rope_theta=1000.0, rope_scaling=None)
    cos, sin = rope.rope_cos_sin(config, jnp.array([[0, 3], [5, 7]]))
    assert cos.shape == sin.shape == (2, 2, 3) and cos.dtype == sin.dtype == jnp.float32
    np.testing.assert_allclose(cos[0, 1], [math.cos(3), math.cos(0.3), math.cos(0.03)], rtol=1e-6)
    np.testing.assert_allclose(sin[1, 0], [math.sin(5), math.sin(0.5), math.sin(0.05)], rtol=1e-6)


def test_cos_and_sin_include_the_attention_factor(tiny_config):
    cos, sin = rope.rope_cos_sin(tiny_config, jnp.array([[0, 11]]))
    concentration = 0.1 * math.log(8) + 1
    np.testing.assert_allclose(cos[0, 0], concentration, rtol=1e-6)
    np.testing.assert_allclose(cos**2 + sin**2, concentration**2, rtol=1e-5)


def test_halves_are_rotated_together_not_neighbors():
    # Head size 6, position 2: the pairs are (0, 3), (1, 4), (2, 5), with angles 2, 0.2, 0.02.
    config = ModelConfig(head_dim=6, rope_theta=1000.0, rope_scaling=None)
    x_BTNH = jnp.array([1.0, 0, 0, 0, 10.0, 0]).reshape(1, 1, 1, 6)
    turned = rope.apply_rope(x_BTNH, rope.rope_cos_sin(config, jnp.array([[2]])))
    assert turned.shape == (1, 1, 1, 6)
    np.testing.assert_allclose(
        turned[0, 0, 0],
        [math.cos(2), -10 * math.sin(0.2), 0, math.sin(2), 10 * math.cos(0.2), 0],
        atol=1e-6,
    )


def test_rotation_of_one_pair_by_hand():
    config = ModelConfig(head_dim=2, rope_theta=1000.0, rope_scaling=None)
    quarter = (jnp.zeros((1, 1, 1)), jnp.ones((1, 1, 1)))
    turned = rope.apply_rope(jnp.array([3.0, 5.0]).reshape(1, 1, 1, 2), quarter)
    np.testing.assert_array_equal(turned.ravel(), [-5.0, 3.0])
    # Angle 1 at position 1: 3 cos 1 - 5 sin 1, 5 cos 1 + 3 sin 1.
    turned = rope.apply_rope(
        jnp.array([3.0, 5.0]).reshape(1, 1, 1, 2), rope.rope_cos_sin(config, jnp.array([[1]]))
    )
    np.testing.assert_allclose(turned.ravel(), [-2.5864480, 5.2259245], rtol=1e-6)


def test_scores_depend_only_on_relative_positions(tiny_config):
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 3, 8)), jnp.float32) for _ in range(2))

    def scores(at_query, at_key):
        turned_q = rope.apply_rope(q, rope.rope_cos_sin(tiny_config, jnp.array([[at_query]])))
        turned_k = rope.apply_rope(k, rope.rope_cos_sin(tiny_config, jnp.array([[at_key]])))
        return np.asarray(jnp.sum(turned_q * turned_k, axis=-1)).ravel()

    np.testing.assert_allclose(scores(9, 4), scores(105, 100), atol=1e-4)
    assert np.abs(scores(9, 4) - scores(9, 5)).max() > 0.1


def test_dtype_is_kept_and_rotation_is_float32(tiny_config):
    x_BTNH = jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, 5, 8)), jnp.bfloat16)
    tables = rope.rope_cos_sin(tiny_config, jnp.array([[0, 3, 90], [1, 5, 7]]))
    turned = rope.apply_rope(x_BTNH, tables)
    assert turned.dtype == jnp.bfloat16
    exact = rope.apply_rope(x_BTNH.astype(jnp.float32), tables)
    np.testing.assert_array_equal(turned, exact.astype(jnp.bfloat16))
