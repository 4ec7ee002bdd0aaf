"""The architecture, and how a model is held. Fields have the names of the published config.json wherever that
file has one."""

import dataclasses
import os
import typing
import warnings
from typing import Any, Literal, Self

from gptoss_jax.config import hf, hf_write
from gptoss_jax.config.base import ConfigBase
from gptoss_jax.config.kernels import plain_kernels

SLIDING = "sliding_attention"
FULL = "full_attention"


@dataclasses.dataclass(frozen=True)
class RopeScaling(ConfigBase):
    """YaRN, the way the released models reach past the length they were pretrained at (MATH.md,
    "Forward")."""

    _section: typing.ClassVar[str] = "model.rope_scaling"

    # How many times longer than the original length the context is.
    factor: float = 32.0
    # Rotations within the original length above which a frequency is kept as it is.
    beta_fast: float = 32.0
    # Rotations below which a frequency is divided by `factor`.
    beta_slow: float = 1.0
    # Round the ends of the ramp between the two to whole indices.
    truncate: bool = False
    # Context length before scaling, in tokens.
    original_max_position_embeddings: int = 4096

    def _check(self) -> None:
        self._require(self.factor >= 1, "factor", "must be 1 or more")
        self._require(
            self.beta_fast > self.beta_slow > 0, "beta_fast", f"must be above beta_slow ({self.beta_slow})"
        )
        self._require_positive("original_max_position_embeddings")


