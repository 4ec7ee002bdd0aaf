"""The config of a training run: model, data, optimizer, mesh, checkpoints and evaluations."""

import dataclasses
import os
import pathlib
import typing
from typing import Literal, Self

from gptoss_jax.config.base import BelowOne, ConfigBase, NonNegative, Positive, read_json, require, write_json
from gptoss_jax.config.model import EXPERT_TARGETS, ModelConfig
from gptoss_jax.config.paths import user_path
from gptoss_jax.config.preference import DpoConfig
from gptoss_jax.config.rl import GrpoConfig

STDLIB_PREFERENCES, PREFERENCES_GLOB = "stdlib-preferences", "preferences:"
STDLIB_PROMPTS, PROMPTS_GLOB = "stdlib-prompts", "prompts:"


def is_preferences(source: str) -> bool:
    """Returns True if a `data.source` has pairs of a chosen and a rejected answer."""
    return source == STDLIB_PREFERENCES or source.startswith(PREFERENCES_GLOB)


def is_prompts(source: str) -> bool:
    """Returns True if a `data.source` has prompts, whose answers are sampled."""
    return source == STDLIB_PROMPTS or source.startswith(PROMPTS_GLOB)


@dataclasses.dataclass(frozen=True)
class DataConfig(ConfigBase):
    """Training data, tokenizer and batches."""

    _section: typing.ClassVar[str] = "data"

    # Text: stdlib, text:GLOB, jsonl:GLOB#field, parquet:GLOB#field, or hf:NAME[:CONFIG[:SPLIT]][#field].
    # Conversations for fine-tuning: chat:GLOB (JSON, JSON lines or parquet), or stdlib-chat. Pairs of a
    # chosen and a rejected answer: preferences:GLOB, or stdlib-preferences. Prompts for reinforcement
    # learning: prompts:GLOB, or stdlib-prompts.
    source: str = "stdlib"
    # bytes, bpe:SIZE (trained on the source), o200k_harmony (gpt-oss's), or file:tokenizer.json. If the file
    # does not name its special tokens, append #bos=NAME,eos=NAME.
    tokenizer: str = "bpe:4096"
    # Tokens per row. Rows are packed with documents, which do not attend to each other.
    seq_len: int = 512
    batch_size: Positive[int] = 16  # Rows per optimizer step, summed over all devices
    # Fraction of the documents or conversations held out for evaluation (at most 8 MiB of text).
    val_fraction: float = 0.05
    # Folder in which tokenized text is cached; None is gptoss_jax in XDG_CACHE_HOME (default: ~/.cache).
    cache_dir: str | None = None
    # Tokens of a conversation to train on: everything that the assistant writes, only its final answers, or
    # all tokens including the prompts.
    train_on: Literal["assistant", "final", "all"] = "assistant"
    # Handling of conversations longer than seq_len: skip them, or cut off the end. Both are reported.
    overlong: Literal["skip", "cut"] = "skip"
    # Handling of rows that are no conversation to train on: skip and list them, or fail.
    invalid_rows: Literal["skip", "fail"] = "skip"
    # Reasoning effort in the system message of conversations that do not set one.
    reasoning_effort: Literal["low", "medium", "high"] = "medium"

    def _check(self) -> None:
        self._require(self.seq_len >= 2, "seq_len", "must be 2 or more")
        self._require(0 < self.val_fraction <= 0.5, "val_fraction", "must be above 0 and at most 0.5")


