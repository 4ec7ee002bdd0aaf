"""Attention of whole rows on CPU, and its gradient: the kernels in `attention.cc` and `attention_grad.cc`.

Heads are float32 or bfloat16; the kernels compute in float32. The plain equivalents are
`query_chunked_attention` and `blockwise_attention`."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from gptoss_jax.kernels.attention.reference import AttentionSpec
from gptoss_jax.kernels.cpu import build

# q [B, T, N, H], k and v [B, T, K, H], sinks [N] or empty, segment ids [B, T].
_Inputs = tuple[jax.Array, ...]


def cpu_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    spec: AttentionSpec,
    *,
    sinks_N: jax.Array | None = None,
) -> jax.Array:
    """Returns `api.attention` without dropout, sink tokens and an offset, [B, T, N, H].

    Positions are not needed, because they increase by one within a segment. The gradient saves the inputs,
    the result, and the logarithm of the softmax's denominator.
    """
    T = q_BTNH.shape[1]
    window = T if spec.window is None else min(spec.window, T)
    sinks = jnp.zeros(0, jnp.float32) if sinks_N is None else sinks_N.astype(jnp.float32)
    return _attention(window, q_BTNH, k_BTKH, v_BTKH, sinks, segment_ids_BT.astype(jnp.int32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(window: int, *inputs: jax.Array) -> jax.Array:
    return _forward(window, *inputs)[0]


def _forward(window: int, *inputs: jax.Array) -> tuple[jax.Array, tuple[_Inputs, jax.Array, jax.Array]]:
    q_BTNH = inputs[0]
    B, T, N, _ = q_BTNH.shape
    call = _call("Attention", jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype), _float32(B, N, T))
    out_BTNH, lse_BNT = call(*inputs, window=window)
    return out_BTNH, (inputs, out_BTNH, lse_BNT)


def _backward(
    window: int, residuals: tuple[_Inputs, jax.Array, jax.Array], g_BTNH: jax.Array
) -> tuple[jax.Array | None, ...]:
    inputs, out_BTNH, lse_BNT = residuals
    call = _call("AttentionGrad", *(_float32(*x.shape) for x in inputs[:4]))
    gradients = call(*inputs, out_BTNH, lse_BNT, g_BTNH, window=window)
    return *(g.astype(x.dtype) for g, x in zip(gradients, inputs, strict=False)), None


_attention.defvjp(_forward, _backward)


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _call(name: str, *results: jax.ShapeDtypeStruct) -> Callable[..., Sequence[jax.Array]]:
    return jax.ffi.ffi_call(build.target(name), results)
