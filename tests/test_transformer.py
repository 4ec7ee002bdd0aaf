"""The whole model: independence of documents, padding and future tokens, scanning, remat, dropout, dtypes."""

import dataclasses
import functools
import pathlib
import runpy

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptoss_jax.config import FULL, SLIDING, ModelConfig
from gptoss_jax.kernels.attention.reference import apply_dropout
from gptoss_jax.model import transformer
from gptoss_jax.model.attention import Segments
from gptoss_jax.model.rope import rope_cos_sin
from gptoss_jax.model.transformer import (
    Block,
    RMSNorm,
    Transformer,
    abstract_params,
    bind,
    get_params,
    init_params,
    parameter_count,
    segment_positions,
)
from gptoss_jax.training.objectives import LANGUAGE_MODELING

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"

# The segment ids in most tests: two rows of 21 tokens.
SEGMENTS = jnp.array([np.repeat([1, 2, 0], [7, 9, 5]), np.repeat([1, 2, 3], [10, 4, 7])])


def random_tokens(config, seed=0, shape=(2, 21)):
    return jnp.asarray(np.random.default_rng(seed).integers(0, config.vocab_size, shape), jnp.int32)


def test_parameter_shapes(tiny_config):
    shapes = jax.tree.map(lambda leaf: leaf.shape, abstract_params(tiny_config))
    block = {
        "attention": {
            "q": (2, 24, 6, 8),
            "k": (2, 24, 2, 8),
            "v": (2, 24, 2, 8),
            "out": (2, 6, 8, 24),
            "q_bias": (2, 6, 8),
            "k_bias": (2, 2, 8),
            "v_bias": (2, 2, 8),
            "out_bias": (2, 24),
            "sinks": (2, 6),
        },
        "attention_norm": {"scale": (2, 24)},
        "moe": {
            "router": (2, 24, 5),
            "router_bias": (2, 5),
            "gate_up": (2, 5, 24, 2, 40),
            "gate_up_bias": (2, 5, 2, 40),
            "down": (2, 5, 40, 24),
            "down_bias": (2, 5, 24),
        },
        "moe_norm": {"scale": (2, 24)},
    }
    assert shapes == {
        "embedding": {"weight": (97, 24)},
        "blocks": {"0": block, "1": block},
        "final_norm": {"scale": (24,)},
        "head": {"weight": (97, 24)},
    }


def test_segment_positions():
    segments = jnp.array([[1, 1, 1, 2, 2, 3, 0, 0], [2, 2, 2, 2, 2, 2, 2, 1]])
    np.testing.assert_array_equal(
        segment_positions(segments), [[0, 1, 2, 0, 1, 0, 0, 1], [0, 1, 2, 3, 4, 5, 6, 0]]
    )


@pytest.mark.parametrize("changed", [(0, 1), (0, 2), (1, 1), (1, 2), (1, 3)])
def test_documents_do_not_attend_to_each_other(either_config, random_params, apply_model, changed):
    row, document = changed
    params = random_params(either_config)
    tokens = random_tokens(either_config)
    inside = (document == SEGMENTS) & (jnp.arange(2)[:, None] == row)
    before = apply_model(either_config, params, tokens, SEGMENTS)
    other = jnp.where(inside, random_tokens(either_config, seed=1), tokens)
    after = apply_model(either_config, params, other, SEGMENTS)
    rest = ~np.asarray(inside) & np.asarray(SEGMENTS > 0)
    np.testing.assert_array_equal(after[rest], before[rest])
    assert (np.abs(after - before)[inside].max(axis=-1) > 1e-3).mean() > 0.9


def test_a_document_has_the_same_logits_anywhere_in_a_row(either_config, random_params, apply_model):
    params = random_params(either_config)
    tokens = random_tokens(either_config)
    packed = apply_model(either_config, params, tokens, SEGMENTS)
    alone = jnp.zeros_like(tokens).at[0, :7].set(tokens[1, 14:]).at[1, :9].set(tokens[0, 7:16])
    segments = (jnp.arange(21) < jnp.array([[7], [9]])).astype(jnp.int32)
    found = apply_model(either_config, params, alone, segments)
    np.testing.assert_allclose(found[0, :7], packed[1, 14:], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found[1, :9], packed[0, 7:16], rtol=1e-4, atol=1e-4)