@dataclasses.dataclass(frozen=True)
class OptimConfig(ConfigBase):
    """Optimizer, learning-rate schedule, gradient clipping and accumulation."""

    _section: typing.ClassVar[str] = "optim"

    # Optimizer. muon orthogonalizes the updates of the matrices inside the blocks and uses adamw for the
    # rest; it needs fewer but more expensive steps.
    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: Positive[float] = 3e-4  # Peak learning rate
    # Schedule after the warmup: cosine decay over the whole run, wsd (warmup, stable, decay: constant, then a
    # linear decay), or constant.
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: NonNegative[int] = 100  # Steps of linear warmup from zero
    decay_fraction: float = 0.2  # Final fraction of the steps over which wsd decays
    min_lr_ratio: float = 0.1  # Final learning rate, as a fraction of the peak
    beta1: BelowOne = 0.9  # Decay rate of AdamW's first moment (Muon's momentum is 0.95)
    beta2: BelowOne = 0.95  # Decay rate of AdamW's second moment
    epsilon: Positive[float] = 1e-8  # AdamW's epsilon, added to the root of the second moment
    # Decoupled weight decay of matrices (not of norms, biases and sinks), scaled by the learning rate.
    weight_decay: NonNegative[float] = 0.1
    # Clip gradients to this global norm; 0 disables clipping.
    max_grad_norm: NonNegative[float] = 1.0
    # Microbatches per step, to save memory. The loss gradient is exactly that of the whole batch; the router
    # losses are computed per microbatch and averaged.
    grad_accum_steps: Positive[int] = 1
    # Memory that holds the optimizer state between steps. host saves device memory, and moves the state to
    # the device and back in every step.
    state_memory: Literal["device", "host"] = "device"

    def _check(self) -> None:
        self._require(0 < self.decay_fraction <= 1, "decay_fraction", "must be above 0 and at most 1")
        self._require(0 <= self.min_lr_ratio <= 1, "min_lr_ratio", "must be between 0 and 1")


@dataclasses.dataclass(frozen=True)
class MeshConfig(ConfigBase):
    """Number of devices on each axis of the mesh, and of slices along two of them.

    -1, allowed once, means all remaining devices.
    """

    _section: typing.ClassVar[str] = "mesh"

    data: int = -1  # Data parallelism: each group of devices holds all parameters and a part of the batch
    # Fully sharded data parallelism: parameters are sharded as well, and all-gathered for use.
    fsdp: int = 1
    # Context parallelism: splits each sequence. data.seq_len must be a multiple of twice its size.
    context: int = 1
    expert: int = 1  # Expert parallelism: each device holds a part of the experts
    tensor: int = 1  # Tensor parallelism: splits heads, expert width and vocabulary
    # Slices along the data axis, which the data-center network joins. Must divide mesh.data.
    dcn_data: Positive[int] = 1
    dcn_fsdp: Positive[int] = 1  # Slices along the fsdp axis. Must divide mesh.fsdp

    @property
    def sizes(self) -> dict[str, int]:
        """Returns the number of devices on each axis."""
        values = dataclasses.asdict(self)
        return {name: size for name, size in values.items() if not name.startswith("dcn_")}

    @property
    def slices(self) -> int:
        """Returns the number of slices."""
        return self.dcn_data * self.dcn_fsdp

    def _check(self) -> None:
        sizes = self.sizes
        for name, size in sizes.items():
            allowed = "must be above 0, or -1 for all remaining devices"
            self._require(size == -1 or size > 0, name, allowed)
        wild = [name for name, size in sizes.items() if size == -1]
        if len(wild) > 1:
            raise ValueError(f"mesh.{wild[1]} is -1: only one axis can be -1, and mesh.{wild[0]} already is")
        for axis in ("data", "fsdp"):
            allowed = f"must divide mesh.{axis} ({sizes[axis]}), of which it is the number of slices"
            is_possible = sizes[axis] == -1 or sizes[axis] % getattr(self, f"dcn_{axis}") == 0
            self._require(is_possible, f"dcn_{axis}", allowed)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(ConfigBase):
    """When to save checkpoints, and how many to keep."""

    _section: typing.ClassVar[str] = "checkpoint"

    every: Positive[int] = 250  # Steps between checkpoints; also saved at evaluations and on Ctrl-C
    # Number of latest checkpoints to keep, in addition to the one with the best validation loss.
    keep: Positive[int] = 2


