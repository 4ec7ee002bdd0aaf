"""The decode kernels of CPUs against plain XLA."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_jax.kernels.cpu import build, decode
from gptoss_jax.kernels.layer_view import LayerView
from gptoss_jax.kernels.mxfp4 import codec
from gptoss_jax.model.kv_cache import init_cache
from gptoss_jax.model.moe import SwiGLU, expert_outputs
from gptoss_jax.model.parameters import LETTERS
from gptoss_jax.model.transformer import bind, init_params
from gptoss_jax.parallel import expert_parallel
from gptoss_jax.parallel.linear import sharded_einsum

pytestmark = pytest.mark.skipif(not build.is_available(), reason="needs a C++ compiler")


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def assert_near(found, expected, bound=2e-6):
    np.testing.assert_allclose(found, expected, rtol=0, atol=bound * float(jnp.max(jnp.abs(expected))))


# Sizes that are not multiples of a vector's 16 floats, and numbers of rows around those of a block of tokens.
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 16])
@pytest.mark.parametrize(
    ("equation", "inner", "outer"),
    [
        ("MD,DE->ME", (67,), [(5,)]),
        ("BTD,DNH->BTNH", (70,), [(3, 7), (1, 40), (600, 1)]),
        ("BTNH,NHD->BTD", (6, 11), [(131,)]),
        ("BTD,VD->BTV", (129,), [(77,)]),
        ("BTD,VD->BTV", (13,), [(6,)]),
        ("BTD,VD->BTV", (900,), [(70,)]),  # more columns than stay in cache for the next tokens
    ],
)
def test_einsum(rows, equation, inner, outer):
    x_letters, w_letters = equation.split("->")[0].split(",")
    kept = (rows,) if len(x_letters) - len(inner) == 1 else (1, rows)
    x = normal(0, *kept, *inner)
    transposed = not w_letters.startswith(x_letters[-len(inner) :])
    stacks = [normal(i, 3, *(out + inner if transposed else inner + out)) for i, out in enumerate(outer)]
    found = decode.einsum(equation, x, [LayerView(stack, jnp.int32(2)) for stack in stacks])
    for y, stack in zip(found, stacks, strict=True):
        assert_near(y, jnp.einsum(equation, x, stack[2], precision="highest"))


@pytest.mark.parametrize("equation", ["BTD,DNH->BTNH", "BTD,VD->BTV"])
def test_rows_of_zeros_give_zeros_and_change_no_other(equation):
    """Slots without a sequence are rows of zeros, which the kernels skip."""
    weight = normal(1, 2, *((30, 210) if equation.endswith("V") else (210, 3, 11)))

    def run(x_BTD):
        (y,) = decode.einsum(equation, x_BTD, [LayerView(weight, jnp.int32(1))])
        return np.asarray(y)

    x_BTD = np.asarray(normal(0, 1, 9, 210)).copy()
    x_BTD[0, [0, 3, 4, 8]] = 0
    found, others = run(x_BTD)[0], [1, 2, 5, 6, 7]
    assert not found[[0, 3, 4, 8]].any()
    np.testing.assert_array_equal(found[others], run(x_BTD[:, others])[0])
    assert not run(np.zeros_like(x_BTD)).any()


@pytest.mark.parametrize("tokens", [2, 40])  # by the kernel of decoding, and by that of prefill
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("narrow", [0, 1])
def test_weights_of_several_types(narrow, dtype, tokens):
    x, stacks = normal(0, 1, tokens, 20), [normal(i, 3, 20, 3, 5) for i in (1, 2)]
    stacks[narrow] = stacks[narrow].astype(dtype)
    found = sharded_einsum("BTD,DNH->BTNH", x, [LayerView(stack, jnp.int32(2)) for stack in stacks])
    for y, stack in zip(found, stacks, strict=True):
        assert_near(y, jnp.einsum("BTD,DNH->BTNH", x, stack[2].astype(x.dtype), precision="highest"))


def test_stacks_of_several_lengths_are_refused():
    views = [LayerView(normal(0, layers, 20, 3, 5), jnp.int32(1)) for layers in (2, 3)]
    with pytest.raises(AssertionError, match="different shape prefixes"):
        decode.einsum("BTD,DNH->BTNH", normal(1, 1, 2, 20), views)


def test_gradients_of_a_linear_layer():
    """Forward by the kernel for few tokens, backward by the grouped matmul."""
    x, w, g = normal(0, 2, 3, 20), normal(1, 20, 3, 5), normal(2, 2, 3, 3, 5)

    def loss(multiply):
        return lambda x, w: jnp.sum(multiply("BTD,DNH->BTNH", x, w) * g)

    found = jax.grad(loss(sharded_einsum), (0, 1))(x, w)
    expected = jax.grad(loss(functools.partial(jnp.einsum, precision="highest")), (0, 1))(x, w)
    for one, other in zip(found, expected, strict=True):
        assert_near(one, other)


def matrices(E, D, F, packed, seed=0):
    """Returns the parameters of E experts, and their values of gate_up, [E, F, 2, D], and down."""
    gate_up, down = normal(seed, E, F, 2, D), normal(seed + 1, E, D, F)
    if not packed:
        return {"gate_up": jnp.einsum("EFgD->EDgF", gate_up), "down": down.swapaxes(1, 2)}, gate_up, down
    parameters = {}
    for name, values in (("gate_up", gate_up.reshape(E, 2 * F, D)), ("down", down)):
        parameters[f"{name}_blocks"], parameters[f"{name}_scales"] = codec.quantize(values)
    values = [
        codec.dequantize(parameters[f"{name}_blocks"], parameters[f"{name}_scales"], jnp.float32)
        for name in ("gate_up", "down")
    ]
    return parameters, values[0].reshape(E, F, 2, D), values[1]


def stacked(parameters, layers, index):
    """Returns views of one layer, for the matrices of `layers` layers."""
    return {
        name: LayerView(value.reshape(layers, -1, *value.shape[1:]), index)
        for name, value in parameters.items()
    }


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("limit", [None, 1.5])
@settings(deadline=None, max_examples=10)
@given(data=st.data())
def test_experts_under_any_routing(packed, limit, data):
    E, D, F, X = 5, 64, 96, 2
    M = data.draw(st.integers(1, 7))
    choice = st.lists(st.integers(-1, E), min_size=M * X, max_size=M * X)
    chosen_MX = np.array(data.draw(choice), np.int32).reshape(M, X)
    parameters, gate_up, down = matrices(2 * E, D, F, packed)
    has_bias = data.draw(st.booleans())
    bias = {"gate_up_bias": normal(5, E, 2, F), "down_bias": normal(6, E, D)} if has_bias else {}
    x_MD, weights_MX = normal(7, M, D), jnp.abs(normal(8, M, X))
    activation = SwiGLU(1.7, limit, 0.5)
    views = stacked(parameters, 2, 1) | bias
    found = decode.experts(x_MD, chosen_MX, weights_MX, views, activation)
    expected = np.zeros((M, D))
    for m, x in np.ndindex(M, X):
        e = chosen_MX[m, x]
        if not 0 <= e < E:
            continue
        h = np.einsum("D,FgD->gF", x_MD[m], gate_up[E + e])
        h = h + bias["gate_up_bias"][e] if bias else h
        y = down[E + e] @ np.asarray(activation(*jnp.asarray(h, jnp.float32)))
        expected[m] += weights_MX[m, x] * (y + bias["down_bias"][e] if bias else y)
    np.testing.assert_allclose(found, expected, atol=5e-6 * max(np.abs(expected).max(), 1))


def test_mxfp4_experts_of_extreme_values():
    # All codes, under scales from small ones to the largest that no product overflows with.
    D, F, activation = 32, 64, SwiGLU(1.7, 7.0, 1.0)
    rng = np.random.default_rng(0)
    one_MD, only_M1, all_M1 = normal(1, 1, D), jnp.zeros((1, 1), int), jnp.ones((1, 1))
    parameters = {
        "gate_up_blocks": jnp.asarray(rng.integers(0, 256, (1, 2 * F, 1, 16), np.uint8)),
        "down_blocks": jnp.asarray(rng.integers(0, 256, (1, D, 2, 16), np.uint8)),
        "down_scales": jnp.asarray(rng.integers(120, 130, (1, D, 2), np.uint8)),
    }
    for scale in (20, 64, 127, 190):
        parameters["gate_up_scales"] = jnp.full((1, 2 * F, 1), scale, jnp.uint8)
        weights = {
            name: codec.dequantize(parameters[f"{name}_blocks"], parameters[f"{name}_scales"], jnp.float32)[0]
            for name in ("gate_up", "down")
        }
        h = weights["gate_up"] @ one_MD[0]
        expected = weights["down"] @ activation(h[0::2], h[1::2])
        found = decode.experts(one_MD, only_M1, all_M1, stacked(parameters, 1, 0), activation)
        assert_near(found[0], expected, 5e-6)
    # Scale 255 is NaN.
    parameters["down_scales"] = parameters["down_scales"].at[0, 3, 1].set(255)
    found = decode.experts(one_MD, only_M1, all_M1, stacked(parameters, 1, 0), activation)
    assert np.isnan(found[0]).tolist() == [d == 3 for d in range(D)]


CODES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def random_mxfp4(seed, rows, inner, scales):
    """Returns random blocks [1, rows, inner / 32, 16], their scales from the range `scales`, and their
    values in float64, [rows, inner]."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (1, rows, inner // 32, 16), np.uint8)
    exponents = rng.integers(*scales, blocks.shape[:-1], np.uint8)
    codes = CODES[np.stack([blocks & 15, blocks >> 4], axis=-1)].reshape(*blocks.shape[:-1], 32)
    values = np.ldexp(codes, exponents[..., None].astype(int) - 127).reshape(rows, inner)
    return jnp.asarray(blocks), jnp.asarray(exponents), values


