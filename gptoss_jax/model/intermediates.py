"""Captures intermediate values of the forward pass: attention weights and routing."""

import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gptoss_jax.config import require
from gptoss_jax.kernels import selection
from gptoss_jax.kernels.attention.reference import attention_mask, reference_attention_weights
from gptoss_jax.model.attention import Segments
from gptoss_jax.model.parameters import view_packed
from gptoss_jax.model.rope import rope_cos_sin
from gptoss_jax.model.transformer import Block, Transformer, compute_dtype, segment_positions
from gptoss_jax.parallel.context import context_size
from gptoss_jax.parallel.vocabulary import embedding_lookup


class LayerIntermediates(NamedTuple):
    """Attention weights and routing of one layer."""

    attention_BNTS: jax.Array  # float32, attention weights; together with the sink they sum to 1
    sink_BNT: jax.Array  # float32, probability of each head's learned sink; 0 without sinks
    router_logits_BTE: jax.Array  # float32
    experts_BTX: jax.Array  # int32, selected experts, best first
    expert_weights_BTX: jax.Array  # float32, their weights, which sum to 1


def capture_intermediates(
    model: Transformer, tokens_BT: jax.Array, segment_ids_BT: jax.Array | None = None
) -> list[LayerIntermediates]:
    """Runs the model on int32 tokens and returns the intermediate values of each layer.

    For inspecting short texts on one device: unlike the model, it materializes the attention weights,
    [B, N, T, T] in every layer. `segment_ids_BT` is as in `Transformer.__call__`; values at padding are
    meaningless.
    """
    config = model.config
    require(context_size() == 1, "mesh.context", context_size(), "must be 1 to capture intermediate values")
    if segment_ids_BT is None:
        segment_ids_BT = jnp.ones_like(tokens_BT)
    positions_BT = segment_positions(segment_ids_BT)
    segments = Segments(segment_ids_BT, positions_BT, rope_cos_sin(config, positions_BT))
    layers = []
    with jax.default_matmul_precision("highest"), selection.using(config.kernels):
        x_BTD = embedding_lookup(model.embedding.weight[...], tokens_BT, compute_dtype(config))
        for number in range(config.num_hidden_layers):
            index, position = divmod(number, len(model.blocks))
            stack = model.blocks[position]
            block = view_packed(jax.tree.map(operator.itemgetter(index), stack), stack, jnp.int32(index))
            x_BTD, layer = _run_block(block, x_BTD, segments)
            layers.append(layer)
    return layers


def _run_block(block: Block, x_BTD: jax.Array, segments: Segments) -> tuple[jax.Array, LayerIntermediates]:
    """`Block.__call__` without cache and dropout; also returns the intermediate values."""
    attention, moe, (B, T, D) = block.attention, block.moe, x_BTD.shape
    normed_BTD = block.attention_norm(x_BTD)
    q_BTNH, k_BTKH, _ = attention.qkv(normed_BTD, segments)
    mask_BTS = attention_mask(segments.ids_BT, segments.positions_BT, attention.spec)
    sinks_N = attention.sinks[...] if attention.config.learned_sinks else None
    weights = reference_attention_weights(q_BTNH, k_BTKH, mask_BTS, sinks_N=sinks_N)
    x_BTD = x_BTD + attention(normed_BTD, segments)[0]
    normed_BTD = block.moe_norm(x_BTD)
    routing = moe.route(normed_BTD.reshape(B * T, D))
    x_BTD = x_BTD + moe(normed_BTD, segments.ids_BT > 0)[0]
    return x_BTD, LayerIntermediates(*weights, *(value.reshape(B, T, -1) for value in routing))
