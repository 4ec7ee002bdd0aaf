"""gpt-oss's gated activation."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class SwiGLU(NamedTuple):
    """gate * sigmoid(alpha * gate) * (up + up_offset) (MATH.md, "Forward").

    The gate is clamped from above only, the linear half on both sides.
    """

    alpha: float
    limit: float | None
    up_offset: float

    def __call__(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        if self.limit is not None:
            gate = jnp.minimum(gate, self.limit)
            up = jnp.clip(up, -self.limit, self.limit)
        return gate * jax.nn.sigmoid(self.alpha * gate) * (up + self.up_offset)
