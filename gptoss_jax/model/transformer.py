"""The model: RMSNorm, Block, Embedding, Transformer, and conversion to and from a plain parameter tree.

The forward pass (`Transformer.hidden_states`) is this loop:

    x = embedding[tokens]
    for i, layer in enumerate(layers):
        x, cache[i], stats[i] = layer(x, segments, cache[i])
    return final_norm(x), cache, stats

written as a `jax.lax.scan`, so that 36 layers compile as fast as 4. gpt-oss alternates two kinds of layers, a
period; layers of a kind are stacked, and one iteration of the scan runs one period.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gptoss_jax.config import ModelConfig, require
from gptoss_jax.kernels import backend, selection
from gptoss_jax.kernels.attention.cached import LayerCacheView
from gptoss_jax.kernels.attention.reference import apply_dropout, segment_starts
from gptoss_jax.kernels.shapes import assert_shapes
from gptoss_jax.model import lora
from gptoss_jax.model.attention import Attention, Segments
from gptoss_jax.model.fake_quant import exported_config, exported_params
from gptoss_jax.model.kv_cache import KVCache
from gptoss_jax.model.moe import MoE, RouterStats
from gptoss_jax.model.parameters import normal, view_layer, view_packed
from gptoss_jax.model.rope import rope_cos_sin
from gptoss_jax.parallel.context import (
    context_size,
    join_sequences,
    map_sequences,
    split_sequences,
    splits_prefill,
)
from gptoss_jax.parallel.linear import LINEAR_OUTPUT, sharded_einsum
from gptoss_jax.parallel.mesh import batch_shards, current_axes
from gptoss_jax.parallel.rules import HIDDEN_BTD, constrain
from gptoss_jax.parallel.vocabulary import embedding_lookup

RunBlock = Callable[..., tuple[jax.Array, LayerCacheView | None, RouterStats]]


def compute_dtype(config: ModelConfig) -> jnp.dtype:
    """Returns the dtype of the activations; "auto" is float32 on CPU and bfloat16 elsewhere."""
    if config.compute_dtype == "auto":
        return jnp.dtype("float32" if backend.platform() == "cpu" else "bfloat16")
    return jnp.dtype(config.compute_dtype)


def segment_positions(segment_ids_BT: jax.Array) -> jax.Array:
    """Returns positions that restart at 0 in every segment, int32 [B, T]."""
    return jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32) - segment_starts(segment_ids_BT)


class RMSNorm(nnx.Module):
    """RMSNorm (Zhang and Sennrich 2019), computed in float32, including the scale."""

    def __init__(self, config: ModelConfig):
        self.scale = nnx.Param(jnp.ones(config.hidden_size, jnp.float32))
        self.epsilon = config.rms_norm_eps

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        assert_shapes("BTD D", x_BTD, self.scale[...])
        x = x_BTD.astype(jnp.float32)
        normed = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        return (normed * self.scale[...]).astype(x_BTD.dtype)


class Block(nnx.Module):
    """Pre-norm transformer block: attention and experts, each with a residual connection."""

    def __init__(self, config: ModelConfig, layer_type: str, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config)
        self.attention = Attention(config, layer_type, rngs=rngs)
        self.moe_norm = RMSNorm(config)
        self.moe = MoE(config, rngs=rngs)
        self.residual_dropout = config.residual_dropout

    def __call__(
        self,
        x_BTD: jax.Array,
        segments: Segments,
        cache: LayerCacheView | None = None,
        dropout_key: jax.Array | None = None,
        capacity_factor: float | None = None,
    ) -> tuple[jax.Array, LayerCacheView | None, RouterStats]:
        """Returns the residual stream [B, T, D], the cache with this layer's keys and values, and the router
        statistics."""
        keys = (None,) * 3 if dropout_key is None else jax.random.split(dropout_key, 3)
        y_BTD, cache = self.attention(self.attention_norm(x_BTD), segments, cache, keys[0])
        if cache is not None:
            # Zeroes padding, where the output bias was added: the decode kernels skip rows of zeros.
            y_BTD = jnp.where(segments.ids_BT[..., None] > 0, y_BTD, 0)
        x_BTD = x_BTD + apply_dropout(y_BTD, self.residual_dropout, keys[1])
        y_BTD, stats = self.moe(self.moe_norm(x_BTD), segments.ids_BT > 0, capacity_factor)
        x_BTD = x_BTD + apply_dropout(y_BTD, self.residual_dropout, keys[2])
        return constrain(x_BTD, HIDDEN_BTD), cache, stats


class Embedding(nnx.Module):
    """One vector per token, [V, D]: the input embedding or, if untied, the output head."""

    lora_a: nnx.Param  # [D, r], only in a head with a LoRA adapter
    lora_b: nnx.Param  # [V, r], only in a head with a LoRA adapter

    def __init__(self, config: ModelConfig, name: str, *, rngs: nnx.Rngs):
        self.weight = nnx.Param(normal(config, f"{name}.weight", rngs))


class Transformer(nnx.Module):
    """The gpt-oss model.

    Layers of one kind are stacked. gpt-oss-20b alternates two kinds, so `blocks` has two entries, whose
    parameters have a leading axis of 12; without `scan_layers`, it has one entry per layer, with a leading
    axis of 1.

    The forward pass does not mutate modules: caches, random keys and statistics are passed in and returned.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        repetitions = config.num_hidden_layers // len(config.period)

        @nnx.split_rngs(splits=repetitions)
        @nnx.vmap(in_axes=(None, 0), out_axes=0)
        def stacked(layer_type, rngs):
            return Block(config, layer_type, rngs=rngs)

        self.embedding = Embedding(config, "embedding", rngs=rngs)
        self.blocks = nnx.List([stacked(layer_type, rngs) for layer_type in config.period])
        self.final_norm = RMSNorm(config)
        if not config.tie_word_embeddings:
            self.head = Embedding(config, "head", rngs=rngs)
            lora.add_adapters(self.head, config, "head", rngs)
        self.config = config
        # The folder that the weights were loaded from, which also has the tokenizer files.
        self.origin: str | None = None

    def __call__(
        self,
        tokens_BT: jax.Array,
        segment_ids_BT: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the next-token logits, float32 [B, T, V].

        Args:
          tokens_BT: int32. Ids are not checked against the vocabulary size.
          segment_ids_BT: int32, documents count from 1, padding is 0; tokens see only their own document. By
            default, each row is one document.
          positions_BT: int32, must increase by one within a segment, which kernels rely on. By default,
            starts at 0 in every segment.
        """
        if segment_ids_BT is None:
            segment_ids_BT = jnp.ones_like(tokens_BT)
        if positions_BT is None:
            positions_BT = segment_positions(segment_ids_BT)
        return map_sequences(
            lambda rows: self.logits(self.hidden_states(*rows)[0]), (tokens_BT, segment_ids_BT, positions_BT)
        )

    def head_operands(self, hidden_BTD: jax.Array) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        """Returns activations and weights; the logits are the sum of their products.

        These are the hidden states and the output embedding [V, D] (if tied, the input embedding) and, if the
        head has an adapter, x A [B, T, r] and B [V, r].
        """
        head = self.embedding if self.config.tie_word_embeddings else self.head
        if not hasattr(head, "lora_a"):
            return (hidden_BTD,), (head.weight[...],)
        with jax.default_matmul_precision("highest"), selection.using(self.config.kernels):
            h_BTr = sharded_einsum("BTD,Dr->BTr", hidden_BTD, head.lora_a[...])
        h_BTr = lora.scaling(self.config, "head") * h_BTr
        return (hidden_BTD, h_BTr), (head.weight[...], head.lora_b[...])

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """Returns the logits for hidden states, float32 [B, T, V]."""
        operands = self.head_operands(hidden_BTD)
        with jax.default_matmul_precision("highest"), selection.using(self.config.kernels):
            products = [
                sharded_einsum(f"BT{axis},V{axis}->BTV", x, weight, result_type=jnp.float32)
                for axis, x, weight in zip("Dr", *operands, strict=False)
            ]
            return sum(products[1:], start=products[0])

    def hidden_states(
        self,
        tokens_BT: jax.Array,
        segment_ids_BT: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
        *,
        cache: KVCache | None = None,
        dropout_key: jax.Array | None = None,
        capacity_factor: float | None = None,
    ) -> tuple[jax.Array, KVCache | None, RouterStats]:
        """Runs all blocks. Returns the hidden states after the final norm, the cache and router statistics.

        On a mesh with a context axis, the rows must be those of `parallel.context.split_sequences`, with
        their positions; with a cache, whole sequences.

        Args:
          cache: keys and values of earlier tokens. Each row then continues its sequence: padding (segment 0)
            must come after its tokens, and positions are taken from the cache.
          dropout_key: enables the config's dropout.
          capacity_factor: see `parallel.expert_parallel.apply_experts`; None drops nothing.

        Returns:
          [B, T, D] in the compute dtype, the updated cache, and the router statistics stacked over layers,
          `load` and `probability` [L, E], `z` and `dropped` [L].

        Raises ValueError if the batch axes of the mesh do not divide the batch size, and if positions are
        missing on a mesh with a context axis.
        """
        config = self.config
        if segment_ids_BT is None:
            segment_ids_BT = jnp.ones_like(tokens_BT)
        positions_BT = _positions(segment_ids_BT, positions_BT, cache)
        assert_shapes("BT BT BT", tokens_BT, segment_ids_BT, positions_BT)
        counts_B = jnp.sum(segment_ids_BT > 0, axis=1, dtype=jnp.int32)
        is_split = cache is not None and splits_prefill(tokens_BT.shape[1])
        if is_split:
            rows = tokens_BT, segment_ids_BT, positions_BT
            tokens_BT, segment_ids_BT, positions_BT = split_sequences(rows)
        batch, shards = tokens_BT.shape[0], batch_shards(current_axes())
        allowed = f"must be a multiple of {shards} (devices that split it)"
        require(batch % shards == 0, "batch size", batch, allowed)
        segments = Segments(segment_ids_BT, positions_BT, rope_cos_sin(config, positions_BT))
        blocks = tuple(self.blocks)
        run_block = _run_block(config, capacity_factor)

        def one_period(carry, scanned):
            (x_BTD, stacks), (index, period, key) = carry, scanned
            stacks, stats = list(stacks), []
            for i, block in enumerate(blocks):
                layer_cache, layer_key = None, None if key is None else jax.random.fold_in(key, i)
                if cache is None:
                    block = view_packed(period[i], block, index)
                else:
                    # Decode kernels read the matrices of a layer in place from the stack.
                    block = view_layer(block, index)
                    layer_cache = LayerCacheView.of(stacks[i], index, cache.lengths, counts_B)
                x_BTD, layer_cache, layer_stats = run_block(block, x_BTD, segments, layer_cache, layer_key)
                stacks[i] = None if layer_cache is None else layer_cache.stacks
                stats.append(layer_stats)
            return (x_BTD, stacks), jax.tree.map(lambda *values: jnp.stack(values), *stats)

        # Multiplies float32 operands in float32; TPUs and GPUs would round them by default.
        with jax.default_matmul_precision("highest"), selection.using(config.kernels):
            x_BTD = embedding_lookup(self.embedding.weight[...], tokens_BT, compute_dtype(config))
            if cache is not None:
                x_BTD = jnp.where(segment_ids_BT[..., None] > 0, x_BTD, 0)
            x_BTD = constrain(x_BTD, HIDDEN_BTD)
            repetitions = config.num_hidden_layers // len(blocks)
            keys = None if dropout_key is None else jax.random.split(dropout_key, repetitions)
            carry: Any = x_BTD, [None] * len(blocks) if cache is None else cache.layers
            scanned = jnp.arange(repetitions, dtype=jnp.int32), blocks if cache is None else None, keys
            if repetitions > 1:
                (x_BTD, stacks), stats = jax.lax.scan(one_period, carry, scanned)
            else:
                (x_BTD, stacks), stats = one_period(carry, jax.tree.map(lambda leaf: leaf[0], scanned))
                stats = jax.tree.map(lambda leaf: leaf[None], stats)
            stats = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), stats)
            new_cache = None if cache is None else KVCache(stacks, cache.lengths + counts_B)
            x_BTD = self.final_norm(x_BTD)
            return join_sequences(x_BTD) if is_split else x_BTD, new_cache, stats


def _run_block(config: ModelConfig, capacity_factor: float | None) -> RunBlock:
    """Returns a function that runs a block, and that recomputes what `config.remat` says in the backward
    pass."""
    run_block: RunBlock = functools.partial(Block.__call__, capacity_factor=capacity_factor)
    if config.remat == "none":
        return run_block
    policies = {"block": None, "dots": jax.checkpoint_policies.save_only_these_names(LINEAR_OUTPUT)}
    return jax.checkpoint(run_block, policy=policies[config.remat])


def _positions(segment_ids_BT: jax.Array, positions_BT: jax.Array | None, cache: KVCache | None) -> jax.Array:
    """Returns the positions, [B, T]: those that are given, the cache's, or those of the segments."""
    if cache is not None:
        if positions_BT is not None:
            raise ValueError("positions cannot be passed together with a cache")
        return cache.lengths[:, None] + jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)
    if positions_BT is None:
        allowed = "must be given if mesh.context splits sequences"
        require(context_size() == 1, "positions_BT", None, allowed)
        return segment_positions(segment_ids_BT)
    return positions_BT


