"""Attention weights and routing, captured from the forward pass."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import gptoss_jax as gx
from gptoss_jax.kernels.attention.reference import (
    attention_mask,
    reference_attention,
    reference_attention_weights,
)
from gptoss_jax.model.attention import AttentionSpec
from gptoss_jax.model.transformer import bind

# Two documents and padding; the window of both configs is 4.
SEGMENTS = np.array([[1] * 7 + [2] * 3 + [0] * 2], np.int32)
TOKENS = np.arange(12, dtype=np.int32)[None] * 7 % 90
REAL = SEGMENTS[0] > 0


@pytest.mark.parametrize("has_sinks", [True, False])
def test_weights_are_those_of_the_reference(has_sinks):
    keys = jax.random.split(jax.random.key(0), 4)
    q_BTNH, k_BSKH, v_BSKH = (
        jax.random.normal(key, (2, 5, heads, 8)) for key, heads in zip(keys[:3], (6, 2, 2), strict=True)
    )
    sinks_N = jax.random.normal(keys[3], (6,)) if has_sinks else None
    ids_BT = jnp.ones((2, 5), jnp.int32)
    mask_BTS = attention_mask(ids_BT, jnp.cumsum(ids_BT, axis=1), AttentionSpec(window=3))
    weights_BNTS, sink_BNT = reference_attention_weights(q_BTNH, k_BSKH, mask_BTS, sinks_N=sinks_N)
    np.testing.assert_allclose(weights_BNTS.sum(-1) + sink_BNT, 1, rtol=1e-6)
    assert (sink_BNT > 0).all() if has_sinks else (sink_BNT == 0).all()
    expected = reference_attention(q_BTNH, k_BSKH, v_BSKH, mask_BTS, sinks_N=sinks_N)
    v_BSNH = jnp.repeat(v_BSKH, 3, axis=2)
    np.testing.assert_allclose(
        jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS, v_BSNH, precision="highest"), expected, atol=1e-5
    )


@pytest.fixture(params=["stacked", "apart", "mxfp4"])
def model(request, tiny_config, random_params):
    changes = {"apart": {"scan_layers": False}, "mxfp4": {"expert_format": "mxfp4"}}.get(request.param, {})
    if request.param == "mxfp4":
        config = dataclasses.replace(tiny_config, hidden_size=32, intermediate_size=32, **changes)
        return gx.Transformer(config, rngs=nnx.Rngs(0))
    config = dataclasses.replace(tiny_config, **changes)
    return bind(config, random_params(config))


def test_routing_is_that_of_the_forward_pass(model):
    layers = gx.capture_intermediates(model, TOKENS, SEGMENTS)
    stats = model.hidden_states(TOKENS, SEGMENTS)[2]
    assert len(layers) == model.config.num_hidden_layers
    for layer, load_E, probability_E in zip(layers, stats["load"], stats["probability"], strict=True):
        chosen = np.asarray(layer.experts_BTX)[0, REAL]
        count_E = np.bincount(chosen.ravel(), minlength=len(load_E))
        np.testing.assert_allclose(count_E / chosen.size, load_E, atol=1e-6)
        softmax_TE = jax.nn.softmax(layer.router_logits_BTE[0, REAL], axis=-1)
        np.testing.assert_allclose(softmax_TE.mean(0), probability_E, atol=1e-5)
        np.testing.assert_allclose(layer.expert_weights_BTX.sum(-1), 1, rtol=1e-6)


def test_attention_sees_the_window_and_the_document(model):
    layers = gx.capture_intermediates(model, TOKENS, SEGMENTS)
    distance = np.arange(12)[:, None] - np.arange(12)
    visible = (distance >= 0) & (SEGMENTS[0][:, None] == SEGMENTS[0])
    for layer, kind in zip(layers, model.config.resolved_layer_types, strict=True):
        seen = visible & (distance < 4) if kind == "sliding_attention" else visible
        weights_NTS = np.asarray(layer.attention_BNTS)[0][:, REAL]
        assert ((weights_NTS > 0) == seen[REAL]).all(), kind
        np.testing.assert_allclose(weights_NTS.sum(-1) + layer.sink_BNT[0][:, REAL], 1, rtol=1e-5)


def test_a_model_without_sinks_and_biases(notebook_config, random_params):
    model = bind(notebook_config, random_params(notebook_config))
    layers = gx.capture_intermediates(model, TOKENS)
    assert all((np.asarray(layer.sink_BNT) == 0).all() for layer in layers)
    # Sliding layers keep the first two tokens in sight.
    assert (np.asarray(layers[0].attention_BNTS)[0, :, 11, :2] > 0).all()
    assert layers[0].experts_BTX.shape == (1, 12, 2)