def one_expert(x_MD, F, gate_up_scales, down_scales=(120, 128)):
    """Returns the result of `decode.experts` for one random expert and all tokens, and the exact one."""
    M, D = x_MD.shape
    gate_up_blocks, gate_up_exponents, gate_up = random_mxfp4(1, 2 * F, D, gate_up_scales)
    down_blocks, down_exponents, down = random_mxfp4(2, D, F, down_scales)
    parameters = {
        "gate_up_blocks": gate_up_blocks,
        "gate_up_scales": gate_up_exponents,
        "down_blocks": down_blocks,
        "down_scales": down_exponents,
    }
    views, routing = stacked(parameters, 1, 0), (jnp.zeros((M, 1), int), jnp.ones((M, 1)))
    found = decode.experts(jnp.asarray(x_MD), *routing, views, SwiGLU(1.7, None, 1.0))
    with np.errstate(invalid="ignore"):
        h_MU = np.asarray(x_MD, np.float64) @ gate_up.T
        gate, up = h_MU[:, ::2], h_MU[:, 1::2]
        return np.asarray(found), (gate / (1 + np.exp(-1.7 * gate)) * (up + 1)) @ down.T


# Numbers of blocks that are no multiple of the 2 or 4 that a vector holds, and tokens around a block of them.
@pytest.mark.parametrize(("D", "F"), [(32, 64), (96, 160), (224, 32), (320, 192)])
def test_mxfp4_experts_of_many_sizes(D, F):
    x_MD = np.asarray(normal(0, 9, D)) * np.float32(2) ** np.arange(-4, 5, dtype=np.float32)[:, None]
    found, expected = one_expert(x_MD, F, (116, 122))
    for y_D, exact_D in zip(found, expected, strict=True):
        assert_near(y_D, exact_D)
    for rows in (1, 2, 3, 4, 5):
        np.testing.assert_array_equal(one_expert(x_MD[:rows], F, (116, 122))[0], found[:rows])


