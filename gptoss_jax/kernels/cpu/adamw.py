"""AdamW and the global norm on CPU in float32: the kernels in `adamw.cc`, one pass over memory each.

The plain equivalent is optax, in `training/optimizer.py`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.kernels.cpu import build

Arrays = Sequence[jax.Array]


class AdamW(NamedTuple):
    """Constants of AdamW. `weight_decays` has one value per array."""

    beta1: float
    beta2: float
    epsilon: float
    weight_decays: tuple[float, ...]


def is_supported(arrays: Arrays) -> bool:
    """Returns True if the kernels can be used: float32 on CPU, enabled, and compiled."""
    return all(x.dtype == jnp.float32 for x in arrays) and build.is_usable("adamw")


def global_norm(arrays: Arrays) -> jax.Array:
    """Returns the Euclidean norm of all arrays together, float32."""
    call = jax.ffi.ffi_call(build.target("GlobalNorm"), jax.ShapeDtypeStruct((), jnp.float32))
    return call(*arrays)


def update(
    adamw: AdamW, params: Arrays, gradients: Arrays, moments: tuple[Arrays, Arrays], scalars: jax.Array
) -> tuple[Arrays, Arrays, Arrays]:
    """Returns the next parameters and first and second moments, in the memory of the present ones.

    Args:
      moments: the first and second moments.
      scalars: float32 [5]: 0 to leave everything unchanged, otherwise 1; factor that clips the gradients;
        learning rate; 1 - beta1^step and 1 - beta2^step, with steps counted from 1.
    """
    n = len(params)
    call = jax.ffi.ffi_call(
        build.target("AdamW"),
        [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (*params, *moments[0], *moments[1])],
        # Operand 0 has the scalars, and the gradients come after the parameters.
        input_output_aliases={1 + i if i < n else 1 + n + i: i for i in range(3 * n)},
    )
    results = call(
        scalars,
        *params,
        *gradients,
        *moments[0],
        *moments[1],
        decays=np.array(adamw.weight_decays, np.float32),
        beta1=np.float32(adamw.beta1),
        beta2=np.float32(adamw.beta2),
        rest1=np.float32(1 - adamw.beta1),
        rest2=np.float32(1 - adamw.beta2),
        epsilon=np.float32(adamw.epsilon),
    )
    return results[:n], results[n : 2 * n], results[2 * n :]
