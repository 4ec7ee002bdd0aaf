"""The model: RMSNorm, Block, Transformer, and its parameters as a plain tree."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from gptoss_jax.config import ModelConfig, require
from gptoss_jax.kernels import backend, selection
from gptoss_jax.kernels.attention.mask import segment_starts
from gptoss_jax.kernels.stack import Layer
from gptoss_jax.model import rope
from gptoss_jax.model.attention import Attention, Cached
from gptoss_jax.model.kv_cache import Cache, LayerCache
from gptoss_jax.model.moe import MoE, RouterStats
from gptoss_jax.parallel.mesh import batch_shards, current_axes
from gptoss_jax.parallel.rules import HIDDEN_BTD, PRODUCT, constrain, product
from gptoss_jax.parallel.vocabulary import look_up


def compute_dtype(config: ModelConfig) -> jnp.dtype:
    """The type of the activations; "auto" is float32 on CPU and bfloat16 elsewhere."""
    if config.compute_dtype == "auto":
        return jnp.dtype("float32" if backend.platform() == "cpu" else "bfloat16")
    return jnp.dtype(config.compute_dtype)


def segment_positions(segment_ids_BT: jax.Array) -> jax.Array:
    """Positions that start from 0 wherever the segment changes, int32 [B, T]."""
    return jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32) - segment_starts(segment_ids_BT)


def dropped(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Dropout; without a key, nothing is dropped."""
    if key is None or rate == 0:
        return x
    kept = jax.random.bernoulli(key, jnp.float32(1 - rate), x.shape)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019): float32 inside, the scale included."""

    def __init__(self, config: ModelConfig):
        self.scale = nnx.Param(jnp.ones(config.hidden_size, jnp.float32))
        self.epsilon = config.rms_norm_eps

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        x = x_BTD.astype(jnp.float32)
        normed = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        return (normed * self.scale[...]).astype(x_BTD.dtype)


class Block(nnx.Module):
    """Attention and experts, each on a normed copy of the residual stream and added to it."""

    def __init__(self, config: ModelConfig, layer_type: str, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config)
        self.attention = Attention(config, layer_type, rngs=rngs)
        self.moe_norm = RMSNorm(config)
        self.moe = MoE(config, rngs=rngs)
        self.residual_dropout = config.residual_dropout

    def __call__(
        self, x_BTD, segment_ids_BT, positions_BT, cos_sin, cached=None, dropout_key=None, capacity=None
    ) -> tuple[jax.Array, LayerCache | None, RouterStats]:
        """[B, T, D] -> [B, T, D], the cache with this layer's keys and values, the router's statistics."""
        keys = (None,) * 3 if dropout_key is None else jax.random.split(dropout_key, 3)
        y_BTD, cache = self.attention(
            self.attention_norm(x_BTD), segment_ids_BT, positions_BT, cos_sin, cached, keys[0]
        )
        x_BTD = x_BTD + dropped(y_BTD, self.residual_dropout, keys[1])
        y_BTD, stats = self.moe(self.moe_norm(x_BTD), segment_ids_BT > 0, capacity)
        x_BTD = x_BTD + dropped(y_BTD, self.residual_dropout, keys[2])
        return constrain(x_BTD, HIDDEN_BTD), cache, stats


class Vocabulary(nnx.Module):
    """One vector per token, [V, D]: the embedding, and the head where it has its own."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(config.initializer_range, jnp.float32)
        self.weight = nnx.Param(normal(rngs.params(), (config.vocab_size, config.hidden_size)))


