"""The router, SwiGLU and the experts, each against a slow and plain implementation."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptoss_jax.config import MeshConfig
from gptoss_jax.kernels.cpu import build
from gptoss_jax.model.moe import MoE, SwiGLU, router_stats, top_experts
from gptoss_jax.model.parameters import parameter_shardings, path_names, view_layer
from gptoss_jax.model.transformer import abstract_params, parameter_count
from gptoss_jax.parallel.mesh import make_mesh
from gptoss_jax.training.losses import load_balance_loss, router_z_loss

B, T = 2, 9


def test_softmax_over_the_top_experts_is_the_renormalized_softmax():
    logits = jnp.asarray(3 * np.random.default_rng(0).standard_normal((11, 7)), jnp.float32)
    experts, weights = top_experts(logits, 3)
    assert experts.shape == weights.shape == (11, 3) and weights.dtype == jnp.float32
    probability = np.asarray(jax.nn.softmax(logits, axis=-1), np.float64)
    for m in range(11):
        best = np.argsort(-probability[m])[:3]
        np.testing.assert_array_equal(experts[m], best)
        np.testing.assert_allclose(weights[m], probability[m, best] / probability[m, best].sum(), rtol=1e-5)


def test_routing_by_hand():
    experts, weights = top_experts(jnp.log(jnp.array([[1.0, 6.0, 2.0, 3.0]])), 2)
    np.testing.assert_array_equal(experts, [[1, 3]])
    np.testing.assert_allclose(weights, [[2 / 3, 1 / 3]], rtol=1e-6)


def test_ties_go_to_the_lower_index():
    experts, weights = top_experts(jnp.array([[1.0, 5.0, 1.0, 5.0, 5.0], [0.0, 0.0, 0.0, 0.0, 0.0]]), 2)
    np.testing.assert_array_equal(experts, [[1, 3], [0, 1]])
    np.testing.assert_array_equal(weights, [[0.5, 0.5], [0.5, 0.5]])


@pytest.mark.parametrize(
    ("gate", "up", "expected"),
    [
        (1.0, 0.5, 1.0 / (1 + math.exp(-1.702)) * 1.5),
        (10.0, 9.0, 7.0 / (1 + math.exp(-1.702 * 7)) * 8.0),  # both clamped from above
        (-3.0, -9.0, -3.0 / (1 + math.exp(1.702 * 3)) * -6.0),  # up from below
        (-10.0, 1.0, -10.0 / (1 + math.exp(17.02)) * 2.0),  # the gate is not clamped from below
        (2.0, -1.0, 0.0),  # one is added to up
    ],
)
def test_swiglu_by_hand(gate, up, expected):
    found = SwiGLU(1.702, 7.0, 1.0)(jnp.float32(gate), jnp.float32(up))
    assert float(found) == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_plain_swiglu_by_hand():
    found = SwiGLU(1.0, None, 0.0)(jnp.array([10.0, -2.0]), jnp.array([9.0, -8.0]))
    np.testing.assert_allclose(found, [90 / (1 + math.exp(-10)), 16 / (1 + math.exp(2))], rtol=1e-6)


def make_layer(config, **replaced):
    """Returns an MoE layer with random parameters, except the given ones."""
    rng = np.random.default_rng(1)
    moe = MoE(config, rngs=nnx.Rngs(0))
    for name, value in nnx.to_pure_dict(nnx.state(moe)).items():
        value = replaced.get(name, rng.standard_normal(value.shape) * (2.0 if "bias" in name else 0.5))
        setattr(moe, name, nnx.Param(jnp.asarray(value, jnp.float32)))
    return moe


def as_second_layer(moe):
    """The layer as decoding sees it: views of a stack, whose other layer is of NaN or large bytes."""

    def stack(leaf):
        other = jnp.full_like(leaf, jnp.nan if leaf.dtype == jnp.float32 else 200)
        return jnp.stack([other, leaf])

    return view_layer({"moe": jax.tree.map(stack, moe)}, jnp.int32(1))["moe"]


def by_tokens(moe, x_BTD, real_BT):
    """Applies its experts to each token, in float64."""
    config = moe.config
    p = {name: np.asarray(v, np.float64) for name, v in nnx.to_pure_dict(nnx.state(moe)).items()}
    x_BTD = np.asarray(x_BTD, np.float64)
    out = np.zeros_like(x_BTD)
    for b, t in np.argwhere(np.asarray(real_BT)):
        x = x_BTD[b, t]
        logits = x @ p["router"] + p.get("router_bias", 0)
        chosen = np.argsort(-logits, kind="stable")[: config.num_experts_per_tok]
        total = np.exp(logits[chosen]).sum()
        for e in chosen:
            h = np.einsum("D,DgF->gF", x, p["gate_up"][e])
            if config.expert_bias:
                h = h + p["gate_up_bias"][e]
            gate, up = h
            if config.swiglu_limit is not None:
                gate = np.minimum(gate, config.swiglu_limit)
                up = np.clip(up, -config.swiglu_limit, config.swiglu_limit)
            act = gate / (1 + np.exp(-config.swiglu_alpha * gate)) * (up + config.swiglu_up_offset)
            y = act @ p["down"][e]
            if config.expert_bias:
                y = y + p["down_bias"][e]
            out[b, t] += np.exp(logits[e]) / total * y
    return out


def run(moe, x_BTD, real_BT):
    graphdef, state = nnx.split(moe)
    return jax.jit(lambda state, x, real: nnx.merge(graphdef, state)(x, real))(state, x_BTD, real_BT)


def tokens(config, seed=2):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((B, T, config.hidden_size)), jnp.float32)


REAL = jnp.array([[True] * 7 + [False] * 2, [False] + [True] * 8])


def test_experts_match_a_loop_over_tokens(either_config):
    # A low limit, so that some values are clamped.
    config = either_config
    if config.swiglu_limit is not None:
        config = dataclasses.replace(config, swiglu_limit=1.5)
    moe, x = make_layer(config), tokens(config)
    found, _ = run(moe, x, REAL)
    expected = by_tokens(moe, x, REAL)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(found[~REAL], 0)


def test_down_bias_is_inside_of_the_weighted_sum(tiny_config):
    # With all else zero, the result is the mean of the biases of the two chosen experts, 1 and 3.
    config = tiny_config
    E, D, F = 5, 24, 40
    moe = make_layer(
        config,
        router=np.zeros((D, E)),
        router_bias=[0.0, 9.0, 0.0, 9.0, 0.0],
        gate_up=np.zeros((E, D, 2, F)),
        gate_up_bias=np.zeros((E, 2, F)),
        down_bias=np.arange(5.0)[:, None] * np.ones(D),
    )
    found, _ = run(moe, tokens(config), REAL)
    np.testing.assert_allclose(found[REAL], 2.0, rtol=1e-6)


def test_all_tokens_may_choose_the_same_experts(tiny_config):
    bias = np.array([-50.0, -50, 50, -50, 60])
    moe, x = make_layer(tiny_config, router_bias=bias), tokens(tiny_config)
    found, stats = run(moe, x, REAL)
    np.testing.assert_allclose(found, by_tokens(moe, x, REAL), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(stats["load"], [0, 0, 0.5, 0, 0.5], rtol=1e-6)


def test_gradients_match_those_of_every_expert_on_every_token(tiny_config):
    config = dataclasses.replace(tiny_config, swiglu_limit=1.5)
    graphdef, state = nnx.split(make_layer(config))
    x, cotangent = tokens(config), tokens(config, seed=3)

    def sorted_form(params, x):
        return jnp.sum(nnx.merge(graphdef, params)(x, REAL)[0] * cotangent)

    def dense_form(params, x):
        p = nnx.to_pure_dict(params)
        logits = x @ p["router"] + p["router_bias"]
        experts, weights = top_experts(logits.reshape(B * T, -1), config.num_experts_per_tok)
        share = jnp.einsum("MXE,MX->ME", jax.nn.one_hot(experts, 5), weights).reshape(B, T, 5)
        h = jnp.einsum("BTD,EDgF->BTEgF", x, p["gate_up"]) + p["gate_up_bias"]
        a = SwiGLU(config.swiglu_alpha, 1.5, config.swiglu_up_offset)(h[..., 0, :], h[..., 1, :])
        y = jnp.einsum("BTEF,EFD->BTED", a, p["down"])
        y = jnp.einsum("BTED,BTE->BTD", y + p["down_bias"], share)
        return jnp.sum(jnp.where(REAL[..., None], y, 0) * cotangent)

    found = jax.jit(jax.value_and_grad(sorted_form, argnums=(0, 1)))(state, x)
    expected = jax.jit(jax.value_and_grad(dense_form, argnums=(0, 1)))(state, x)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(found)]
    for path, f, e in zip(paths, jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(f, e, rtol=1e-3, atol=1e-3, err_msg=path)
        assert np.abs(e).max() > 0.1, path


def test_router_statistics_by_hand():
    # Probabilities (1/2, 1/4, 1/4), (1/8, 1/8, 3/4), and padding, which must not count.
    logits = jnp.log(jnp.array([[2.0, 1.0, 1.0], [1.0, 1.0, 6.0], [1.0, 90.0, 9.0]]))
    chosen = jnp.array([[0, 1], [2, 0], [1, 2]])
    stats = router_stats(logits, chosen, jnp.array([True, True, False]))
    np.testing.assert_allclose(stats["load"], [0.5, 0.25, 0.25], rtol=1e-6)
    np.testing.assert_allclose(stats["probability"], [0.3125, 0.1875, 0.5], rtol=1e-6)
    assert float(stats["z"]) == pytest.approx((math.log(4) ** 2 + math.log(8) ** 2) / 2, rel=1e-6)
    stacked = {name: value[None] for name, value in stats.items()}
    # 3 * (0.5 * 0.3125 + 0.25 * 0.1875 + 0.25 * 0.5)
    assert float(load_balance_loss(stacked)) == pytest.approx(0.984375, rel=1e-6)
    assert float(router_z_loss(stacked)) == pytest.approx(3.1229446, rel=1e-6)


def test_router_statistics_of_only_padding_are_zero():
    stats = router_stats(jnp.ones((4, 3)), jnp.zeros((4, 2), jnp.int32), jnp.zeros(4, bool))
    for value in stats.values():
        np.testing.assert_array_equal(value, 0)


def test_padding_does_not_count_in_router_statistics(tiny_config):
    x = tokens(tiny_config)
    graphdef, state = nnx.split(make_layer(tiny_config))
    stats_of = jax.jit(lambda x, real: nnx.merge(graphdef, state)(x, real)[1])
    stats, other = stats_of(x, REAL), stats_of(jnp.where(REAL[..., None], x, 7.0), REAL)
    for name in ("load", "probability", "z"):
        np.testing.assert_array_equal(stats[name], other[name])
    assert float(stats["load"].sum()) == pytest.approx(1.0, rel=1e-6)
    assert float(stats["probability"].sum()) == pytest.approx(1.0, rel=1e-6)
    all_real = stats_of(x, jnp.ones_like(REAL))
    assert np.abs(all_real["probability"] - stats["probability"]).max() > 1e-3


def test_router_is_float32_under_bfloat16(tiny_config):
    # In bfloat16 1.001 is 1, and the tie would go to expert 0.
    config = dataclasses.replace(tiny_config, num_experts_per_tok=1)
    router = np.zeros((24, 5))
    router[0] = [1.0, 0.0, 0.0, 1.001, 0.0]
    moe = make_layer(config, router=router, router_bias=np.zeros(5))
    x = tokens(config).at[..., 0].set(2.0).astype(jnp.bfloat16)
    y, stats = run(moe, x, REAL)
    assert y.dtype == jnp.bfloat16 and stats["load"].dtype == jnp.float32
    np.testing.assert_allclose(stats["load"], [0, 0, 0, 1, 0], rtol=1e-6)


def test_few_tokens_with_and_without_a_compiler(either_config, monkeypatch):
    moe = MoE(either_config, rngs=nnx.Rngs(2))
    for name in ("gate_up_bias", "down_bias"):
        if hasattr(moe, name):
            values = getattr(moe, name)
            values[...] = jax.random.normal(jax.random.key(7), values[...].shape)
    x_BTD = jax.random.normal(jax.random.key(1), (2, 3, either_config.hidden_size))
    real_BT = jnp.array([[True, True, True], [True, False, False]])
    few, _ = as_second_layer(moe)(x_BTD, real_BT)
    np.testing.assert_allclose(few, by_tokens(moe, x_BTD, real_BT), rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(build, "is_available", lambda: False)
    without, _ = as_second_layer(moe)(x_BTD, real_BT)
    np.testing.assert_allclose(few, without, atol=1e-5 * float(jnp.max(jnp.abs(without))))
    assert not np.any(few[1, 1:]) and np.all(np.any(few[0] != 0, axis=-1))


CODES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


@pytest.fixture(scope="module")
def packed_config(tiny_config):
    """A config with sizes that MXFP4 supports."""
    return dataclasses.replace(
        tiny_config, hidden_size=96, intermediate_size=64, swiglu_limit=1.5, expert_format="mxfp4"
    )


@pytest.fixture(scope="module")
def packed_moe(packed_config):
    """An MoE layer with random bytes in its packed experts, and other parameters random."""
    rng = np.random.default_rng(4)
    moe = nnx.eval_shape(lambda: MoE(packed_config, rngs=nnx.Rngs(0)))
    for name, value in nnx.to_pure_dict(nnx.state(moe)).items():
        if name.endswith("_blocks"):
            value = rng.integers(0, 256, value.shape, np.uint8)
        elif name.endswith("_scales"):
            value = rng.integers(121, 125, value.shape, np.uint8)
        else:
            value = rng.standard_normal(value.shape).astype(np.float32)
        setattr(moe, name, nnx.Param(jnp.asarray(value)))
    return moe


def numbers(moe, name):
    """Returns the dequantized rows [..., in] as float32."""
    blocks, scales = (np.asarray(getattr(moe, f"{name}_{part}")[...]) for part in ("blocks", "scales"))
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*scales.shape, 32)
    return np.ldexp(CODES[codes], scales[..., None].astype(int) - 127).reshape(*scales.shape[:-1], -1)


def test_packed_experts_match_their_dequantized_weights(packed_config, packed_moe):
    same = {
        name: getattr(packed_moe, name)[...]
        for name in ("router", "router_bias", "gate_up_bias", "down_bias")
    }
    plain = make_layer(
        dataclasses.replace(packed_config, expert_format="plain"),
        gate_up=np.stack([numbers(packed_moe, "gate_up")[:, g::2].swapaxes(1, 2) for g in (0, 1)], axis=2),
        down=np.einsum("EDF->EFD", numbers(packed_moe, "down")),
        **same,
    )
    x = tokens(packed_config)
    found, stats = run(packed_moe, x, REAL)
    expected, expected_stats = run(plain, x, REAL)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_array_equal(stats["load"], expected_stats["load"])
    np.testing.assert_allclose(found, by_tokens(plain, x, REAL), rtol=1e-4, atol=1e-4 * np.abs(found).max())
    # Few rows, as in decoding.
    found, _ = run(as_second_layer(packed_moe), x[:, :3], REAL[:, :3])
    expected = by_tokens(plain, x[:, :3], REAL[:, :3])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_shapes_and_sizes_of_packed_experts(packed_config):
    E, D, F, L = 5, 96, 64, 4
    config = dataclasses.replace(packed_config, num_hidden_layers=L)
    found = abstract_params(config)["blocks"]["0"]["moe"]
    packed = {name: leaf.shape for name, leaf in found.items() if leaf.dtype == jnp.uint8}
    assert packed == {
        "gate_up_blocks": (L // 2, E, 2 * F, D // 32, 16),
        "gate_up_scales": (L // 2, E, 2 * F, D // 32),
        "down_blocks": (L // 2, E, D, F // 32, 16),
        "down_scales": (L // 2, E, D, F // 32),
    }
    assert found.keys() - packed.keys() == {"router", "router_bias", "gate_up_bias", "down_bias"}
    # Weights are counted, not bytes: 3 D F in each expert of a layer.
    without = L * 3 * E * D * F
    plain = dataclasses.replace(config, expert_format="plain")
    assert parameter_count(config) == parameter_count(plain) > without
    held = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)))
    assert held == parameter_count(config) - without + without // 32 * 17


def test_packed_experts_are_split_along_experts_and_rows(packed_config):
    config = dataclasses.replace(packed_config, num_local_experts=6, vocab_size=98)
    tree = abstract_params(config)
    shardings = parameter_shardings(tree, make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2)))
    shards = {
        path_names(path)[-1]: sharding.shard_shape(leaf.shape)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(tree["blocks"]["0"]["moe"]),
            jax.tree.leaves(shardings["blocks"]["0"]["moe"]),
            strict=True,
        )
    }
    # Experts are split by 2 and rows by 4; blocks of 32 stay whole.
    assert shards["gate_up_blocks"] == (2, 3, 32, 3, 16) and shards["gate_up_scales"] == (2, 3, 32, 3)
    assert shards["down_blocks"] == (2, 3, 24, 2, 16) and shards["down_scales"] == (2, 3, 24, 2)


def test_initial_packed_experts_are_the_plain_ones_quantized(packed_config):
    packed = MoE(packed_config, rngs=nnx.Rngs(3))
    plain = MoE(dataclasses.replace(packed_config, expert_format="plain"), rngs=nnx.Rngs(3))
    np.testing.assert_array_equal(packed.router[...], plain.router[...])
    gate_up, down = np.asarray(plain.gate_up[...]), np.asarray(plain.down[...])
    rows = np.stack([gate_up[:, :, 0], gate_up[:, :, 1]], axis=-1).reshape(*gate_up.shape[:2], -1)
    for name, exact in (("gate_up", rows.swapaxes(1, 2)), ("down", down.swapaxes(1, 2))):
        # The error in a block is at most a fifth of its largest value.
        groups = np.abs(exact.reshape(*exact.shape[:-1], -1, 32))
        bound = np.repeat(groups.max(axis=-1) / 5, 32, axis=-1)
        error = np.abs(numbers(packed, name) - exact)
        assert (error <= bound + 1e-7).all() and error.max() > 0
