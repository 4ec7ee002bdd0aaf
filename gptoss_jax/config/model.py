"""Model architecture. Fields of the published config.json keep their names."""

import dataclasses
import os
import typing
import warnings
from typing import Annotated, Any, Literal, Self

from gptoss_jax.config import hf, hf_write
from gptoss_jax.config.base import (
    BelowOne,
    Bound,
    ConfigBase,
    NonNegative,
    Positive,
    PositiveOrNone,
    nearest,
    require,
)
from gptoss_jax.config.kernels import plain_kernels

SLIDING = "sliding_attention"
FULL = "full_attention"
# Matrices that LoRA can adapt: attention, experts, router and output head.
EXPERT_TARGETS = ("gate_up", "down")
LORA_TARGETS = ("q", "k", "v", "out", *EXPERT_TARGETS, "router", "head")


@dataclasses.dataclass(frozen=True)
class RopeScaling(ConfigBase):
    """YaRN (Peng et al. 2023): extends RoPE to contexts longer than those of pretraining."""

    _section: typing.ClassVar[str] = "model.rope_scaling"

    factor: float = 32.0  # Extended context length divided by the original
    beta_fast: float = 32.0  # Frequencies with more rotations than this in the original length are kept
    beta_slow: float = 1.0  # Frequencies with fewer rotations than this are divided by the factor
    truncate: bool = False  # Round the ends of the ramp between the two to integers
    original_max_position_embeddings: Positive[int] = 4096  # Original context length, in tokens

    def _check(self) -> None:
        self._require(self.factor >= 1, "factor", "must be 1 or more")
        ordered = self.beta_fast > self.beta_slow > 0
        self._require(ordered, "beta_fast", f"must be above beta_slow ({self.beta_slow})")


@dataclasses.dataclass(frozen=True)
class LoraConfig(ConfigBase):
    """LoRA (Hu et al. 2021): trains low-rank adapters next to frozen weights, y = x W + scaling (x A) B."""

    _section: typing.ClassVar[str] = "model.lora"

    rank: Positive[int] = 8  # Rank of the adapters outside the experts
    # Rank of the adapters of each expert; None means rank / num_experts_per_tok, at least 1.
    expert_rank: Annotated[int | None, Bound("must be above 0, or None", lambda x: x is None or x > 0)] = None
    alpha: Positive[float] = 16.0  # Sets the scaling, alpha / rank of the adapter
    rslora: bool = False  # Scale by alpha / sqrt(rank) instead (Kalajdzievski 2023)
    # Matrices to adapt: q, k, v and out (attention), gate_up and down (experts), router, head.
    targets: tuple[str, ...] = ("q", "k", "v", "out", *EXPERT_TARGETS)

    def _check(self) -> None:
        known = ", ".join(LORA_TARGETS)
        self._require(len(self.targets) > 0, "targets", f"must name at least one of {known}")
        for target in self.targets:
            near = nearest(target, LORA_TARGETS)
            hint = f" (did you mean {near}?)" if near else ""
            allowed = f"matches nothing{hint}; the targets are {known}"
            require(target in LORA_TARGETS, f"{self._section}.targets", target, allowed)
        self._require(len({*self.targets}) == len(self.targets), "targets", "must name each target once")

    def scaling(self, rank: int) -> float:
        """Returns the scaling of adapters of the given rank."""
        return self.alpha / (rank**0.5 if self.rslora else rank)