def test_mxfp4_experts_of_extreme_activations():
    def check(x_MD, gate_up_scales):
        assert_near(*one_expert(np.asarray(x_MD, np.float32), 64, gate_up_scales))

    x_MD = np.array(normal(0, 3, 96))
    check(x_MD * np.where(np.arange(96) % 40 == 7, 1e4, 1), (104, 108))
    # The smallest scales: 2^-127 is a number that CPUs flush to zero.
    check(x_MD * 2.0**120, (0, 3))
    check(x_MD * 2.0**-100, (215, 220))
    check(np.zeros_like(x_MD) + 1e-3 * (np.arange(96) == 50), (124, 128))
    # The largest values of each binade, which need all digits: carries must not overflow the highest.
    bits = np.arange(0x3FFEFE00, 0x3FFF0140, 3, np.uint32)[: 92 * 3]
    for sign in (1, -1):
        blocks = np.full((92, 96), 0.37, np.float32)
        blocks[:, 9::32] = sign * bits.view(np.float32).reshape(92, 3)
        check(blocks, (116, 120))
    check(np.full((1, 96), np.nextafter(np.float32(2), np.float32(0))), (116, 120))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_mxfp4_experts_of_activations_that_are_not_finite(bad):
    x_MD = np.array(normal(0, 3, 96))
    found = one_expert(x_MD, 64, (116, 122))[0]
    x_MD[1, 70] = bad
    mixed = one_expert(x_MD, 64, (116, 122))[0]
    assert np.isnan(mixed[1]).all()
    np.testing.assert_array_equal(mixed[[0, 2]], found[[0, 2]])