@dataclasses.dataclass(frozen=True)
class EvalConfig(ConfigBase):
    """Evaluation on held-out text, and sampling, during training."""

    _section: typing.ClassVar[str] = "eval"

    every: Positive[int] = 250  # Steps between evaluations; the last one covers all held-out text
    batches: Positive[int] = 8  # Batches per evaluation
    prompt: str = ""  # Prompt of the text that is sampled at each evaluation
    sample_tokens: NonNegative[int] = 64  # Tokens to sample; 0 disables sampling
    temperature: NonNegative[float] = 0.8  # Sampling temperature


@dataclasses.dataclass(frozen=True)
class TrainConfig(ConfigBase):
    """One training run. `configs/` holds presets; every field can be set on the command line."""

    data: DataConfig = DataConfig()  # Training data, tokenizer and batches
    optim: OptimConfig = (
        OptimConfig()
    )  # Optimizer, learning-rate schedule, gradient clipping and accumulation
    # Number of devices on each axis of the mesh; -1, allowed once, means all remaining devices.
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()  # When to save checkpoints, and how many to keep
    eval: EvalConfig = EvalConfig()  # Evaluation on held-out text, and sampling, during training
    model: ModelConfig = ModelConfig()  # Architecture, numerics and kernels
    # What is minimized: lm, -log p of the next token; dpo, a loss on pairs of answers; or grpo, minus the
    # rewards of answers that the model samples.
    objective: Literal["lm", "dpo", "grpo"] = "lm"
    dpo: DpoConfig = DpoConfig()  # Training on pairs of a chosen and a rejected answer
    grpo: GrpoConfig = GrpoConfig()  # Reinforcement learning with reward functions
    # Total number of optimizer steps. A finished run can be resumed with more.
    steps: Positive[int] = 1000
    # Run folder for checkpoints, metrics and report. An existing run in it is resumed.
    run_dir: str = "runs/default"
    seed: NonNegative[int] = 0  # Random seed of the initial weights, the data order and dropout
    # Initial weights: a run folder, a Hugging Face folder, or hf:OWNER/NAME. None initializes at random.
    init_from: str | None = None
    # LoRA adapter to continue training: a PEFT folder, or a run. Needs model.lora; None starts a new adapter.
    init_adapter: str | None = None
    log_every: Positive[int] = 1  # Steps between rows in metrics.jsonl
    # Steps to trace with JAX's profiler, as START:COUNT, into the run folder; None traces none.
    profile: str | None = None

    def _check(self) -> None:
        self._require(self.run_dir.strip() != "", "run_dir", "must be the name of a folder")
        self._require("://" not in self.run_dir, "run_dir", "must be a local folder, not a URL")
        allowed = (
            "must be 'plain' for full training, because MXFP4 is too coarse for optimizer updates; with "
            "'mxfp4', train adapters (model.lora)"
        )
        experts = self.model.expert_format
        require(experts == "plain" or self.model.lora is not None, "model.expert_format", experts, allowed)
        is_used = self.init_adapter is None or self.model.lora is not None
        allowed = "needs model.lora: add --model.lora.rank with the adapter's rank, r in adapter_config.json"
        self._require(is_used, "init_adapter", allowed)
        self._check_ranks()
        self._check_objective()
        self.profiled_steps()
        longest, length = self.model.max_position_embeddings, self.data.seq_len
        allowed = f"must be at most model.max_position_embeddings ({longest})"
        require(length <= longest, "data.seq_len", length, allowed)
        size, steps = self.data.batch_size, self.optim.grad_accum_steps
        require(size % steps == 0, "optim.grad_accum_steps", steps, f"must divide data.batch_size ({size})")

    def _check_objective(self) -> None:
        source, objective = self.data.source, self.objective
        kinds = {"dpo": (is_preferences, "preferences"), "grpo": (is_prompts, "prompts")}
        for name, (is_kind, kind) in kinds.items():
            allowed = f"must be {kind}:GLOB or stdlib-{kind} if objective is {name!r}"
            require(is_kind(source) or objective != name, "data.source", source, allowed)
            what = {"dpo": "pairs of answers", "grpo": "prompts"}[name]
            allowed = f"must be {name!r} for {what} (data.source {source!r})"
            self._require(objective == name or not is_kind(source), "objective", allowed)
        if objective == "lm":
            return
        overlong, train_on, why = self.data.overlong, self.data.train_on, f"if objective is {objective!r}"
        require(overlong == "skip", "data.overlong", overlong, f"must be 'skip' {why}")
        require(train_on == "assistant", "data.train_on", train_on, f"must be 'assistant' {why}")
        # The reference and the sampled answers drop nothing, so that all would differ from the start.
        for name, off in (
            ("attention_dropout", 0),
            ("residual_dropout", 0),
            ("expert_capacity_factor", None),
        ):
            value = getattr(self.model, name)
            require(value in (0, None), f"model.{name}", value, f"must be {off} {why}")
        if objective == "grpo":
            self._check_grpo()

    def _check_grpo(self) -> None:
        grpo, size, length = self.grpo, self.data.batch_size, self.data.seq_len
        allowed = "must be exact, format, regex:PATTERN or FILE.py:FUNCTION, one or more"
        require(bool(grpo.rewards), "grpo.rewards", grpo.rewards, allowed)
        allowed = f"must divide data.batch_size ({size}), the answers that are sampled together"
        require(size % grpo.group_size == 0, "grpo.group_size", grpo.group_size, allowed)
        allowed = f"must be below data.seq_len ({length}), which holds a prompt and its answer"
        require(grpo.max_new_tokens < length, "grpo.max_new_tokens", grpo.max_new_tokens, allowed)
        allowed = "must be 0 without model.lora: the reference is the model without its adapters"
        require(grpo.beta == 0 or self.model.lora is not None, "grpo.beta", grpo.beta, allowed)
        # Its adapters are part of the rounded weights.
        is_rounded = self.model.expert_fake_quant
        allowed = "must be 0 with model.expert_fake_quant, which leaves no model without adapters"
        require(grpo.beta == 0 or not is_rounded, "grpo.beta", grpo.beta, allowed)
        allowed = "must be 1 if objective is 'grpo'"
        require(self.log_every == 1, "log_every", self.log_every, allowed)

    def _check_ranks(self) -> None:
        model = self.model
        if model.lora is None:
            return
        for target in model.lora.targets:
            rank, shape = model.lora_rank(target), model.target_shape(target)
            name = "expert_rank" if target in EXPERT_TARGETS and model.lora.expert_rank else "rank"
            sides = f"the smaller dimension of {shape[0]} x {shape[1]}"
            allowed = f"the rank of {target}, {rank}, must be at most {min(shape)}, {sides}"
            require(rank <= min(shape), f"model.lora.{name}", getattr(model.lora, name), allowed)

    @property
    def longest_prompt(self) -> int:
        """Returns the number of tokens of a prompt that leaves room for an answer, with objective grpo."""
        return self.data.seq_len - self.grpo.max_new_tokens

    def profiled_steps(self) -> range:
        """Returns the numbers of the steps to trace; the first step of a run is number 1.

        Raises ValueError if `profile` is not START:COUNT, or does not lie after the first step, which
        compiles, and within `steps`.
        """
        if self.profile is None:
            return range(0)
        start, _, count = self.profile.partition(":")
        is_valid = all(part.isascii() and part.isdecimal() for part in (start, count))
        allowed = "must be START:COUNT, the first step and the number of steps, such as 10:3"
        self._require(is_valid and int(count) > 0, "profile", allowed)
        self._require(int(start) > 1, "profile", "must start at step 2 or later, because step 1 compiles")
        steps = range(int(start), int(start) + int(count))
        self._require(
            steps[-1] <= self.steps, "profile", f"must end at or before the last step ({self.steps})"
        )
        return steps

    def save(self, path: str | pathlib.Path) -> None:
        """Writes the config as JSON, atomically."""
        path = user_path(path, "config")
        temporary = pathlib.Path(f"{path}.tmp")
        write_json(temporary, self.to_dict())
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | pathlib.Path) -> Self:
        """Reads a config written by `save`. Raises ValueError if the file is missing or not a config."""
        return cls.from_dict(read_json(user_path(path, "config"), "; a run folder holds config.json"))
