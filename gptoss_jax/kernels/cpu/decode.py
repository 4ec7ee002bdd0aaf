"""Decoding on CPU: matmuls of a few tokens with much larger matrices, by the kernels in `decode.cc` and
`decode_experts.cc`. Run time is the time to read each used matrix once, in float32 or bfloat16.

Activations are float32 in the kernels: those in bfloat16 are converted, and results are rounded once.

If they are not supported, `parallel.linear`, `model.moe` and `kernels.attention` use XLA instead.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.kernels import backend
from gptoss_jax.kernels.cpu import build
from gptoss_jax.kernels.layer_view import LayerView, as_view, read

# With more tokens, kernels that reuse cached matrix blocks for all tokens are faster.
MAX_DECODE_TOKENS = 16


def is_supported(kernel: str, tokens: int, *dtypes: jnp.dtype) -> bool:
    """Returns True if a kernel of this module can be used: on one CPU device, at most MAX_DECODE_TOKENS
    tokens, operands of these dtypes, enabled (`selection.is_enabled`), and compiled."""
    fits = tokens <= MAX_DECODE_TOKENS and not backend.is_multi_device()
    return fits and build.is_usable(kernel, *dtypes)


def supports_einsum(equation: str, x: jax.Array, result_type: jnp.dtype | None) -> bool:
    """Returns True if `einsum` can be used for the tokens of `x`."""
    x_letters, y_letters = equation.split(",")[0], equation.split("->")[1]
    tokens = math.prod(size for letter, size in zip(x_letters, x.shape, strict=True) if letter in y_letters)
    fits = result_type in (None, x.dtype, jnp.float32)
    return fits and is_supported("decode_matmul", tokens, x.dtype)


def supports_experts(x_MD: jax.Array, parameters: Mapping[str, jax.Array | LayerView]) -> bool:
    """Returns True if `experts` can be used: few tokens, and weights that are LayerViews, as in decoding. Not
    differentiable."""
    matrices = [value for name, value in parameters.items() if not name.endswith("_bias")]
    is_view = all(isinstance(value, LayerView) for value in matrices)
    is_packed = "down_blocks" in parameters
    kernel = "decode_mxfp4_experts" if is_packed else "decode_experts"
    dtypes = [] if is_packed else [value.dtype for value in matrices]
    return is_view and is_supported(kernel, x_MD.shape[0], x_MD.dtype, *dtypes)


def _call(name: str, *shapes: tuple[int, ...]) -> Callable[..., Sequence[jax.Array]]:
    results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.ffi.ffi_call(build.target(name), results, vmap_method="sequential")


def einsum(
    equation: str, x: jax.Array, layers: Sequence[LayerView], result_type: jnp.dtype | None = None
) -> list[jax.Array]:
    """Returns `jnp.einsum(equation, x, weight)` for each weight in `layers`, in one call; in the dtype of `x`
    or in float32. Not differentiable.

    The contracted letters must be the last of `x`, and the first or last of the weights.
    """
    x_letters, w_letters, y_letters = equation.replace("->", ",").split(",")
    summed = "".join(letter for letter in x_letters if letter not in y_letters)
    inner = math.prod(x.shape[x_letters.index(letter)] for letter in summed)
    tokens, transposed = x.size // inner, not w_letters.startswith(summed)
    if not x_letters.endswith(summed) or not (w_letters.endswith(summed) if transposed else True):
        raise ValueError(f"equation is {equation!r}: must contract the last letters of x")
    # The kernel uses the same index for all stacks.
    chex.assert_equal_shape_prefix([layer.stack for layer in layers], 1)
    call = _call(
        "DecodeMatmulTransposed" if transposed else "DecodeMatmul",
        *((tokens, math.prod(layer.shape) // inner) for layer in layers),
    )
    results = call(
        x.reshape(tokens, inner).astype(jnp.float32),
        jnp.int32(layers[0].index),
        *(layer.stack for layer in layers),
        rounded=x.dtype == jnp.bfloat16,
    )
    kept, outer = x.shape[: x.ndim - len(summed)], [letter for letter in w_letters if letter not in summed]
    return [
        y.reshape(*kept, *(layer.shape[w_letters.index(letter)] for letter in outer)).astype(
            result_type or x.dtype
        )
        for y, layer in zip(results, layers, strict=True)
    ]


def experts(
    x_MD: jax.Array,
    experts_MX: jax.Array,
    weights_MX: jax.Array,
    parameters: Mapping[str, jax.Array | LayerView],
    swiglu: tuple[float, float | None, float],
) -> jax.Array:
    """Returns the weighted sum of the outputs of each token's experts, [M, D] in the dtype of `x_MD`.

    Reads only the matrices of the selected experts, once.

    Args:
      experts_MX: expert ids; values outside [0, E) mean no expert and contribute zero.
      parameters: views of the weights (`gate_up` and `down`, or `gate_up_blocks`, `gate_up_scales`,
        `down_blocks` and `down_scales`) and, if there are biases, the biases as arrays.
      swiglu: alpha, limit and up_offset of the activation.
    """
    is_mxfp4 = "down_blocks" in parameters
    operands: list[jax.Array | np.ndarray] = []
    for name in ("gate_up", "down"):
        views = [as_view(parameters[name + part]) for part in (("_blocks", "_scales") if is_mxfp4 else ("",))]
        operands += [view.stack for view in views]
        # Biases are in their storage dtype, which may be narrower.
        bias = parameters.get(f"{name}_bias")
        operands.append(_no_values() if bias is None else read(bias).astype(jnp.float32))
    alpha, limit, up_offset = swiglu
    rounding = {} if is_mxfp4 else {"rounded": x_MD.dtype == jnp.bfloat16}
    (y_MD,) = _call("DecodeExpertsMxfp4" if is_mxfp4 else "DecodeExperts", x_MD.shape)(
        x_MD.astype(jnp.float32),
        experts_MX.astype(jnp.int32),
        weights_MX,
        jnp.int32(views[0].index),
        *operands,
        alpha=np.float32(alpha),
        limit=np.float32(math.inf if limit is None else limit),
        up_offset=np.float32(up_offset),
        **rounding,
    )
    return y_MD.astype(x_MD.dtype)


def attention(
    q_BNH: jax.Array, keys: LayerView, values: LayerView, seen_B: jax.Array, sinks_N: jax.Array | None
) -> jax.Array:
    """Attention of one query per sequence to the first `seen_B` slots of its cache. Returns [B, N, H], zeros
    where `seen_B` is 0.

    Args:
      keys, values: [B, K, S, H] of one layer, float32 or bfloat16; query head n uses key/value head n // G.
    """
    sinks = _no_values() if sinks_N is None else sinks_N.astype(jnp.float32)
    operands = keys.stack, values.stack, jnp.int32(keys.index), seen_B.astype(jnp.int32), sinks
    (y_BNH,) = _call("DecodeAttention", q_BNH.shape)(q_BNH.astype(jnp.float32), *operands)
    return y_BNH.astype(q_BNH.dtype)


def _no_values() -> np.ndarray:
    return np.zeros(0, np.float32)