def test_padding_has_no_effect(either_config, random_params, apply_model):
    params = random_params(either_config)
    tokens = random_tokens(either_config)
    segments = jnp.where(jnp.arange(21) < jnp.array([[13], [18]]), 1, 0)
    other = jnp.where(segments == 0, random_tokens(either_config, seed=1), tokens)
    assert int((other != tokens).sum()) > 5
    before, after = (apply_model(either_config, params, t, segments) for t in (tokens, other))
    real = np.asarray(segments > 0)
    np.testing.assert_array_equal(after[real], before[real])

    @jax.jit
    def loss(tokens):
        batch = {
            "tokens": tokens,
            "targets": jnp.roll(tokens, -1, axis=1).at[:, 12:].set(3).at[:, 20].set(tokens[:, 20]),
            "segment_ids": segments,
            "positions": segment_positions(segments),
        }
        return LANGUAGE_MODELING.sums(bind(either_config, params), batch)

    (sums, stats), (other_sums, other_stats) = loss(tokens), loss(other)
    assert float(sums["loss"]) == float(other_sums["loss"]) > 31 * 0.5
    chex.assert_trees_all_equal(stats, other_stats)


def test_logits_are_causal(either_config, random_params, apply_model):
    params = random_params(either_config)
    tokens = random_tokens(either_config)
    before = apply_model(either_config, params, tokens)
    for t in (1, 9, 20):
        after = apply_model(either_config, params, tokens.at[:, t].add(1))
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        assert np.abs(after[:, t] - before[:, t]).max() > 1e-3


def test_default_segments_and_positions(either_config, random_params, apply_model):
    params, tokens = random_params(either_config), random_tokens(either_config)
    one = jnp.ones_like(tokens)
    plain = apply_model(either_config, params, tokens)
    np.testing.assert_array_equal(apply_model(either_config, params, tokens, one), plain)
    explicit = jnp.broadcast_to(jnp.arange(21), (2, 21))
    np.testing.assert_array_equal(apply_model(either_config, params, tokens, one, explicit), plain)
    packed = apply_model(either_config, params, tokens, SEGMENTS)
    positions = segment_positions(SEGMENTS)
    np.testing.assert_array_equal(apply_model(either_config, params, tokens, SEGMENTS, positions), packed)
    assert np.abs(apply_model(either_config, params, tokens, one, 2 * explicit) - plain).max() > 1e-2


def unrolled(config, params, tokens_BT, segments_BT):
    """The model as a plain loop over separate layers."""
    positions_BT = segment_positions(segments_BT)
    segments = Segments(segments_BT, positions_BT, rope_cos_sin(config, positions_BT))
    x_BTD = params["embedding"]["weight"][tokens_BT]
    period = len(config.period)
    for layer, layer_type in enumerate(config.resolved_layer_types):
        block = Block(config, layer_type, rngs=nnx.Rngs(0))
        graphdef, state = nnx.split(block)
        values = jax.tree.map(lambda a, r=layer // period: a[r], params["blocks"][str(layer % period)])
        nnx.replace_by_pure_dict(state, values)
        x_BTD, _, _ = nnx.merge(graphdef, state)(x_BTD, segments)
    x = x_BTD * jax.lax.rsqrt(jnp.mean(x_BTD**2, axis=-1, keepdims=True) + config.rms_norm_eps)
    head = params["embedding" if config.tie_word_embeddings else "head"]["weight"]
    return (x * params["final_norm"]["scale"]) @ head.T


@pytest.mark.parametrize(
    "layer_types",
    [
        None,
        (SLIDING, SLIDING, FULL) * 2,
        (FULL, SLIDING, SLIDING),
        (FULL,) * 2,
    ],
)
def test_scanned_layers_match_a_loop(tiny_config, random_params, apply_model, layer_types):
    config = tiny_config
    if layer_types:
        config = dataclasses.replace(tiny_config, layer_types=layer_types, num_hidden_layers=len(layer_types))
    params, tokens = random_params(config), random_tokens(config)
    found = apply_model(config, params, tokens, SEGMENTS)
    expected = jax.jit(functools.partial(unrolled, config))(params, tokens, SEGMENTS)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)
    assert np.std(expected) > 0.5