@functools.cache
def _abstract(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))


def abstract_params(config: ModelConfig) -> dict:
    """Returns the parameter tree as `jax.ShapeDtypeStruct`s, without allocating memory."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), get_params(_abstract(config)[1])
    )


def init_params(config: ModelConfig, key: jax.Array) -> dict:
    """Returns random parameters, float32: normal(0, initializer_range) weights, zero biases and sinks, and
    norm scales of one."""
    return get_params(nnx.state(Transformer(config, rngs=nnx.Rngs(params=key))))


def get_params(model: Transformer | nnx.State) -> dict:
    """Returns the parameters of a model as a tree of plain dicts and arrays, as in checkpoints."""
    state = nnx.state(model) if isinstance(model, nnx.Module) else model
    pure = nnx.to_pure_dict(state)
    return pure | {"blocks": {str(i): block for i, block in pure["blocks"].items()}}


def bind(config: ModelConfig, params: dict) -> Transformer:
    """Returns a model with the parameters of a tree as from `get_params`; works under `jit` and `grad`.

    With `config.expert_fake_quant`, it is the model that export would write (`model/fake_quant.py`).
    """
    config, params = exported_config(config), exported_params(config, params)
    graphdef, state = _abstract(config)
    state = jax.tree.map(lambda leaf: leaf, state)
    nnx.replace_by_pure_dict(state, params | {"blocks": {int(i): b for i, b in params["blocks"].items()}})
    return nnx.merge(graphdef, state)


def parameter_count(config: ModelConfig) -> int:
    """Returns the number of parameters, without allocating them; each packed weight counts as one."""
    plain = dataclasses.replace(config, expert_format="plain")
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(plain)))
