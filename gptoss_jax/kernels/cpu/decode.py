"""Decoding on CPU: a handful of rows times matrices far larger than they are, by the kernels of
`native/few_rows.cc`. Time is that of reading the matrices that are used, once.

The plain references are what runs where these do not: `sharding.products`, `expert_dispatch` and
`cached_attention`.
"""

import functools
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.kernels import backend, selection
from gptoss_jax.kernels.cpu import build
from gptoss_jax.kernels.layer_view import LayerView, read

# With more rows than this, products that share what they read among rows in the cache are faster.
MAX_DECODE_TOKENS = 16
NOTHING = np.zeros(0, np.float32)


def is_supported(kernel: str, rows: int, dtype: jnp.dtype) -> bool:
    """Returns True if a kernel of this file applies: float32 on one CPU device, at most MAX_DECODE_TOKENS
    rows, not turned off (`selection.is_enabled`), and compiled."""
    here = backend.platform() == "cpu" and not backend.is_multi_device()
    fits = here and rows <= MAX_DECODE_TOKENS and dtype == jnp.float32
    return fits and selection.is_enabled(kernel) and build.is_available()


def supports_experts(x_MD: jax.Array, parameters: Mapping[str, jax.Array | LayerView]) -> bool:
    """Returns True if `experts` applies to few tokens: the matrices are views of layers, as in decoding, and
    in the type of `x_MD` or packed. It has no gradient."""
    matrices = [value for name, value in parameters.items() if not name.endswith("_bias")]
    is_view = all(
        isinstance(value, LayerView) and value.dtype in (x_MD.dtype, jnp.uint8) for value in matrices
    )
    kernel = "decode_mxfp4_experts" if "down_blocks" in parameters else "decode_experts"
    return is_view and is_supported(kernel, x_MD.shape[0], x_MD.dtype)


def _call(name: str, results):
    return jax.ffi.ffi_call(build.target(name), results, vmap_method="sequential")


def _result(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def einsum(equation: str, x: jax.Array, layers: Sequence[LayerView]) -> list[jax.Array]:
    """`einsum(equation, x, weight)` for the weight of each layer, all at once; float32.

    The letters that are summed over stand last in `x`, and first or last in the weights. Differentiable.
    """
    x_letters, w_letters, y_letters = equation.replace("->", ",").split(",")
    summed = "".join(letter for letter in x_letters if letter not in y_letters)
    inner = math.prod(x.shape[x_letters.index(letter)] for letter in summed)
    rows, turned = x.size // inner, not w_letters.startswith(summed)
    if not x_letters.endswith(summed) or not (w_letters.endswith(summed) if turned else True):
        raise ValueError(f"equation is {equation!r}: must sum over the last letters of x")
    shapes = [_result(rows, math.prod(layer.shape) // inner) for layer in layers]
    index = jnp.asarray(layers[0].index, jnp.int32)
    stacks = (layer.stack for layer in layers)
    name = "FewRowsTurnedProducts" if turned else "FewRowsProducts"
    results = _call(name, shapes)(x.reshape(rows, inner), index, *stacks)
    outer = [letter for letter in w_letters if letter not in summed]
    kept = x.shape[: x.ndim - len(summed)]
    return [
        y.reshape(*kept, *(layer.shape[w_letters.index(letter)] for letter in outer))
        for y, layer in zip(results, layers, strict=True)
    ]


def _products_bwd(equation, kept, gradients):
    x, layers = kept

    def plain(x, stacks):
        weights = (LayerView(stack, layer.index) for stack, layer in zip(stacks, layers, strict=True))
        return [jnp.einsum(equation, x, read(weight), precision="highest") for weight in weights]

    dx, d_stacks = jax.vjp(plain, x, [layer.stack for layer in layers])[1](list(gradients))
    no_index = [None if isinstance(layer.index, int) else np.zeros((), jax.dtypes.float0) for layer in layers]
    return dx, [LayerView(stack, index) for stack, index in zip(d_stacks, no_index, strict=True)]


einsum.defvjp(lambda equation, x, layers: (einsum(equation, x, layers), (x, layers)), _products_bwd)


def experts(
    x_MD: jax.Array,
    experts_MX: jax.Array,
    weights_MX: jax.Array,
    parameters: Mapping[str, jax.Array | LayerView],
    swiglu: tuple[float, float | None, float],
) -> jax.Array:
    """Returns the weighted sum of the outputs of each token's experts, float32 [M, D].

    Reads the matrices of the experts that were chosen, each once, and no others.

    Args:
      experts_MX: 0 … E - 1; others give zero.
      parameters: views of the experts' matrices, `gate_up` and `down`, or `gate_up_blocks`, `gate_up_scales`,
        `down_blocks` and `down_scales`; and their biases as arrays, if any.
      swiglu: alpha, limit and up_offset of the activation.
    """
    operands, packed = [], "down_blocks" in parameters
    for name in ("gate_up", "down"):
        for part in ("_blocks", "_scales") if packed else ("",):
            view = parameters[name + part]
            operands.append(view.stack.reshape(-1, *view.shape[1:]))
        operands.append(parameters.get(f"{name}_bias", NOTHING))
    E, index = view.shape[0], view.index
    alpha, limit, up_offset = swiglu
    return _call("FewRowsPacked" if packed else "FewRowsExperts", _result(*x_MD.shape))(
        x_MD,
        experts_MX.astype(jnp.int32),
        weights_MX,
        jnp.asarray(index * E, jnp.int32),
        *operands,
        experts=np.int64(E),
        alpha=np.float32(alpha),
        limit=np.float32(math.inf if limit is None else limit),
        offset=np.float32(up_offset),
    )


def attention(
    q_BNH: jax.Array, keys: LayerView, values: LayerView, counts_B: jax.Array, sinks_N: jax.Array | None
) -> jax.Array:
    """One query of each sequence over the first `counts_B` slots of its cache; [B, N, H]. A count of 0 gives
    zeros.

    Args:
      keys, values: [B, K, S, H] of one layer; query head n uses key/value head n // G.
    """
    sinks = NOTHING if sinks_N is None else sinks_N.astype(jnp.float32)
    index = jnp.asarray(keys.index, jnp.int32)
    return _call("FewRowsAttention", _result(*q_BNH.shape))(
        q_BNH, keys.stack, values.stack, index, counts_B.astype(jnp.int32), sinks
    )