def test_layer_types_matter(tiny_config, random_params, apply_model):
    # The same parameters, used in sliding and in full layers.
    sliding = dataclasses.replace(tiny_config, layer_types=(SLIDING,), num_hidden_layers=1)
    full = dataclasses.replace(sliding, layer_types=(FULL,))
    params, tokens = random_params(sliding), random_tokens(sliding)
    a, b = (apply_model(config, params, tokens) for config in (sliding, full))
    # Within the first window, nothing is masked.
    np.testing.assert_allclose(a[:, :4], b[:, :4], rtol=1e-5, atol=1e-5)
    assert (np.abs(a - b)[:, 4:].max(axis=-1) > 1e-3).all()


def loss_and_gradients(config, params, dropout_key=None):
    tokens = random_tokens(config)
    batch = {
        "tokens": tokens,
        "targets": jnp.roll(tokens, -1, axis=1),
        "segment_ids": SEGMENTS,
        "positions": segment_positions(SEGMENTS),
    }

    def loss(params):
        sums, _ = LANGUAGE_MODELING.sums(bind(config, params), batch, dropout_key=dropout_key)
        return sums["loss"]

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.slow
def test_remat_changes_nothing(tiny_config, random_params):
    # With dropout: recomputation must use the same mask.
    config = dataclasses.replace(
        tiny_config, residual_dropout=0.1, attention_dropout=0.2, layer_types=(SLIDING,) * 4
    )
    params, key = random_params(config), jax.random.key(3)
    nats, grads = loss_and_gradients(config, params, key)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grads))
    assert largest > 1
    for remat in ("dots", "block"):
        other_nats, other = loss_and_gradients(dataclasses.replace(config, remat=remat), params, key)
        assert float(other_nats) == pytest.approx(float(nats), rel=1e-6)
        chex.assert_trees_all_close(other, grads, rtol=1e-3, atol=1e-5 * largest)