class Transformer(nnx.Module):
    """gpt-oss. `blocks` holds one period of `layer_types`, each block stacked over the period's repetitions.

    Modules are read-only in the forward pass: caches, keys and statistics are arguments and results.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        repetitions = config.num_hidden_layers // len(config.period)

        @nnx.split_rngs(splits=repetitions)
        @nnx.vmap(in_axes=(None, 0), out_axes=0)
        def stacked(layer_type, rngs):
            return Block(config, layer_type, rngs=rngs)

        self.embedding = Vocabulary(config, rngs=rngs)
        self.blocks = nnx.List([stacked(layer_type, rngs) for layer_type in config.period])
        self.final_norm = RMSNorm(config)
        if not config.tie_word_embeddings:
            self.head = Vocabulary(config, rngs=rngs)
        self.config = config
        # The folder that the weights came from; the tokenizer's files are there.
        self.origin: str | None = None

    def __call__(
        self,
        tokens_BT: jax.Array,
        segment_ids_BT: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
    ) -> jax.Array:
        """Logits of the next token, float32 [B, T, V].

        Args:
          tokens_BT: int32. Ids are not checked against the vocabulary here.
          segment_ids_BT: int32, documents from 1, padding 0; tokens see their own document only. Default: one
          document. positions_BT: int32, rising by one from token to token of a segment: kernels rely on it.
          Default: from 0 in every segment.
        """
        hidden_BTD, _, _ = self.hidden_states(tokens_BT, segment_ids_BT, positions_BT)
        return self.logits(hidden_BTD)

    @property
    def head_weight_VD(self) -> jax.Array:
        """The vectors that the logits are products with: the head's or, tied, the embedding's; float32."""
        return (self.embedding if self.config.tie_word_embeddings else self.head).weight[...]

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """Hidden states to float32 logits, [B, T, V]."""
        with jax.default_matmul_precision("highest"), selection.using(self.config.kernels):
            return product(
                ("head", "weight"), "BTD,VD->BTV", hidden_BTD, self.head_weight_VD, result_type=jnp.float32
            )

    def hidden_states(
        self,
        tokens_BT: jax.Array,
        segment_ids_BT: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
        *,
        cache: Cache | None = None,
        dropout_key: jax.Array | None = None,
        capacity: float | None = None,
    ) -> tuple[jax.Array, Cache | None, RouterStats]:
        """The residual stream after the final norm.

        Args:
          cache: keys and values of earlier tokens. Each row then goes on where its sequence has got to: its
            real tokens stand first, padding (segment 0) after them, and positions are the cache's.
          dropout_key: turns the config's dropout on.
          capacity: of the experts, see `expert_dispatch.apply_experts`; None drops nothing.

        Returns:
          [B, T, D] in the compute type; the new cache; the statistics of every layer's router, stacked:
          `load` and `probability` [L, E], `z` and `dropped` [L].

        Raises ValueError where the devices of a mesh cannot share the rows evenly.
        """
        if segment_ids_BT is None:
            segment_ids_BT = jnp.ones_like(tokens_BT)
        counts_B = jnp.sum(segment_ids_BT > 0, axis=1, dtype=jnp.int32)
        if cache is not None:
            require(
                positions_BT is None, "positions", "given", "must be left to the cache where there is one"
            )
            positions_BT = cache.lengths[:, None] + jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
        elif positions_BT is None:
            positions_BT = segment_positions(segment_ids_BT)
        rows, shards = tokens_BT.shape[0], batch_shards(current_axes())
        require(rows % shards == 0, "rows of tokens", rows, f"must be a multiple of {shards} devices")
        # Every product inside is float32 where its operands are: TPU and GPU would round them without being
        # told.
        with jax.default_matmul_precision("highest"), selection.using(self.config.kernels):
            # In float32, the type in which the gradients of a token's occurrences are added up.
            x_BTD = look_up(self.embedding.weight[...], tokens_BT).astype(compute_dtype(self.config))
            x_BTD = constrain(x_BTD, HIDDEN_BTD)
            x_BTD, layers, stats = self._through_blocks(
                x_BTD, segment_ids_BT, positions_BT, cache, counts_B, dropout_key, capacity
            )
            after = None if cache is None else Cache(layers, cache.lengths + counts_B)
            return self.final_norm(x_BTD), after, stats

    def _through_blocks(
        self, x_BTD, segment_ids_BT, positions_BT, cache, counts_B, dropout_key, capacity
    ) -> tuple[jax.Array, list[LayerCache] | None, RouterStats]:
        """The residual stream after the last block, the layers of the new cache, all routers' statistics."""
        config = self.config
        cos_sin = rope.rotation(config, positions_BT)
        parts = [nnx.split(block) for block in self.blocks]
        states = [state for _, state in parts]
        repetitions = config.num_hidden_layers // len(parts)
        in_place = cache is not None

        def one_block(graphdef, state, x_BTD, cached, key):
            block = nnx.merge(graphdef, state)
            return block(x_BTD, segment_ids_BT, positions_BT, cos_sin, cached, key, capacity)

        if config.remat != "none":
            policies = {"block": None, "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT)}
            one_block = jax.checkpoint(one_block, policy=policies[config.remat], static_argnums=0)

        def one_period(carry, scanned):
            (x_BTD, caches), (period, own, key) = carry, scanned
            caches, stats = list(caches), []
            for i, (graphdef, _) in enumerate(parts):
                layer_key = None if key is None else jax.random.fold_in(key, i)
                state = jax.tree.map(lambda leaf: Layer(leaf, period), states[i]) if in_place else own[i]
                cached = None if cache is None else Cached(caches[i], period, cache.lengths, counts_B)
                x_BTD, caches[i], layer_stats = one_block(graphdef, state, x_BTD, cached, layer_key)
                stats.append(layer_stats)
            return (x_BTD, caches), jax.tree.map(lambda *values: jnp.stack(values), *stats)

        keys = None if dropout_key is None else jax.random.split(dropout_key, repetitions)
        carry = x_BTD, [None] * len(parts) if cache is None else cache.layers
        own = None if in_place else states
        if repetitions > 1:
            scanned = jnp.arange(repetitions, dtype=jnp.int32), own, keys
            (x_BTD, caches), stats = jax.lax.scan(one_period, carry, scanned)
        else:
            first = jax.tree.map(lambda leaf: leaf[0], (own, keys))
            (x_BTD, caches), stats = one_period(carry, (jnp.int32(0), *first))
            stats = jax.tree.map(lambda leaf: leaf[None], stats)
        return x_BTD, caches, jax.tree.map(lambda s: s.reshape(-1, *s.shape[2:]), stats)


@functools.cache
def _abstract(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))