@dataclasses.dataclass(frozen=True)
class ModelConfig(ConfigBase):
    """The architecture. The defaults are gpt-oss-20b."""

    _section: typing.ClassVar[str] = "model"

    # Entries of the embedding and of the head.
    vocab_size: int = 201088
    # Width of the residual stream (D).
    hidden_size: int = 2880
    # Width of one expert (F).
    intermediate_size: int = 2880
    # Number of blocks (L).
    num_hidden_layers: int = 24
    # Query heads (N).
    num_attention_heads: int = 64
    # Key/value heads (K); each serves N / K query heads.
    num_key_value_heads: int = 8
    # Size of one head (H); N * H need not be the hidden size.
    head_dim: int = 64
    # Experts in each layer (E).
    num_local_experts: int = 32
    # Experts that each token is sent to (X).
    num_experts_per_tok: int = 4
    # Keys a query of a sliding layer sees, itself included (W).
    sliding_window: int = 128
    # "sliding_attention" or "full_attention" for each layer; None alternates and starts with a sliding layer.
    layer_types: tuple[str, ...] | None = None
    # Longest context the model is meant for, in tokens.
    max_position_embeddings: int = 131072
    # Base of the rotary frequencies.
    rope_theta: float = 150000.0
    # YaRN; None keeps the plain rotary frequencies.
    rope_scaling: RopeScaling | None = RopeScaling()
    # Biases on the q, k, v and output projections.
    attention_bias: bool = True
    # Biases inside the experts.
    expert_bias: bool = True
    # Bias on the router.
    router_bias: bool = True
    # One learned logit per query head that takes part in the softmax and has no value.
    learned_sinks: bool = True
    # The first keys of a document that stay visible in sliding layers.
    sink_tokens: int = 0
    # Slope of the sigmoid inside SwiGLU.
    swiglu_alpha: float = 1.702
    # Clamp of SwiGLU's two halves; None leaves them alone.
    swiglu_limit: float | None = 7.0
    # Added to the linear half of SwiGLU.
    swiglu_up_offset: float = 1.0
    # The head uses the embedding's weights.
    tie_word_embeddings: bool = False
    # Dropout on the attention weights while training.
    attention_dropout: float = 0.0
    # Dropout on each branch before it joins the residual stream, while training.
    residual_dropout: float = 0.0
    # Added to the mean square in RMSNorm.
    rms_norm_eps: float = 1e-5
    # Standard deviation of the initial weights.
    initializer_range: float = 0.02
    # Weight of the load-balance loss; 0 turns it off.
    router_aux_loss_coef: float = 0.0
    # Weight of the router z-loss, mean(logsumexp(router logits)^2); 0 turns it off.
    router_z_loss_coef: float = 0.0
    # While training, the most rows an expert takes, as a multiple of its even share; what is beyond is
    # dropped, and counted. None drops nothing, however uneven the routing is.
    expert_capacity_factor: float | None = None
    # Type of the matrix products; auto is float32 on CPU and bfloat16 elsewhere. Parameters are always
    # float32.
    compute_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    # How the experts' matrices are held: plain arrays, or packed in MXFP4 as published (4.25 bits a weight;
    # for running a model, not for training it).
    expert_format: Literal["plain", "mxfp4"] = "plain"
    # Hand-written kernels: auto uses them, checked once on each new GPU or TPU machine; unchecked skips that
    # check; plain replaces all of them by plain XLA, and plain:attention,mxfp4_matmul the named ones. The
    # environment variable GPTOSS_JAX_KERNELS takes the same values, and also turns off kernels.
    kernels: str = "auto"
    # What the backward pass recomputes: nothing, all but the results of the products with attention's and the
    # router's weights ("dots"), or each whole block.
    remat: Literal["none", "dots", "block"] = "none"
    # Stack the layers and scan over one period of their types, so that compilation takes as long for 36
    # layers as for 4. False keeps each layer for itself: nothing is copied into stacks and out of them, which
    # is faster for a small model on CPU. It changes how a run's checkpoints are laid out.
    scan_layers: bool = True

    def _check(self) -> None:
        self._require_positive(
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "num_local_experts", "num_experts_per_tok", "sliding_window",
            "max_position_embeddings", "rope_theta", "swiglu_alpha", "rms_norm_eps", "initializer_range",
        )  # fmt: skip
        plain_kernels(self.kernels, self._path("kernels"))
        self._require(
            self.expert_capacity_factor is None or self.expert_capacity_factor > 0,
            "expert_capacity_factor",
            "must be above 0, or None to drop nothing",
        )
        self._require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            "num_attention_heads",
            f"must be a multiple of model.num_key_value_heads ({self.num_key_value_heads})",
        )
        self._require(
            self.head_dim % 2 == 0, "head_dim", "must be even, because rotary embedding turns pairs"
        )
        self._require(
            self.num_experts_per_tok <= self.num_local_experts,
            "num_experts_per_tok",
            f"must be at most model.num_local_experts ({self.num_local_experts})",
        )
        for name in ("attention_dropout", "residual_dropout"):
            self._require(0 <= getattr(self, name) < 1, name, "must be at least 0 and below 1")
        for name in ("sink_tokens", "router_aux_loss_coef", "router_z_loss_coef"):
            self._require(getattr(self, name) >= 0, name, "must be 0 or more")
        self._require(
            self.swiglu_limit is None or self.swiglu_limit > 0, "swiglu_limit", "must be above 0, or None"
        )
        if self.expert_format == "mxfp4":
            for name in ("hidden_size", "intermediate_size"):
                self._require(
                    getattr(self, name) % hf.MXFP4_GROUP == 0,
                    name,
                    f"must be a multiple of {hf.MXFP4_GROUP} where model.expert_format is 'mxfp4', "
                    f"which packs {hf.MXFP4_GROUP} weights along it under one scale",
                )
        if self.layer_types is not None:
            self._require(
                len(self.layer_types) == self.num_hidden_layers,
                "layer_types",
                f"must name a type for each of model.num_hidden_layers ({self.num_hidden_layers})",
            )
            self._require(
                set(self.layer_types) <= {SLIDING, FULL},
                "layer_types",
                f"may hold only {SLIDING!r} and {FULL!r}",
            )

    @property
    def resolved_layer_types(self) -> tuple[str, ...]:
        """The type of every layer, `layer_types` or the alternation it stands for."""
        return self.layer_types or tuple((SLIDING, FULL)[i % 2] for i in range(self.num_hidden_layers))

    @property
    def period(self) -> tuple[str, ...]:
        """The shortest run of layer types that the model is a whole number of repetitions of; all layers,
        where they are not to be stacked."""
        kinds, count = self.resolved_layer_types, self.num_hidden_layers
        if not self.scan_layers:
            return kinds
        return next(
            kinds[:p] for p in range(1, count + 1) if count % p == 0 and kinds[:p] * (count // p) == kinds
        )

    @classmethod
    def from_hf(cls, source: str | os.PathLike | dict[str, Any]) -> Self:
        """The architecture that a published config.json describes.

        `source` is such a file, its content, or a folder that holds one, as `config.json` or else as
        `original/config.json`. What the file does not speak of keeps this class's default: training-only
        settings, `compute_dtype`, and `expert_format`, since MXFP4 is the form of the weight files and not of
        the architecture. `router_aux_loss_coef` counts only where the file asks for the router's logits too.
        The alternation of layer types comes back as None.

        Warns, with the field and the value used, where a field is unknown, left over, or has its default
        because it is missing. Raises ValueError, with the file, the field, its value and what is allowed, for
        a file that cannot be read or is of another kind of model, a size that is missing, a value that is bad
        or not supported, and two fields that contradict each other.
        """
        values, place = hf.load(source)
        try:
            fields, notes = hf.read(values)
            config = cls.from_dict(fields)
        except ValueError as error:
            raise ValueError(f"{place}{error}") from None
        for note in notes:
            warnings.warn(f"{place}{note}", stacklevel=2)
        return config

    def to_hf(self, experts: str = "bfloat16") -> dict[str, Any]:
        """The content of a published config.json for this architecture, for weights of the form asked for.

        `experts` is "bfloat16", "float32", or "mxfp4" (packed experts, the rest bfloat16). Both transformers
        4.55 and 5 read the result, but 4.55 has SwiGLU's 1.702 and 7 built in, and takes YaRN's factor to be
        `max_position_embeddings / original_max_position_embeddings`. Token ids are the tokenizer's to add.

        Not carried: `compute_dtype`, `expert_format`, `kernels`, `remat`, `scan_layers`, `residual_dropout`
        and `router_z_loss_coef`.
        `router_aux_loss_coef` is written, but turned off; transformers' load-balance loss is about
        `num_experts_per_tok` times ours.

        The format always has the experts' and the router's biases and the sinks. A model without them is the
        same as one with biases of zero and sinks so low that they weigh nothing: whoever writes the weights
        adds those.

        Raises ValueError with all reasons for which the format cannot express this model.
        """
        return hf_write.write({**self.to_dict(), "layer_types": list(self.resolved_layer_types)}, experts)
