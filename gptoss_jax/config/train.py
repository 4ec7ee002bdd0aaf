"""A training run: its data, optimiser, devices, checkpoints and evaluations, and the model."""

import dataclasses
import os
import pathlib
import typing
from typing import Literal, Self

from gptoss_jax.config.base import ConfigBase, read_json, require, write_json
from gptoss_jax.config.model import ModelConfig
from gptoss_jax.config.paths import user_path


@dataclasses.dataclass(frozen=True)
class DataConfig(ConfigBase):
    """What to train on, and how it is cut into batches."""

    _section: typing.ClassVar[str] = "data"

    # stdlib, text:GLOB, jsonl:GLOB#field, parquet:GLOB#field, or hf:NAME[:CONFIG[:SPLIT]][#field].
    source: str = "stdlib"
    # bytes, bpe:SIZE (trained on the source), file:tokenizer.json (with #bos=NAME,eos=NAME if the file's are
    # unknown), or o200k_harmony.
    tokenizer: str = "bpe:4096"
    # Tokens in a row; documents are packed into rows and never see each other.
    seq_len: int = 512
    # Rows in one optimiser step, over all devices.
    batch_size: int = 16
    # Share of the documents held out for evaluation (at most 8 MiB of text).
    val_fraction: float = 0.05
    # Where tokenised text is kept between runs.
    cache_dir: str = "~/.cache/gptoss_jax"

    def _check(self) -> None:
        self._require(self.seq_len >= 2, "seq_len", "must be 2 or more")
        self._require_positive("batch_size")
        self._require(0 < self.val_fraction <= 0.5, "val_fraction", "must be above 0 and at most 0.5")


@dataclasses.dataclass(frozen=True)
class OptimConfig(ConfigBase):
    """The optimiser, its schedule, clipping and accumulation."""

    _section: typing.ClassVar[str] = "optim"

    # adamw; or muon, which orthogonalises the updates of the matrices inside the blocks and leaves the rest
    # to adamw: more work for a step, fewer steps.
    name: Literal["adamw", "muon"] = "adamw"
    # Peak learning rate.
    learning_rate: float = 3e-4
    # cosine falls from the peak to the end; wsd (warm-up, stable, decay) holds the peak and falls in a line
    # at the end; constant holds it to the end.
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    # Steps over which the learning rate rises in a line from 0.
    warmup_steps: int = 100
    # Share of all steps in which wsd falls.
    decay_fraction: float = 0.2
    # Learning rate of the last step, as a share of the peak.
    min_lr_ratio: float = 0.1
    # Decay of the mean of the gradient (AdamW's; Muon's is 0.95).
    beta1: float = 0.9
    # Decay of the mean of the squared gradient.
    beta2: float = 0.95
    # Added to the root of the mean square.
    epsilon: float = 1e-8
    # Pulls matrices towards zero (not norms, biases, sinks, or the router's bias), times the learning rate.
    weight_decay: float = 0.1
    # Longest gradient; a longer one is scaled down to this norm. 0 turns clipping off.
    max_grad_norm: float = 1.0
    # Parts that a batch is worked through in, to save memory. The gradient of the loss is that of the whole
    # batch; the router's two losses are taken part by part and averaged.
    grad_accum_steps: int = 1

    def _check(self) -> None:
        self._require_positive("learning_rate", "epsilon", "grad_accum_steps")
        for name in ("warmup_steps", "weight_decay", "max_grad_norm"):
            self._require(getattr(self, name) >= 0, name, "must be 0 or more")
        for name in ("beta1", "beta2"):
            self._require(0 <= getattr(self, name) < 1, name, "must be at least 0 and below 1")
        self._require(0 < self.decay_fraction <= 1, "decay_fraction", "must be above 0 and at most 1")
        self._require(0 <= self.min_lr_ratio <= 1, "min_lr_ratio", "must be between 0 and 1")


@dataclasses.dataclass(frozen=True)
class MeshConfig(ConfigBase):
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
class CheckpointConfig(ConfigBase):
    """When the run is saved, and what is kept."""

    _section: typing.ClassVar[str] = "checkpoint"

    # Steps between checkpoints; one more is written at each evaluation and when the run is stopped.
    every: int = 250
    # How many of the latest are kept. The one with the best validation loss is kept besides.
    keep: int = 2

    def _check(self) -> None:
        self._require_positive("every", "keep")


@dataclasses.dataclass(frozen=True)
class EvalConfig(ConfigBase):
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
class TrainConfig(ConfigBase):
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
    # Optimizer steps in the whole run. A run can be resumed with more.
    steps: int = 1000
    # Folder of the run; starting again with the same folder goes on from its last checkpoint.
    run_dir: str = "runs/default"
    # Seed of the initial weights, of the order of the data and of dropout.
    seed: int = 0
    # A run folder, Hugging Face folder or hf:OWNER/NAME whose weights to start from; None starts from random
    # ones.
    init_from: str | None = None
    # Steps between the rows of metrics.jsonl.
    log_every: int = 1

    def _check(self) -> None:
        self._require_positive("steps", "log_every")
        self._require(self.seed >= 0, "seed", "must be 0 or more")
        self._require(self.run_dir.strip() != "", "run_dir", "must be the name of a folder")
        self._require("://" not in self.run_dir, "run_dir", "must be a folder of the file system, not a URL")
        require(
            self.model.expert_format == "plain",
            "model.expert_format",
            self.model.expert_format,
            "training needs plain experts ('plain'); packed ones are too coarse for the steps of an update",
        )
        require(
            self.data.seq_len <= self.model.max_position_embeddings,
            "data.seq_len",
            self.data.seq_len,
            f"must be at most model.max_position_embeddings ({self.model.max_position_embeddings})",
        )
        require(
            self.data.batch_size % self.optim.grad_accum_steps == 0,
            "optim.grad_accum_steps",
            self.optim.grad_accum_steps,
            f"must divide data.batch_size ({self.data.batch_size})",
        )

    def save(self, path: str | pathlib.Path) -> None:
        """Writes the whole config as JSON."""
        path = user_path(path, "config")
        temporary = pathlib.Path(f"{path}.tmp")
        write_json(temporary, self.to_dict())
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | pathlib.Path) -> Self:
        """Reads what `save` wrote. Raises ValueError for a file that is missing or is not such a config."""
        return cls.from_dict(read_json(user_path(path, "config"), "; a run folder holds config.json"))