def abstract_params(config: ModelConfig) -> dict:
    """The parameter tree as `jax.ShapeDtypeStruct`s: the model of any size without its memory."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), get_params(_abstract(config)[1])
    )


def init_params(config: ModelConfig, key: jax.Array) -> dict:
    """Random parameters: normal(0, initializer_range) weights, zero biases and sinks, norms of one;
    float32."""
    return get_params(nnx.state(Transformer(config, rngs=nnx.Rngs(params=key))))


def get_params(model: Transformer | nnx.State) -> dict:
    """A model's parameters as a tree of plain dicts and arrays, the form that steps and checkpoints carry."""
    state = nnx.state(model) if isinstance(model, nnx.Module) else model
    pure = nnx.to_pure_dict(state)
    return pure | {"blocks": {str(i): block for i, block in pure["blocks"].items()}}


def bind(config: ModelConfig, params: dict) -> Transformer:
    """The model of a config around the parameters of such a tree, also inside of a traced function."""
    graphdef, state = _abstract(config)
    state = jax.tree.map(lambda leaf: leaf, state)
    nnx.replace_by_pure_dict(state, params | {"blocks": {int(i): b for i, b in params["blocks"].items()}})
    return nnx.merge(graphdef, state)


def parameter_count(config: ModelConfig) -> int:
    """How many parameters the model has, counted on the abstract tree; packed weights count as weights."""
    plain = dataclasses.replace(config, expert_format="plain")
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(plain)))
