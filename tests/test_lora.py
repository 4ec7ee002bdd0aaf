"""LoRA in the model: adapters equal the sum of weights that they stand for, forward, backward, decoding."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.params import assert_close, random_params, unpacked

from gptoss_jax.config import SLIDING, LoraConfig, ModelConfig
from gptoss_jax.config.model import LORA_TARGETS
from gptoss_jax.inference.generate import generate
from gptoss_jax.inference.sampling_params import SamplingParams
from gptoss_jax.model import lora
from gptoss_jax.model.parameters import merge_params, path_names, shape_of, split_params
from gptoss_jax.model.transformer import abstract_params, bind, init_params
from gptoss_jax.training.losses import cross_entropy

EVERY = LORA_TARGETS
# Target -> the adapted parameter, and the equation of its weight as a product of A and B.
WEIGHTS = {
    "q": ("attention.q", "LDr,LrNH->LDNH"),
    "k": ("attention.k", "LDr,LrKH->LDKH"),
    "v": ("attention.v", "LDr,LrKH->LDKH"),
    "out": ("attention.out", "LNHr,LrD->LNHD"),
    "router": ("moe.router", "LDr,Lre->LDe"),
    "gate_up": ("moe.gate_up", "LEDr,LErPF->LEDPF"),
    "down": ("moe.down", "LEFr,LErD->LEFD"),
    "head": ("head.weight", "Dr,Vr->VD"),
}


def adapted(config: ModelConfig, targets=EVERY, **changes) -> ModelConfig:
    """Returns a model with adapters of ranks 7 and, in the experts, 3."""
    lora_config = LoraConfig(**{"rank": 7, "expert_rank": 3, "alpha": 11.0, "targets": targets} | changes)
    return dataclasses.replace(config, lora=lora_config)


@pytest.fixture(scope="module")
def config_without(tiny_config):
    """A small model without adapters, of one block that is stacked twice."""
    return dataclasses.replace(tiny_config, num_hidden_layers=2, layer_types=(SLIDING,) * 2)


@pytest.fixture(scope="module")
def packed_config(config_without):
    return dataclasses.replace(config_without, hidden_size=96, intermediate_size=64, expert_format="mxfp4")


@functools.cache
def random_params_of(config):
    """Random parameters that keep activations small."""
    return jax.tree.map(jnp.asarray, random_params(config, lambda name: 0.1 if "lora" in name else 0.2))


def with_explicit_weights(config, params, xp=np):
    """Returns the parameters without adapters, whose products are added to the weights in full."""
    base = {"blocks": {i: dict(block) for i, block in params["blocks"].items()}}
    base |= {name: dict(value) for name, value in params.items() if name != "blocks"}
    for target in config.lora.targets:
        name, equation = WEIGHTS[target]
        module, field = name.split(".")
        a_name, b_name = ("lora_a", "lora_b") if target == "head" else (f"{field}_lora_a", f"{field}_lora_b")
        rank = 3 if target in ("gate_up", "down") else 7
        for tree in [base] if target == "head" else base["blocks"].values():
            weights = tree[module] = dict(tree[module])
            delta = xp.einsum(equation, weights.pop(a_name), weights.pop(b_name))
            weights[field] = weights[field] + 11.0 / rank * delta
    return base


@functools.cache
def _logits(config):
    return jax.jit(lambda params, tokens: bind(config, params)(tokens))


def tokens_of(config, rows=3, length=11):
    return jnp.asarray(np.random.default_rng(1).integers(0, config.vocab_size, (rows, length)), jnp.int32)


@pytest.mark.parametrize("targets", [EVERY, *((target,) for target in EVERY)], ids="-".join)
def test_an_adapter_equals_the_sum_of_weights(config_without, targets):
    config = adapted(config_without, targets)
    params, tokens = random_params_of(config), tokens_of(config)
    explicit = with_explicit_weights(config, params)
    found = _logits(config)(params, tokens)
    expected = _logits(config_without)(explicit, tokens)
    assert_close(found, expected, 1e-5)
    base = _logits(config_without)(split_params(params, lora.is_adapter)[1], tokens)
    assert np.abs(found - base).max() > 1e-2 * np.abs(base).max()


def test_the_dialect_without_biases_and_head(notebook_config):
    base = dataclasses.replace(notebook_config, num_hidden_layers=2, layer_types=(SLIDING,) * 2)
    config = adapted(base, tuple(t for t in EVERY if t != "head"))
    params, tokens = random_params_of(config), tokens_of(config)
    expected = _logits(base)(with_explicit_weights(config, params), tokens)
    assert_close(_logits(config)(params, tokens), expected, 1e-5)


def loss_of(config, params, tokens):
    model = bind(config, params)
    hidden, _, _ = model.hidden_states(tokens)
    targets, weights = jnp.roll(tokens, -1, axis=1), jnp.ones(tokens.shape).at[:, -1].set(0)
    return cross_entropy(*model.head_operands(hidden), targets, weights)


def adapter_gradients(config, explicit=False, packed=None):
    """Returns the loss and the gradients of random adapters; with `explicit`, they are added to the weights.
    `packed`: the config of the packed experts whose values to use, unpacked."""
    params, tokens = random_params_of(packed or config), tokens_of(config)
    if packed:
        params = unpacked(params)
    adapters, base = split_params(params, lora.is_adapter)

    def loss(adapters):
        params = merge_params(adapters, base)
        if not explicit:
            return loss_of(config, params, tokens)
        plain = dataclasses.replace(config, lora=None)
        return loss_of(plain, with_explicit_weights(config, params, jnp), tokens)

    return jax.jit(jax.value_and_grad(loss))(adapters)


expected_gradients = functools.cache(adapter_gradients)


@pytest.mark.parametrize("remat", ["none", "dots", "block"])
def test_gradients_are_those_of_the_sum_of_weights(config_without, remat):
    config = adapted(config_without)
    loss, found = adapter_gradients(dataclasses.replace(config, remat=remat))
    expected_loss, expected = expected_gradients(config, explicit=True)
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-6)
    assert_close(found, expected, 1e-5)


def test_adapters_of_packed_experts_equal_those_of_the_unpacked_ones(packed_config, cpu_form):
    config = adapted(packed_config)
    plain = dataclasses.replace(config, expert_format="plain")
    loss, found = adapter_gradients(config)
    expected_loss, expected = expected_gradients(plain, packed=config)
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-5)
    assert_close(found, expected, 1e-5)


DECODING = SamplingParams(max_new_tokens=9, logprobs=True)
PROMPTS = [[3, 1, 4, 1, 5], [2, 7], [9]]


@functools.cache
def decoded_with_explicit_weights(config):
    params = with_explicit_weights(config, unpacked(random_params_of(config)))
    return generate(
        bind(dataclasses.replace(config, lora=None, expert_format="plain"), params), PROMPTS, DECODING
    )


@pytest.mark.parametrize("form", [pytest.param("plain", marks=pytest.mark.slow), "mxfp4"])
def test_decoding_equals_the_sum_of_weights(packed_config, cpu_form, form):
    packed = adapted(packed_config)
    config, params = dataclasses.replace(packed, expert_format=form), random_params_of(packed)
    params = params if form == "mxfp4" else unpacked(params)
    found = generate(bind(config, params), PROMPTS, DECODING)
    expected = decoded_with_explicit_weights(packed)
    for f, e in zip(found, expected, strict=True):
        assert f.tokens == e.tokens
        np.testing.assert_allclose(f.logprobs, e.logprobs, atol=1e-4)


def test_a_new_adapter_changes_nothing(config_without):
    config = adapted(config_without)
    params = init_params(config, jax.random.key(0))
    adapters, base = split_params(params, lora.is_adapter)
    tokens = tokens_of(config)
    np.testing.assert_array_equal(_logits(config)(params, tokens), _logits(config_without)(base, tokens))
    for path, leaf in jax.tree_util.tree_leaves_with_path(adapters):
        name = path_names(path)[-1]
        assert leaf.dtype == jnp.float32
        if name.endswith("lora_b"):
            assert not leaf.any(), path
            continue
        # PEFT's: uniform within the root of the inputs, for each expert too.
        inputs = {"out_lora_a": 6 * 8, "down_lora_a": 40}.get(name, 24)
        assert 0.97 < np.abs(leaf).max() * math.sqrt(inputs) <= 1
        assert abs(leaf.mean()) < 0.1 / math.sqrt(inputs)


def test_shapes_and_counts(config_without):
    config = adapted(config_without)
    layers, D, N, K, H, E, F, V = 2, 24, 6, 2, 8, 5, 40, 97
    assert shape_of(config, "attention.q_lora_a") == (D, 7)
    assert shape_of(config, "attention.k_lora_b") == (7, K, H)
    assert shape_of(config, "moe.gate_up_lora_b") == (E, 3, 2, F)
    assert lora.adapter_counts(config) == {
        "q": layers * 7 * (D + N * H),
        "k": layers * 7 * (D + K * H),
        "v": layers * 7 * (D + K * H),
        "out": layers * 7 * (N * H + D),
        "router": layers * 7 * (D + E),
        "gate_up": layers * E * 3 * (D + 2 * F),
        "down": layers * E * 3 * (F + D),
        "head": 7 * (D + V),
    }
    adapters, _ = split_params(abstract_params(config), lora.is_adapter)
    assert sum(leaf.size for leaf in jax.tree.leaves(adapters)) == sum(lora.adapter_counts(config).values())


def test_targets_that_are_not_named_have_no_parameters(config_without):
    config = adapted(config_without, ("v", "down"))
    adapters, base = split_params(abstract_params(config), lora.is_adapter)
    names = {path_names(path)[-1] for path, _ in jax.tree_util.tree_leaves_with_path(adapters)}
    assert names == {"v_lora_a", "v_lora_b", "down_lora_a", "down_lora_b"}
    assert base == abstract_params(config_without)


@pytest.mark.parametrize(
    ("rank", "expert_rank", "rslora", "expected"),
    [
        (8, None, False, (8, 4, 2.0, 4.0)),
        (1, None, False, (1, 1, 16.0, 16.0)),
        (16, 5, False, (16, 5, 1.0, 3.2)),
        (16, 4, True, (16, 4, 4.0, 8.0)),
    ],
)
def test_ranks_and_scaling(config_without, rank, expert_rank, rslora, expected):
    config = adapted(config_without, rank=rank, expert_rank=expert_rank, alpha=16.0, rslora=rslora)
    scalings = lora.scaling(config, "q"), lora.scaling(config, "down")
    assert (config.lora_rank("q"), config.lora_rank("down"), *scalings) == expected


def test_adapters_are_cast_to_the_compute_type(config_without):
    config = dataclasses.replace(adapted(config_without), compute_dtype="bfloat16")
    params, tokens = random_params_of(config), tokens_of(config)
    hidden, _, _ = jax.eval_shape(lambda: bind(config, params).hidden_states(tokens))
    assert hidden.dtype == jnp.bfloat16
    _, gradients = adapter_gradients(config)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}