@pytest.mark.slow
def test_unstacked_layers_give_the_same_results(tiny_config, random_params):
    params = random_params(tiny_config)
    apart = dataclasses.replace(tiny_config, scan_layers=False)
    period = len(tiny_config.period)

    def unstacked(tree):
        layers = range(tiny_config.num_hidden_layers)
        blocks = {
            str(i): jax.tree.map(lambda x, i=i: x[i // period, None], tree["blocks"][str(i % period)])
            for i in layers
        }
        return tree | {"blocks": blocks}

    chex.assert_trees_all_equal_shapes(unstacked(params), abstract_params(apart))
    nats, grads = loss_and_gradients(tiny_config, params)
    other_nats, other = loss_and_gradients(apart, unstacked(params))
    assert float(other_nats) == pytest.approx(float(nats), rel=1e-6)
    chex.assert_trees_all_close(other, unstacked(grads), rtol=1e-4, atol=1e-4)


def test_remat_recomputes(tiny_config):
    # A rematerialized block saves less for the backward pass.
    params = abstract_params(tiny_config)

    def kept(remat):
        config = dataclasses.replace(tiny_config, remat=remat)

        def residuals(params, tokens):
            return jax.vjp(lambda p: bind(config, p).hidden_states(tokens)[0], params)[1]

        shapes = jax.eval_shape(residuals, params, jax.ShapeDtypeStruct((2, 64), jnp.int32))
        return sum(leaf.size for leaf in jax.tree.leaves(shapes))

    assert kept("block") < kept("dots") < kept("none")


def test_dropout_follows_its_key(tiny_config, random_params):
    config = dataclasses.replace(
        tiny_config, residual_dropout=0.3, attention_dropout=0.3, num_hidden_layers=2
    )
    params, tokens = random_params(config), random_tokens(config)

    @jax.jit
    def hidden(key):
        return bind(config, params).hidden_states(tokens, dropout_key=key)[0]

    first = hidden(jax.random.key(0))
    np.testing.assert_array_equal(first, hidden(jax.random.key(0)))
    assert np.abs(first - hidden(jax.random.key(1))).max() > 0.1
    without = dataclasses.replace(config, residual_dropout=0.0, attention_dropout=0.0)
    plain = jax.jit(lambda key: bind(without, params).hidden_states(tokens, dropout_key=key)[0])
    # Without a key nothing is dropped, and with a rate of zero the key has no effect.
    no_key = jax.jit(lambda: bind(config, params).hidden_states(tokens)[0])()
    np.testing.assert_array_equal(no_key, plain(jax.random.key(0)))
    assert np.abs(first - no_key).max() > 0.1


def test_every_layer_has_its_own_dropout_mask(tiny_config):
    # Four blocks that each add one: the residual stream counts how often a position was kept.
    config = dataclasses.replace(tiny_config, residual_dropout=0.5)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), abstract_params(config))
    for block in params["blocks"].values():
        block["attention"]["out_bias"] += 1.0
    params["final_norm"]["scale"] += 1.0
    run = jax.jit(lambda tokens, key: bind(config, params).hidden_states(tokens, dropout_key=key)[0])
    hidden = run(random_tokens(config), jax.random.key(0))
    # The final norm scales rows: differences within one are counts from 0 to 4.
    smallest = jnp.min(jnp.where(hidden > 0, hidden, jnp.inf), axis=-1, keepdims=True)
    counts = np.bincount(np.rint(hidden / smallest).astype(int).ravel(), minlength=5)
    np.testing.assert_allclose(counts / counts.sum(), np.array([1, 4, 6, 4, 1]) / 16, atol=0.05)


def test_dropout_keeps_the_mean():
    ones = jnp.full((400, 500), 2.0)
    out = apply_dropout(ones, 0.2, jax.random.key(0))
    values = np.unique(np.asarray(out))
    np.testing.assert_allclose(values, [0, 2.5], rtol=1e-6)
    assert float(out.mean()) == pytest.approx(2.0, abs=0.02)
    assert apply_dropout(ones, 0.2, None) is ones and apply_dropout(ones, 0.0, jax.random.key(0)) is ones
    assert apply_dropout(ones.astype(jnp.bfloat16), 0.2, jax.random.key(0)).dtype == jnp.bfloat16


def test_bfloat16_is_close_to_float32(tiny_config, random_params, apply_model):
    config = dataclasses.replace(tiny_config, num_hidden_layers=2)
    params, tokens = random_params(config), random_tokens(config)
    exact = apply_model(config, params, tokens, SEGMENTS)
    low = apply_model(dataclasses.replace(config, compute_dtype="bfloat16"), params, tokens, SEGMENTS)
    assert low.dtype == np.float32
    # A token whose best experts nearly tie may change experts; most stay close.
    difference = np.abs(low - exact).max(axis=-1)[SEGMENTS > 0] / exact.std()
    assert np.median(difference) < 0.15
    assert difference.max() > 1e-4


def test_rms_norm_is_float32_with_its_scale(tiny_config):
    norm = RMSNorm(tiny_config)
    rng = np.random.default_rng(0)
    scale = (1 + rng.standard_normal(24)).astype(np.float32)
    norm.scale = nnx.Param(jnp.asarray(scale))
    x_BTD = jnp.asarray(100 * rng.standard_normal((2, 3, 24)), jnp.bfloat16)
    x = np.asarray(x_BTD, np.float32)
    exact = x / np.sqrt((x.astype(np.float64) ** 2).mean(axis=-1, keepdims=True) + 1e-5) * scale
    found = norm(x_BTD)
    assert found.dtype == jnp.bfloat16
    # Rounded only once, at the end: half a unit of the last of bfloat16's eight bits.
    np.testing.assert_allclose(np.asarray(found, np.float32), exact, rtol=2**-8 * 1.01)
    np.testing.assert_allclose(
        norm(jnp.full((1, 1, 24), 1e-3))[0, 0], scale * 1e-3 / np.sqrt(1.1e-5), rtol=1e-5
    )