@dataclasses.dataclass(frozen=True)
class ModelConfig(ConfigBase):
    """Model architecture; the defaults are gpt-oss-20b."""

    _section: typing.ClassVar[str] = "model"

    vocab_size: Positive[int] = 201088  # Vocabulary size (V)
    hidden_size: Positive[int] = 2880  # Width of the residual stream (D)
    intermediate_size: Positive[int] = 2880  # Hidden width of an expert (F)
    num_hidden_layers: Positive[int] = 24  # Number of transformer blocks (L)
    num_attention_heads: Positive[int] = 64  # Number of query heads (N)
    num_key_value_heads: Positive[int] = 8  # Number of key/value heads (K); must divide N
    head_dim: Positive[int] = 64  # Size of a head (H); N * H may differ from the hidden size
    num_local_experts: Positive[int] = 32  # Number of experts per layer (E)
    num_experts_per_tok: Positive[int] = 4  # Number of experts per token (X)
    # Number of tokens that sliding-window layers attend to, including the current one (W).
    sliding_window: Positive[int] = 128
    # sliding_attention or full_attention for each layer. None alternates them, starting with sliding.
    layer_types: tuple[str, ...] | None = None
    max_position_embeddings: Positive[int] = 131072  # Maximum context length, in tokens
    rope_theta: Positive[float] = 150000.0  # Base of the RoPE frequencies
    rope_scaling: RopeScaling | None = RopeScaling()  # YaRN; None does not scale the RoPE frequencies
    attention_bias: bool = True  # Biases on the q, k, v and output projections
    expert_bias: bool = True  # Biases inside the experts
    router_bias: bool = True  # Biases on the router
    # Attention sinks: a learned logit per query head that takes part in the softmax but has no value.
    learned_sinks: bool = True
    # Number of tokens at the start of a document that sliding-window layers always see; unrelated to
    # learned_sinks.
    sink_tokens: NonNegative[int] = 0
    swiglu_alpha: Positive[float] = 1.702  # Slope of the sigmoid inside SwiGLU
    # Clamps SwiGLU's gate from above and `up` on both sides; None disables it.
    swiglu_limit: PositiveOrNone = 7.0
    swiglu_up_offset: float = 1.0  # Added to `up` in SwiGLU
    tie_word_embeddings: bool = False  # Use the embedding's weights for the output head
    attention_dropout: BelowOne = 0.0  # Dropout on the attention weights during training
    # Dropout on the output of attention and experts during training, before the residual addition.
    residual_dropout: BelowOne = 0.0
    rms_norm_eps: Positive[float] = 1e-5  # Epsilon of RMSNorm
    initializer_range: Positive[float] = 0.02  # Standard deviation of the initial weights
    router_aux_loss_coef: NonNegative[float] = 0.0  # Weight of the load-balance loss; 0 disables it
    # Weight of the router z-loss, mean(logsumexp(router logits)^2); 0 disables it.
    router_z_loss_coef: NonNegative[float] = 0.0
    # Capacity of an expert during training, as a multiple of its even share of tokens; excess assignments are
    # dropped and counted. None drops nothing.
    expert_capacity_factor: PositiveOrNone = None
    # Dtype of activations and matmuls; auto means float32 on CPU and bfloat16 elsewhere. Trained parameters
    # are float32.
    compute_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    # Format of the expert weights: plain arrays, or packed MXFP4 as published (4.25 bits per weight, for
    # inference and LoRA).
    expert_format: Literal["plain", "mxfp4"] = "plain"
    # Quantization-aware training: computes with the weights that gptoss convert (or merge) --experts mxfp4
    # will write, and trains float32 ones. Adapters are merged, experts are rounded to MXFP4, and all other
    # parameters to bfloat16.
    expert_fake_quant: bool = False
    # Custom kernels: auto uses those that pass a check, made once on each GPU or TPU machine; required stops
    # if one fails; unchecked skips the check, plain uses XLA instead, and plain:attention,mxfp4_matmul uses
    # XLA instead of the named kernels. The environment variable GPTOSS_JAX_KERNELS takes the same values.
    kernels: str = "auto"
    # Rematerialization in the backward pass, to save memory: none, dots (saves the outputs of the attention
    # projections and the router), or block (saves only the input of each block).
    remat: Literal["none", "dots", "block"] = "none"
    # Stack the layers and scan over them, so that compile time does not grow with their number. False is
    # faster for small models on CPU. Changes the checkpoint layout.
    scan_layers: bool = True
    lora: LoraConfig | None = None  # Low-rank adapters; if set, only they are trained

    def _check(self) -> None:
        plain_kernels(self.kernels, self._path("kernels"))
        heads, experts, layers = self.num_key_value_heads, self.num_local_experts, self.num_hidden_layers
        allowed = f"must be a multiple of model.num_key_value_heads ({heads})"
        self._require(self.num_attention_heads % heads == 0, "num_attention_heads", allowed)
        allowed = "must be even, because RoPE rotates pairs"
        self._require(self.head_dim % 2 == 0, "head_dim", allowed)
        allowed = f"must be at most model.num_local_experts ({experts})"
        self._require(self.num_experts_per_tok <= experts, "num_experts_per_tok", allowed)
        size, is_packed = hf.MXFP4_BLOCK_SIZE, self.expert_format == "mxfp4"
        cause = "model.expert_format is 'mxfp4'" if is_packed else "model.expert_fake_quant is True"
        why = f"{size} weights along this dimension share a scale"
        allowed = f"must be a multiple of {size} if {cause}, because {why}"
        for name in ("hidden_size", "intermediate_size") if is_packed or self.expert_fake_quant else ():
            self._require(getattr(self, name) % size == 0, name, allowed)
        kinds = self.resolved_layer_types
        allowed = f"must name a type for each of model.num_hidden_layers ({layers})"
        self._require(len(kinds) == layers, "layer_types", allowed)
        allowed = f"may contain only {SLIDING!r} and {FULL!r}"
        self._require({*kinds} <= {SLIDING, FULL}, "layer_types", allowed)
        has_head = self.lora is None or "head" not in self.lora.targets or not self.tie_word_embeddings
        allowed = "matches nothing, because model.tie_word_embeddings leaves the model without a head"
        require(has_head, "model.lora.targets", "head", allowed)

    def lora_rank(self, target: str) -> int:
        """Returns the adapter rank of a target, such as "q"; for experts, the rank per expert."""
        lora = self.lora
        assert lora is not None, "model.lora is None"
        if target not in EXPERT_TARGETS:
            return lora.rank
        return lora.expert_rank or max(1, lora.rank // self.num_experts_per_tok)

    def target_shape(self, target: str) -> tuple[int, int]:
        """Returns the input and output size of a target matrix; for experts, of one expert's matrix."""
        D, F = self.hidden_size, self.intermediate_size
        N, K = (self.head_dim * heads for heads in (self.num_attention_heads, self.num_key_value_heads))
        shapes = {"q": (D, N), "k": (D, K), "v": (D, K), "out": (N, D), "gate_up": (D, 2 * F), "down": (F, D)}
        return (shapes | {"router": (D, self.num_local_experts), "head": (D, self.vocab_size)})[target]

    @property
    def resolved_layer_types(self) -> tuple[str, ...]:
        """The type of every layer, with None resolved to alternating types."""
        if self.layer_types is None:
            return tuple((SLIDING, FULL)[i % 2] for i in range(self.num_hidden_layers))
        return self.layer_types

    @property
    def period(self) -> tuple[str, ...]:
        """The shortest repeating sequence of layer types; all layers if they are not scanned."""
        kinds, layers = self.resolved_layer_types, self.num_hidden_layers
        if not self.scan_layers:
            return kinds
        divisors = (size for size in range(1, layers + 1) if layers % size == 0)
        return next(kinds[:size] for size in divisors if kinds[:size] * (layers // size) == kinds)

    @classmethod
    def from_hf(cls, source: str | os.PathLike | dict[str, Any]) -> Self:
        """Reads a published config.json.

        Fields outside of the format keep their defaults: training settings, `compute_dtype`, and
        `expert_format`, since MXFP4 is a property of the weight files. `router_aux_loss_coef` is read only if
        the file sets `output_router_logits`. Alternating layer types are read as None.

        Args:
          source: the file, its content, or a folder with `config.json` or `original/config.json`.

        Warns about unknown, leftover and missing fields, with the value used. Raises a ValueError that names
        the file, the field, its value and what is allowed, for a different model type, a missing size, an
        invalid or unsupported value, and contradictory fields.
        """
        values, prefix = hf.load(source)
        try:
            fields, notes = hf.read(values)
            config = cls.from_dict(fields)
        except ValueError as error:
            raise ValueError(f"{prefix}{error}") from None
        for note in notes:
            warnings.warn(f"{prefix}{note}", stacklevel=2)
        return config

    def to_hf(self, experts: str = "bfloat16") -> dict[str, Any]:
        """Returns the content of a published config.json, for weights in the format `experts`.

        Both transformers 4.55 and 5 read it, but 4.55 hardcodes SwiGLU's 1.702 and 7, and computes YaRN's
        factor as `max_position_embeddings / original_max_position_embeddings`. Token ids are omitted.

        The format always has expert biases, router biases and sinks. A model without them is equivalent to
        one with zero biases and very low sinks, which are added when the weights are written.
        `router_aux_loss_coef` is written but turned off (transformers' loss is about `num_experts_per_tok`
        times ours). Not written: `compute_dtype`, `expert_format`, `kernels`, `remat`, `scan_layers`,
        `residual_dropout` and `router_z_loss_coef`.

        Args:
          experts: "bfloat16", "float32", or "mxfp4" (packed experts, the rest in bfloat16).

        Raises a ValueError that lists all reasons why the format cannot express this model, such as adapters.
        """
        return hf_write.write({**self.to_dict(), "layer_types": list(self.resolved_layer_types)}, experts)
