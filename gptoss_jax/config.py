"""Every setting of the project, as frozen dataclasses: `ModelConfig`, and `TrainConfig` with its parts.

Each class checks itself when it is made: a bad value is a `ValueError` that names the field, the value and
what is allowed. Fields of `ModelConfig` have the names of the published config.json wherever that file has
one.
"""

import dataclasses
import difflib
import functools
import json
import math
import os
import pathlib
import types
import typing
from typing import Any, Literal, Self

SLIDING = "sliding_attention"
FULL = "full_attention"


def require(condition: bool, field: str, value: object, allowed: str) -> None:
    """Raises the one form of error that a bad setting gets."""
    if not condition:
        raise ValueError(f"{field} is {value!r}: {allowed}")


def _fits(value: object, kind: Any) -> bool:
    """Whether a value may stand in a field of this annotation; an int may stand for a float."""
    origin = typing.get_origin(kind)
    if origin is Literal:
        return value in typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, choice) for choice in typing.get_args(kind))
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, typing.get_args(kind)[0]) for item in value)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


@functools.cache
def _annotations(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _spelled(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return " or ".join(repr(choice) for choice in typing.get_args(kind))
    if typing.get_origin(kind) is types.UnionType:
        return " or ".join(_spelled(choice) for choice in typing.get_args(kind))
    return {
        type(None): "None",
        float: "a finite number",
        int: "an integer",
        bool: "True or False",
        str: "text",
    }.get(kind, getattr(kind, "__name__", str(kind)))


class _Checked:
    """What the config classes share: type checks, and a plain dict there and back."""

    _section: typing.ClassVar[str] = ""

    def __post_init__(self) -> None:
        for name, kind in _annotations(type(self)).items():
            if name != "_section":
                value = getattr(self, name)
                require(_fits(value, kind), self._path(name), value, f"must be {_spelled(kind)}")
        self._check()

    def _check(self) -> None:
        """Checks what types cannot say."""

    def _path(self, name: str) -> str:
        return f"{self._section}.{name}" if self._section else name

    def _require(self, condition: bool, name: str, allowed: str) -> None:
        require(condition, self._path(name), getattr(self, name), allowed)

    def _require_positive(self, *names: str) -> None:
        for name in names:
            self._require(getattr(self, name) > 0, name, "must be above 0")

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON-ready values; `from_dict` reads it back."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Builds the config from what `to_dict` gave. An unknown field is an error with a suggestion."""
        kinds = {field.name: _annotations(cls)[field.name] for field in dataclasses.fields(cls)}
        made = {}
        for name, value in values.items():
            if name not in kinds:
                near = difflib.get_close_matches(name, kinds, n=1)
                hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(kinds)}"
                raise ValueError(f"{cls._section + '.' if cls._section else ''}{name}: unknown field{hint}")
            if isinstance(value, list):
                value = tuple(value)
            parts = [c for c in (kinds[name], *typing.get_args(kinds[name])) if dataclasses.is_dataclass(c)]
            if isinstance(value, dict) and parts:
                value = parts[0].from_dict(value)
            made[name] = value
        return cls(**made)


@dataclasses.dataclass(frozen=True)
class RopeScaling(_Checked):
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
class ModelConfig(_Checked):
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
    # Type of the matrix products; auto is float32 on CPU and bfloat16 elsewhere. Parameters are always
    # float32.
    compute_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    # What the backward pass recomputes: nothing, all but the matrix products' results ("dots"), or each whole
    # block.
    remat: Literal["none", "dots", "block"] = "none"

    def _check(self) -> None:
        self._require_positive(
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "num_local_experts", "num_experts_per_tok", "sliding_window",
            "max_position_embeddings", "rope_theta", "swiglu_alpha", "rms_norm_eps", "initializer_range",
        )  # fmt: skip
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
    def types_of_layers(self) -> tuple[str, ...]:
        """The type of every layer, `layer_types` or the alternation it stands for."""
        return self.layer_types or tuple((SLIDING, FULL)[i % 2] for i in range(self.num_hidden_layers))

    @property
    def period(self) -> tuple[str, ...]:
        """The shortest run of layer types that the model is a whole number of repetitions of."""
        kinds, count = self.types_of_layers, self.num_hidden_layers
        return next(
            kinds[:p] for p in range(1, count + 1) if count % p == 0 and kinds[:p] * (count // p) == kinds
        )


@dataclasses.dataclass(frozen=True)
class DataConfig(_Checked):
    """What to train on, and how it is cut into batches."""

    _section: typing.ClassVar[str] = "data"

    # stdlib, text:GLOB, jsonl:GLOB#field, parquet:GLOB#field, or hf:NAME[#field].
    source: str = "stdlib"
    # bytes, bpe:SIZE (trained on the source), file:tokenizer.json, or o200k_harmony.
    tokenizer: str = "bpe:4096"
    # Tokens in a row; documents are packed into rows and never see each other.
    seq_len: int = 512
    # Rows in one optimiser step, over all devices.
    batch_size: int = 16
    # Share of the documents held out for evaluation (at most 8 MiB of text).
    held_out: float = 0.05
    # Where tokenised text is kept between runs.
    cache_dir: str = "~/.cache/gptoss_jax"

    def _check(self) -> None:
        self._require(self.seq_len >= 2, "seq_len", "must be 2 or more")
        self._require_positive("batch_size")
        self._require(0 < self.held_out <= 0.5, "held_out", "must be above 0 and at most 0.5")


@dataclasses.dataclass(frozen=True)
class OptimConfig(_Checked):
    """The optimiser, its schedule, clipping and accumulation."""

    _section: typing.ClassVar[str] = "optim"

    # adamw; or muon, which orthogonalises the updates of the matrices inside the blocks and leaves the rest
    # to adamw: more work for a step, fewer steps.
    name: Literal["adamw", "muon"] = "adamw"
    # Peak learning rate.
    learning_rate: float = 3e-4
    # cosine falls from the peak to the end; wsd (warm-up, stable, decay) holds the peak and falls in a line
    # at the end.
    schedule: Literal["cosine", "wsd"] = "cosine"
    # Steps over which the learning rate rises in a line from 0.
    warmup_steps: int = 100
    # Share of all steps in which wsd falls.
    decay_fraction: float = 0.2
    # Learning rate of the last step, as a share of the peak.
    final_fraction: float = 0.1
    # Decay of the mean of the gradient (AdamW's; Muon's is 0.95).
    beta1: float = 0.9
    # Decay of the mean of the squared gradient.
    beta2: float = 0.95
    # Added to the root of the mean square.
    epsilon: float = 1e-8
    # Pulls matrices towards zero (not norms, biases, sinks, or the router's bias), times the learning rate.
    weight_decay: float = 0.1
    # Longest gradient; a longer one is scaled down to this norm. 0 turns clipping off.
    clip_norm: float = 1.0
    # Parts that a batch is worked through in, to save memory. The gradient of the loss is that of the whole
    # batch; the router's two losses are taken part by part and averaged.
    accumulate: int = 1

    def _check(self) -> None:
        self._require_positive("learning_rate", "epsilon", "accumulate")
        for name in ("warmup_steps", "weight_decay", "clip_norm"):
            self._require(getattr(self, name) >= 0, name, "must be 0 or more")
        for name in ("beta1", "beta2"):
            self._require(0 <= getattr(self, name) < 1, name, "must be at least 0 and below 1")
        self._require(0 < self.decay_fraction <= 1, "decay_fraction", "must be above 0 and at most 1")
        self._require(0 <= self.final_fraction <= 1, "final_fraction", "must be between 0 and 1")


@dataclasses.dataclass(frozen=True)
class MeshConfig(_Checked):
    """How many devices each axis of the mesh has; -1, for one axis at most, means all that are left."""

    _section: typing.ClassVar[str] = "mesh"

    # Devices that hold a copy of the parameters each and share the batch.
    data: int = -1
    # Devices that share the batch and split the parameters, which are gathered where they are used.
    fsdp: int = 1
    # Devices that split the experts.
    expert: int = 1
    # Devices that split heads and expert width.
    tensor: int = 1

    def _check(self) -> None:
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            self._require(
                size == -1 or size > 0, name, "must be above 0, or -1 for all devices that are left"
            )
        wild = [name for name, size in sizes.items() if size == -1]
        if len(wild) > 1:
            raise ValueError(f"mesh.{wild[1]} is -1: only one axis may be, and mesh.{wild[0]} is already")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(_Checked):
    """When the run is saved, and what is kept."""

    _section: typing.ClassVar[str] = "checkpoint"

    # Steps between checkpoints; one more is written at each evaluation and when the run is stopped.
    every: int = 250
    # How many of the latest are kept. The one with the best validation loss is kept besides.
    keep: int = 2

    def _check(self) -> None:
        self._require_positive("every", "keep")


@dataclasses.dataclass(frozen=True)
class EvalConfig(_Checked):
    """What is measured on held-out text along the way."""

    _section: typing.ClassVar[str] = "eval"

    # Steps between evaluations; one of all held-out text ends the run.
    every: int = 250
    # Batches of held-out text in each of those.
    batches: int = 8
    # Text that the sample written at each evaluation goes on from.
    prompt: str = ""
    # Tokens in the sample; 0 writes none.
    sample_tokens: int = 64
    # Softmax temperature of the sample.
    temperature: float = 0.8

    def _check(self) -> None:
        self._require_positive("every", "batches")
        for name in ("sample_tokens", "temperature"):
            self._require(getattr(self, name) >= 0, name, "must be 0 or more")


@dataclasses.dataclass(frozen=True)
class TrainConfig(_Checked):
    """One training run. `configs/` holds presets; every field can be set on the command line."""

    # The architecture.
    model: ModelConfig = ModelConfig()
    # What to train on.
    data: DataConfig = DataConfig()
    # How to optimise.
    optim: OptimConfig = OptimConfig()
    # How the devices are laid out.
    mesh: MeshConfig = MeshConfig()
    # When the run is saved.
    checkpoint: CheckpointConfig = CheckpointConfig()
    # When it is evaluated.
    eval: EvalConfig = EvalConfig()
    # Optimiser steps in the whole run.
    steps: int = 1000
    # Folder of the run; starting again with the same folder goes on from its last checkpoint.
    run_dir: str = "runs/default"
    # Seed of the initial weights, of the order of the data and of dropout.
    seed: int = 0
    # A run folder whose weights to start from; None starts from random ones.
    init_from: str | None = None
    # Steps between the rows of metrics.jsonl.
    log_every: int = 1

    def _check(self) -> None:
        self._require_positive("steps", "log_every")
        self._require(self.seed >= 0, "seed", "must be 0 or more")
        self._require(self.run_dir.strip() != "", "run_dir", "must be the name of a folder")
        require(
            self.data.seq_len <= self.model.max_position_embeddings,
            "data.seq_len",
            self.data.seq_len,
            f"must be at most model.max_position_embeddings ({self.model.max_position_embeddings})",
        )
        require(
            self.data.batch_size % self.optim.accumulate == 0,
            "optim.accumulate",
            self.optim.accumulate,
            f"must divide data.batch_size ({self.data.batch_size})",
        )

    def save(self, path: str | pathlib.Path) -> None:
        """Writes the whole config as JSON."""
        temporary = pathlib.Path(f"{path}.tmp")
        temporary.write_text(json.dumps(self.to_dict(), indent=2) + "\n")
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | pathlib.Path) -> Self:
        """Reads what `save` wrote. Raises ValueError for a file that is missing or is not such a config."""
        try:
            values = json.loads(pathlib.Path(path).read_text())
        except FileNotFoundError:
            raise ValueError(f"{path}: no such file; a run folder holds config.json") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: not JSON ({error})") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path}: must hold a JSON object")
        return cls.from_dict(values)