def test_compute_dtype(tiny_config):
    auto = dataclasses.replace(tiny_config, compute_dtype="auto")
    expected = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    assert transformer.compute_dtype(auto) == jnp.dtype(expected)
    assert transformer.compute_dtype(tiny_config) == jnp.float32


@pytest.mark.parametrize(
    "preset, count",
    [
        ("quickstart", 6_717_164),
        ("tinystories", 105_722_880),
        ("gpt_oss_2b", 2_062_358_272),
        ("gpt_oss_20b", 20_914_757_184),
        ("gpt_oss_120b", 116_829_156_672),
    ],
)
def test_presets_have_the_published_parameter_counts(preset, count):
    assert parameter_count(runpy.run_path(str(CONFIGS / f"{preset}.py"))["config"].model) == count


def test_abstract_params_allocate_nothing():
    before = {id(array) for array in jax.live_arrays()}
    # 400 GB in float32.
    params = abstract_params(ModelConfig(num_hidden_layers=34, num_local_experts=128))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    new = [array for array in jax.live_arrays() if id(array) not in before]
    assert sum(array.nbytes for array in new) < 1000


def test_initial_parameters(tiny_config):
    config = dataclasses.replace(tiny_config, initializer_range=0.05)
    init = jax.jit(init_params, static_argnums=0)
    params = init(config, jax.random.key(7))
    chex.assert_trees_all_equal_shapes_and_dtypes(params, abstract_params(config))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path[-1].key
        if name == "scale":
            np.testing.assert_array_equal(leaf, 1)
        elif name == "sinks" or name.endswith("bias"):
            np.testing.assert_array_equal(leaf, 0)
        else:
            assert float(leaf.std()) == pytest.approx(0.05, rel=0.2), path
            assert abs(float(leaf.mean())) < 0.01, path
    # Stacked layers and the blocks of a period are initialized differently.
    down = [params["blocks"][i]["moe"]["down"][r] for i in "01" for r in range(2)]
    assert len({float(leaf[0, 0, 0]) for leaf in down}) == 4
    chex.assert_trees_all_equal(params, init(config, jax.random.key(7)))


def test_params_round_trip(either_config, random_params):
    params = random_params(either_config)
    model = bind(either_config, params)
    assert isinstance(model, Transformer)
    back = get_params(model)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    chex.assert_trees_all_equal(back, params)
    assert ("head" in back) != either_config.tie_word_embeddings
    # Binding other values does not change earlier models.
    bind(either_config, jax.tree.map(jnp.zeros_like, params))
    chex.assert_trees_all_equal(get_params(model), params)


def test_a_tied_head_is_the_embedding(notebook_config, random_params):
    model = bind(notebook_config, random_params(notebook_config))
    hidden_BTD = jnp.ones((1, 1, notebook_config.hidden_size))
    _, (head_VD,) = model.head_operands(hidden_BTD)
    np.testing.assert_array_equal(head_VD, model.embedding.weight[...])
    assert not hasattr(model, "head")


def test_sinks_reach_the_logits(tiny_config, random_params, apply_model):
    params, tokens = random_params(tiny_config), random_tokens(tiny_config)
    before = apply_model(tiny_config, params, tokens)
    blocks = {
        i: block | {"attention": block["attention"] | {"sinks": block["attention"]["sinks"] + 1}}
        for i, block in params["blocks"].items()
    }
    after = apply_model(tiny_config, params | {"blocks": blocks}, tokens)
    assert np.abs(after - before).max() > 0.05