def test_nan_propagates():
    parameters, _, _ = matrices(2, 32, 64, packed=False)
    arguments = normal(0, 3, 32), jnp.zeros((3, 1), int), jnp.ones((3, 1))
    for half in (0, 1):
        bad = parameters | {"gate_up": parameters["gate_up"].at[0, 3, half, 5].set(jnp.nan)}
        assert np.isnan(decode.experts(*arguments, stacked(bad, 1, 0), SwiGLU(1.7, 7.0, 1.0))).all()
    keys, values = normal(1, 1, 2, 1, 5, 16).at[0, 1, 0, 2, 3].set(jnp.nan), normal(2, 1, 2, 1, 5, 16)
    y_BNH = decode.attention(
        normal(3, 2, 3, 16), LayerView(keys, 0), LayerView(values, 0), jnp.array([4, 4]), None
    )
    assert np.isnan(y_BNH[1]).all() and np.isfinite(y_BNH[0]).all()


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_the_view_of_a_layer_equals_the_layer(packed):
    E, D, F = 4, 32, 64
    stacks, _, _ = matrices(3 * E, D, F, packed)
    stacks = {name: value.reshape(3, E, *value.shape[1:]) for name, value in stacks.items()}
    stacks["down_bias"], stacks["gate_up_bias"] = normal(3, 3, E, D), normal(4, 3, E, 2, F)
    activation = SwiGLU(1.7, 7.0, 1.0)
    for M in (3, 40):
        x_MD, weights_MX = normal(5, M, D), jnp.abs(normal(6, M, 2))
        chosen_MX = np.random.default_rng(7).integers(0, E, (M, 2))
        letters = {name: LETTERS[f"moe.{name}"] for name in stacks}
        run = functools.partial(
            expert_parallel.apply_experts,
            functools.partial(expert_outputs, activation),
            x_MD,
            expert_parallel.Routing(chosen_MX, weights_MX),
            letters=letters,
        )
        alone = run({name: value[1] for name, value in stacks.items()})[0]
        layers = {
            name: value[1] if name.endswith("_bias") else LayerView(value, jnp.int32(1))
            for name, value in stacks.items()
        }
        assert_near(run(layers)[0], alone, 5e-6)
        if M <= decode.MAX_DECODE_TOKENS and decode.supports_experts(x_MD, layers):
            assert_near(decode.experts(x_MD, chosen_MX, weights_MX, layers, activation), alone, 5e-6)


def quantized_and_dequantized(block):
    """Returns the parameters of layers with MXFP4 experts, and the same with their values in float32."""
    moe = dict(block["moe"])
    quantized, dense = dict(moe), dict(moe)
    for name, held, transposed in (("gate_up", "LEDgF", "LEFgD"), ("down", "LEFD", "LEDF")):
        rows = jnp.einsum(f"{held}->{transposed}", quantized.pop(name))
        # Rows of gate and up alternate.
        blocks, scales = codec.quantize(rows.reshape(*rows.shape[:2], -1, rows.shape[-1]))
        quantized |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        rows = codec.dequantize(blocks, scales, jnp.float32).reshape(rows.shape)
        dense[name] = jnp.einsum(f"{transposed}->{held}", rows)
    return block | {"moe": quantized}, block | {"moe": dense}


@pytest.mark.slow
def test_an_mxfp4_model_has_the_logits_of_its_dequantized_one(tiny_config, random_params, cpu_form):
    config = dataclasses.replace(tiny_config, hidden_size=64, intermediate_size=96, initializer_range=0.05)
    mxfp4_config = dataclasses.replace(config, expert_format="mxfp4")
    params = random_params(config)
    both = {name: quantized_and_dequantized(block) for name, block in params["blocks"].items()}
    quantized, dense = (params | {"blocks": {name: pair[i] for name, pair in both.items()}} for i in (0, 1))
    tokens_BT = np.random.default_rng(0).integers(0, 97, (2, 12))

    def logits(config, params):
        @jax.jit
        def read(params, cache, tokens_BT):
            model = bind(config, params)
            hidden_BTD, cache, _ = model.hidden_states(tokens_BT, cache=cache)
            return model.logits(hidden_BTD), cache

        cache, found = init_cache(config, 2, 12, jnp.float32), []
        for piece in (tokens_BT[:, :9], *(tokens_BT[:, t : t + 1] for t in (9, 10, 11))):
            more, cache = read(params, cache, piece)
            found.append(more)
        return jnp.concatenate(found, axis=1)

    assert_near(logits(mxfp4_config, quantized), logits(config, dense), 1e-5)


@pytest.mark.parametrize("tokens", [1, 512], ids=["decode", "prefill"])
def test_memory_of_mxfp4_experts(tiny_config, cpu_form, tokens):
    config = dataclasses.replace(
        tiny_config,
        hidden_size=192,
        intermediate_size=256,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=24,
        expert_format="mxfp4",
        max_position_embeddings=1024,
    )
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    weights = 4 * 24 * 3 * 192 * 256
    packed = sum(leaf.size for leaf in jax.tree.leaves(params) if leaf.dtype == jnp.uint8)
    assert packed == weights // 32 * 17
    cache = jax.eval_shape(lambda: init_cache(config, 1, 1024, jnp.float32))

    def step(params, cache, tokens_BT):
        model = bind(config, params)
        return model.hidden_states(tokens_BT, cache=cache)[:2]

    program = jax.jit(step, donate_argnums=1).lower(
        params, cache, jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    )
    memory = program.compile().memory_analysis()
    assert memory.temp_size_in_bytes < weights  # of float32: a layer of four has this many bytes
