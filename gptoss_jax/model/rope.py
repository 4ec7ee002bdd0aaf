"""Rotary position embedding with YaRN (Su et al. 2021; Peng et al. 2023, sections 3.2 to 3.4)."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.config import ModelConfig
from gptoss_jax.kernels.cpu import rope as cpu_rope
from gptoss_jax.kernels.shapes import assert_shapes


def yarn_correction_range(config: ModelConfig) -> tuple[float, float]:
    """Returns the frequency indices between which YaRN ramps from unscaled to interpolated frequencies."""
    scaling = config.rope_scaling
    assert scaling is not None, "model.rope_scaling is None"
    length = scaling.original_max_position_embeddings

    def index_with(rotations: float) -> float:
        return (
            config.head_dim / 2 * math.log(length / (rotations * 2 * math.pi)) / math.log(config.rope_theta)
        )

    low, high = index_with(scaling.beta_fast), index_with(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    return low, high if high > low else low + 1e-3


def inverse_frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
    """Returns the H / 2 angular frequencies of RoPE (`inv_freq` in docs/math.md and transformers), float32 in
    radians per token, and the scale of cos and sin.

    Every step is rounded to float32, as in the reference implementation of the released models: at position
    100,000, the last bit of a frequency amounts to a thousandth of a radian or more.
    """
    one, half = np.float32(1), config.head_dim // 2
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    periods = (config.rope_theta ** exponent.astype(np.float64)).astype(np.float32)
    plain = one / periods
    scaling = config.rope_scaling
    if scaling is None:
        return plain, 1.0
    low, high = yarn_correction_range(config)
    ramp = (np.arange(half, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    kept = one - np.clip(ramp, 0, 1)
    divided = one / (np.float32(scaling.factor) * periods)
    concentration = 0.1 * math.log(scaling.factor) + 1 if scaling.factor > 1 else 1.0
    return divided * (one - kept) + plain * kept, concentration


def rope_cos_sin(config: ModelConfig, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns cos and sin of the angles at each position, float32 [B, T, H / 2]."""
    frequencies, concentration = inverse_frequencies(config)
    angles = positions_BT[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * concentration, jnp.sin(angles) * concentration


def apply_rope(x_BTNH: jax.Array, cos_sin: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates each pair (i, i + H / 2) of every head by its angle, in float32; returns the input's dtype.
    The tables are those of `rope_cos_sin` for the same rows, [B, T, H / 2]."""
    assert_shapes("BTNH BTJ BTJ", x_BTNH, *cos_sin)
    assert x_BTNH.shape[-1] == 2 * cos_sin[0].shape[-1], "heads must be twice as wide as the tables"
    if cpu_rope.is_supported(x_BTNH):
        return cpu_rope.rope(x_BTNH, *cos_sin)
    return xla_rope(x_BTNH, cos_sin)


def xla_rope(x_BTNH: jax.Array, cos_sin: tuple[jax.Array, jax.Array]) -> jax.Array:
    """`apply_rope` in plain XLA."""
    cos, sin = (table[:, :, None, None, :] for table in cos_sin)
    halves = x_BTNH.astype(jnp.float32).reshape(*x_BTNH.shape[:-1], 2, -1)
    # The halves get a separate axis, which is flipped as a whole: XLA on CPU is slow to concatenate them.
    signed_sin = jnp.concatenate([-sin, sin], axis=-2)
    rotated = halves * cos + jnp.flip(halves, axis=-2) * signed_sin
    return rotated.reshape(x_BTNH.shape).astype(x_BTNH.dtype)
