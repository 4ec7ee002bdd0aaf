"""A small comparison of every kernel of a backend with its plain XLA equivalent.

All sizes differ and none is a multiple of a block; one group of rows is empty and some rows have no group.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.kernels.attention.blockwise import blockwise_attention
from gptoss_jax.kernels.attention.reference import AttentionSpec, reference_attention, segment_starts
from gptoss_jax.kernels.cpu import adamw, decode, rope, swiglu, unpack
from gptoss_jax.kernels.cpu.attention import cpu_attention
from gptoss_jax.kernels.cpu.grouped import cpu_grouped_matmul, cpu_mxfp4_matmul
from gptoss_jax.kernels.grouped_matmul.api import add_group_bias
from gptoss_jax.kernels.grouped_matmul.xla import xla_grouped_matmul
from gptoss_jax.kernels.layer_view import LayerView
from gptoss_jax.kernels.mxfp4 import codec
from gptoss_jax.kernels.mxfp4.api import differentiable_matmul
from gptoss_jax.kernels.mxfp4.xla import xla_mxfp4_matmul

HEAD_SIZE = 64
SWIGLU = 1.702, 7.0, 1.0  # alpha, limit, up_offset

Arrays = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Case:
    """A kernel and its plain XLA equivalent, as functions of the same arrays.

    The gradients of the first `num_differentiable` arrays are compared as well.
    """

    kernel: str
    variant: str
    dtype: str
    arrays: Callable[[], Arrays]
    run: Callable[..., jax.Array]
    plain: Callable[..., jax.Array]
    num_differentiable: int = 0


def _normal(seed: int, dtype: str, *shapes: tuple[int, ...]) -> Arrays:
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return tuple(jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))


def cases(backend: str, interpret: bool = False) -> Iterator[Case]:
    """Yields the cases of a backend. `interpret` runs Pallas kernels on any device, for tests."""
    if backend == "cpu":
        yield _adamw_case()
        yield _unpack_case()
    for dtype in ("bfloat16", "float32"):
        if backend == "cpu":
            yield from _cpu_decode_cases(dtype)
            yield _swiglu_case(dtype)
            yield _rope_case(dtype)
        yield from _attention_cases(backend, dtype, interpret)
        yield _grouped_matmul_case(backend, dtype, interpret)
        yield from _mxfp4_matmul_cases(backend, dtype, interpret)


def _attention_cases(backend: str, dtype: str, interpret: bool) -> Iterator[Case]:
    B, T, N, K, H = 2, 200, 8, 2, HEAD_SIZE
    attention: Callable[..., jax.Array] = cpu_attention
    if backend == "gpu":
        from gptoss_jax.kernels.attention import pallas_triton

        attention = pallas_triton.triton_attention
    elif backend == "tpu":
        from gptoss_jax.kernels.attention import pallas_tpu

        attention = pallas_tpu.splash_attention

    def arrays() -> Arrays:
        # Two documents per row.
        segment_ids_BT = 1 + (jnp.arange(T) >= jnp.array([[130], [61]])).astype(jnp.int32)
        positions_BT = jnp.arange(T, dtype=jnp.int32) - segment_starts(segment_ids_BT)
        qkv = _normal(0, dtype, (B, T, N, H), (B, T, K, H), (B, T, K, H))
        return *qkv, *_normal(1, "float32", (N,)), segment_ids_BT, positions_BT

    # With an offset that is not a Python integer, as in context parallelism, the grid is that of any offset.
    variants = ("full", None, 0), ("sliding", 77, 0), ("full at an offset", None, 70)
    for variant, window, offset in variants[:2] if backend == "cpu" else variants:
        spec, start = AttentionSpec(window), np.int32(offset) if offset else 0

        def run(q, k, v, sinks, *where, spec=spec, start=start):
            if backend == "cpu":
                return attention(q, k, v, where[0], spec, sinks_N=sinks)
            settings = {"sinks_N": sinks, "offset": start, "interpret": interpret}
            return attention(q[:, start:], k, v, *where, spec, **settings)

        def plain(q, k, v, sinks, *where, spec=spec, start=start):
            segment_ids_BT, positions_BT = where
            return blockwise_attention(
                q[:, start:], k, v, segment_ids_BT, positions_BT, spec, sinks_N=sinks, offset=start
            )

        yield Case("attention", variant, dtype, arrays, run, plain, num_differentiable=4)


def _group_sizes() -> jax.Array:
    return jnp.array([90, 0, 37, 130, 11], jnp.int32)


def _grouped_matmul_case(backend: str, dtype: str, interpret: bool) -> Case:
    R, E, D, F = 300, 5, 192, 320

    def arrays() -> Arrays:
        return *_normal(2, dtype, (R, D), (E, D, F), (E, F)), _group_sizes()

    def plain(x, w, bias, sizes):
        return add_group_bias(xla_grouped_matmul(x, w, sizes), bias, sizes)

    def run(x, w, bias, sizes):
        if backend == "cpu":
            return cpu_grouped_matmul(x, w, sizes, bias)
        if backend == "tpu":
            from gptoss_jax.kernels.grouped_matmul.pallas_tpu import megablox_grouped_matmul

            y = megablox_grouped_matmul(x, w, sizes, interpret)
        else:
            from gptoss_jax.kernels.grouped_matmul.pallas_triton import triton_grouped_matmul

            y = triton_grouped_matmul(x, w, sizes, interpret=interpret)
        return add_group_bias(y, bias, sizes)

    return Case("grouped_matmul", "", dtype, arrays, run, plain, num_differentiable=3)


def _mxfp4_matmul_cases(backend: str, dtype: str, interpret: bool) -> Iterator[Case]:
    E, D, F = 5, 192, 320
    if backend == "cpu":
        matmul: Callable[..., jax.Array] = cpu_mxfp4_matmul
    elif backend == "tpu":
        from gptoss_jax.kernels.mxfp4 import pallas_tpu

        matmul = functools.partial(pallas_tpu.mosaic_mxfp4_matmul, interpret=interpret)
    else:
        from gptoss_jax.kernels.mxfp4 import pallas_triton

        matmul = functools.partial(pallas_triton.triton_mxfp4_matmul, interpret=interpret)
    run = functools.partial(differentiable_matmul, matmul)
    plain = functools.partial(differentiable_matmul, xla_mxfp4_matmul)

    def arrays(factor: int) -> Arrays:
        (x_RD,) = _normal(3, dtype, (300 * factor, D))
        (w_EFD,) = _normal(4, "float32", (E, F, D))
        return x_RD, *codec.quantize(w_EFD), factor * _group_sizes()

    # On GPU, tile sizes depend on the number of rows.
    for variant, factor in (("few rows", 1), ("many rows", 4)) if backend == "gpu" else (("", 1),):
        inputs = functools.partial(arrays, factor)
        yield Case("mxfp4_matmul", variant, dtype, inputs, run, plain, num_differentiable=1)


def _cpu_decode_cases(dtype: str) -> Iterator[Case]:
    rows, D, N, H = 3, 200, 7, 24

    def vectors() -> Arrays:
        return _normal(5, dtype, (rows, D), (2, D, N, H), (2, N, H, D))

    def matmul(x, w, transposed):
        (y_MNH,) = decode.einsum("MD,DNH->MNH", x, [LayerView(w, 1)])
        (z_MNH,) = decode.einsum("MD,NHD->MNH", x, [LayerView(transposed, 1)])
        return jnp.stack([y_MNH, z_MNH])

    def plain_matmul(x, w, transposed):
        return jnp.stack([jnp.einsum("MD,DNH->MNH", x, w[1]), jnp.einsum("MD,NHD->MNH", x, transposed[1])])

    yield Case("decode_matmul", "", dtype, vectors, matmul, plain_matmul)
    for kernel, is_packed in (("decode_experts", False), ("decode_mxfp4_experts", True)):
        yield _decode_experts_case(kernel, dtype, is_packed)

    B, S, heads, K = 3, 150, 6, 2

    def cache() -> Arrays:
        arrays = _normal(6, dtype, (B, heads, H), (2, B, K, S, H), (2, B, K, S, H), (heads,))
        return *arrays, jnp.array([150, 1, 97], jnp.int32)

    def attention(q, keys, values, sinks, counts):
        return decode.attention(q, LayerView(keys, 1), LayerView(values, 1), counts, sinks)

    def plain_attention(q, keys, values, sinks, counts):
        k_BSKH, v_BSKH = (stack[1].transpose(0, 2, 1, 3) for stack in (keys, values))
        mask_BTS = (jnp.arange(S) < counts[:, None])[:, None]
        return reference_attention(q[:, None], k_BSKH, v_BSKH, mask_BTS, sinks_N=sinks)[:, 0]

    yield Case("decode_attention", "", dtype, cache, attention, plain_attention)


def _decode_experts_case(kernel: str, dtype: str, is_packed: bool) -> Case:
    M, X, E, D, F = 3, 2, 5, 96, 160

    def arrays() -> Arrays:
        x_MD, *biases = _normal(7, dtype, (M, D), (E, 2, F), (E, D))
        experts_MX = jnp.array([[4, 0], [2, 4], [1, -1]], jnp.int32)
        weights_MX = jnp.full((M, X), 0.5, jnp.float32)
        gate_up, down = _normal(8, dtype, (2 * E, 2 * F, D), (2 * E, D, F))
        inputs = x_MD, experts_MX, weights_MX, *biases
        if is_packed:
            return *inputs, *(part for w in (gate_up, down) for part in codec.quantize(w.astype(jnp.float32)))
        # Packed rows interleave gate and up; dense matrices keep them separate.
        gate_up = gate_up.reshape(2 * E, F, 2, D).transpose(0, 3, 2, 1)
        return *inputs, gate_up, down.swapaxes(1, 2)

    def run(x_MD, experts_MX, weights_MX, gate_up_bias, down_bias, *matrices):
        parts = ("_blocks", "_scales") if is_packed else ("",)
        names = [name + part for name in ("gate_up", "down") for part in parts]
        views = (LayerView(matrix.reshape(2, E, *matrix.shape[1:]), 1) for matrix in matrices)
        parameters = dict(zip(names, views, strict=True))
        parameters |= {"gate_up_bias": gate_up_bias, "down_bias": down_bias}
        return decode.experts(x_MD, experts_MX, weights_MX, parameters, SWIGLU)

    def plain(x_MD, experts_MX, weights_MX, gate_up_bias, down_bias, *matrices):
        if is_packed:
            pairs = matrices[:2], matrices[2:]
            gate_up, down = (codec.dequantize(blocks, scales, x_MD.dtype) for blocks, scales in pairs)
            gate_up = gate_up.reshape(2 * E, F, 2, D).transpose(0, 3, 2, 1)
            matrices = gate_up, down.swapaxes(1, 2)
        gate_up, down = (matrix[E:][experts_MX] for matrix in matrices)
        h = jnp.einsum("MD,MXDPF->PMXF", x_MD, gate_up) + gate_up_bias[experts_MX].transpose(2, 0, 1, 3)
        a_MXF = _plain_swiglu(h[0], h[1])
        y_MXD = jnp.einsum("MXF,MXFD->MXD", a_MXF, down) + down_bias[experts_MX]
        weights_MX = jnp.where(experts_MX >= 0, weights_MX, 0)
        return jnp.einsum("MXD,MX->MD", y_MXD, weights_MX)

    return Case(kernel, "", dtype, arrays, run, plain)


def _plain_swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    alpha, limit, up_offset = SWIGLU
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return gate * jax.nn.sigmoid(alpha * gate) * (up + up_offset)


def _swiglu_case(dtype: str) -> Case:
    def arrays() -> Arrays:
        return (5 * _normal(10, dtype, (300, 2 * 41))[0],)

    run = functools.partial(swiglu.swiglu_halves, SWIGLU)
    return Case("swiglu", "", dtype, arrays, run, lambda h: _plain_swiglu(h[:, :41], h[:, 41:]), 1)


def _rope_case(dtype: str) -> Case:
    B, T, N, J = 2, 300, 3, 11

    def arrays() -> Arrays:
        x_BTNH, angles_BTJ = _normal(11, "float32", (B, T, N, 2 * J), (B, T, J))
        return x_BTNH.astype(dtype), jnp.cos(angles_BTJ), jnp.sin(angles_BTJ)

    def plain(x, cos, sin):
        (a, b), cos, sin = jnp.split(x, 2, axis=-1), cos[:, :, None], sin[:, :, None]
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    return Case("rope", "", dtype, arrays, rope.rope, plain, num_differentiable=1)


def _adamw_case() -> Case:
    sizes = (5, 70_007)  # less than a vector, and several blocks
    adam = adamw.AdamW(0.9, 0.95, 1e-3, weight_decays=(0.0, 0.1))
    scalars = is_finite, clip, learning_rate, bias1, bias2 = 1.0, 0.5, 0.01, 0.19, 0.0975

    def arrays() -> Arrays:
        # Pairs of parameters, gradients, first and second moments.
        values = _normal(9, "float32", *((size,) for size in sizes * 4))
        return *values[:6], *map(jnp.square, values[6:])

    def run(*arrays):
        params, gradients, m, v = (arrays[i : i + 2] for i in range(0, 8, 2))
        results = adamw.update(adam, params, gradients, (m, v), jnp.array(scalars, jnp.float32))
        norm = adamw.global_norm(gradients) / 100  # not much larger than the other values
        return jnp.concatenate([norm[None], *(x for pair in results for x in pair)])

    def plain(*arrays):
        p, g, m, v = (jnp.concatenate(arrays[i : i + 2]) for i in range(0, 8, 2))
        m = (1 - adam.beta1) * clip * g + adam.beta1 * m
        v = (1 - adam.beta2) * (clip * g) ** 2 + adam.beta2 * v
        first_decay, second_decay = adam.weight_decays
        decay = jnp.where(jnp.arange(sum(sizes)) < sizes[0], first_decay, second_decay)
        update = m / bias1 / (jnp.sqrt(v / bias2) + adam.epsilon) + decay * p
        norm = jnp.sqrt(jnp.sum(g**2)) / 100
        return jnp.concatenate([norm[None], p - is_finite * learning_rate * update, m, v])

    return Case("adamw", "", "float32", arrays, run, plain)


def _unpack_case() -> Case:
    F, G = 137, 5

    def arrays() -> Arrays:
        keys = jax.random.split(jax.random.key(6))
        blocks = jax.random.bits(keys[0], (F, G, codec.BLOCK_BYTES), jnp.uint8)
        return blocks, jax.random.randint(keys[1], (F, G), 110, 130, jnp.uint8)

    def plain(blocks, scales):
        return codec.dequantize(blocks, scales, jnp.float32).T

    def run(blocks, scales):
        def on_host(blocks, scales):
            out = np.empty((codec.BLOCK_SIZE * G, F), np.float32)
            unpack.unpack(np.asarray(blocks), np.asarray(scales), 0, out)
            return out

        shape = jax.ShapeDtypeStruct((codec.BLOCK_SIZE * G, F), jnp.float32)
        return jax.pure_callback(on_host, shape, blocks, scales)

    return Case("mxfp4_unpack", "", "float32", arrays, run, plain)
