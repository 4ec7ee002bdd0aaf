"""Estimates the cost of a training step from shapes: memory, FLOPs and collectives per device.

Parameters, optimizer state and gradients are exact. With `model.lora`, only adapters have the latter two; the
frozen weights are stored as published: packed, or in bfloat16 if the model computes in it. Activations and
temporaries are formulas for the arrays that the backward pass needs; the compiler uses more, for copies and
because of its schedule. Times are based on published peak rates, so no real step is faster.
"""

import collections
import dataclasses
import math
from typing import Literal

import jax

from gptoss_jax.config import FULL, ModelConfig, TrainConfig, require
from gptoss_jax.config.model import EXPERT_TARGETS
from gptoss_jax.hardware import CPU, Chip, adapter_weights, flops_per_token, mean_visible_keys
from gptoss_jax.parallel.context import check_length
from gptoss_jax.parallel.mesh import sequence_shards
from gptoss_jax.parallel.rules import storage_spec
from gptoss_jax.parallel.vocabulary import split_head
from gptoss_jax.planning.shards import Step, abstract_mesh, step_on
from gptoss_jax.planning.traffic import CollectiveCost, collective_costs
from gptoss_jax.training.losses import chunk_length

# Fraction of a chip's memory that an estimate may use; the rest is for what the formulas do not cover.
MEMORY_UTILIZATION = 0.9
# Compiled TPU steps took up to this times their estimated activations and temporaries more than the estimate
# (benchmarks/results/scaling.json; tests/test_plan.py).
TPU_MARGIN = 2.0
# Python, JAX, and what compiling, evaluating and reporting leave in the heap of a training process. Sampling
# and saving each need a copy of the parameters, and up to two steps' worth of freed memory is too fragmented
# to reuse (docs/pretraining.md, "Memory on CPU").
PROCESS_BYTES = 450_000_000


@dataclasses.dataclass(frozen=True)
class Memory:
    """Memory in bytes per device."""

    # Trained parameters.
    parameters: int
    optimizer: int
    # With gradient accumulation, the accumulated gradients and those of one microbatch.
    gradients: int
    # Saved by the forward pass for the backward pass.
    activations: int
    # Maximum additional memory of one block or the loss.
    temporaries: int
    # Frozen weights next to adapters.
    frozen: int = 0
    # On CPU, what the process takes besides.
    process: int = 0

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Cost of a step on one mesh, per device."""

    mesh: dict[str, int]
    memory: Memory
    # Memory of the chip, in bytes.
    capacity: float
    # Bytes that the step may take beyond its estimate.
    margin: float
    # Without and with recomputation.
    useful_flops: float
    flops: float
    compute_seconds: float
    collectives: tuple[CollectiveCost, ...]

    @property
    def verdict(self) -> Literal["fits", "close", "no"]:
        """Returns "close" if the step fits only if it takes less than its margin beyond the estimate."""
        if self.memory.total > MEMORY_UTILIZATION * self.capacity:
            return "no"
        return "fits" if self.memory.total + self.margin <= self.capacity else "close"

    @property
    def fits(self) -> bool:
        return self.verdict == "fits"

    @property
    def communication_seconds(self) -> float:
        return sum(cost.seconds for cost in self.collectives)

    @property
    def overlapped_seconds(self) -> float:
        """Duration of the step if computation and communication overlap fully."""
        return max(self.compute_seconds, self.communication_seconds)

    @property
    def serial_seconds(self) -> float:
        """Duration of the step if nothing overlaps."""
        return self.compute_seconds + self.communication_seconds


def estimate(config: TrainConfig, chip: Chip, mesh: dict[str, int]) -> Estimate:
    """Estimates a step of `config` on a mesh of `chip`s; `mesh` (sizes by axis) overrides the config's mesh.

    Raises ValueError if the mesh cannot shard the model or the batch.
    """
    rows = config.data.batch_size // config.optim.grad_accum_steps
    allowed = (
        f"the {rows} rows of a microbatch must be a multiple of the {sequence_shards(mesh)} devices that"
    )
    allowed = f"{allowed} mesh.data, mesh.fsdp and mesh.expert make"
    check_length(config.data.seq_len, mesh["context"])
    require(rows % sequence_shards(mesh) == 0, "data.batch_size", config.data.batch_size, allowed)
    # Raises if the slices do not divide their axes.
    dataclasses.replace(config.mesh, **mesh)
    step = step_on(config, mesh)
    gradients = step.trained_bytes * min(step.microbatches, 2)
    # Both passes read the rounded weights of quantization-aware training.
    activations = config.model.num_hidden_layers * saved_activation_bytes(step) + step.rounded_bytes
    temporaries = max(block_temporaries(step), loss_temporaries(step))
    process = PROCESS_BYTES + 2 * (step.trained_bytes + gradients + activations + temporaries)
    memory = Memory(
        parameters=step.trained_bytes,
        optimizer=step.optimizer_bytes,
        gradients=gradients,
        activations=activations,
        temporaries=temporaries,
        frozen=step.frozen_bytes,
        process=process if chip.name == CPU else 0,
    )
    seq_len, devices = config.data.seq_len, math.prod(mesh.values())
    tokens = config.data.batch_size * seq_len / devices
    useful = flops_per_token(config.model, seq_len) * tokens
    flops = useful + recomputed_flops(config.model, seq_len) * tokens
    costs = collective_costs(step, chip)
    margin = TPU_MARGIN * (memory.activations + memory.temporaries) if chip.dimensions else 0.0
    return Estimate(dict(mesh), memory, chip.memory, margin, useful, flops, flops / chip.peak, costs)


def saved_activation_bytes(step: Step) -> int:
    """Returns the bytes that one layer saves for the backward pass: its input; with remat "dots" also the
    outputs of the attention and router matmuls; with "none" all of `block_bytes`."""
    model, tensor = step.model, step.mesh["tensor"]
    entry = step.tokens * model.hidden_size * step.itemsize
    if model.remat == "block":
        return entry
    if model.remat == "dots":
        heads = model.num_attention_heads + 2 * model.num_key_value_heads
        dots = step.tokens * (model.hidden_size + heads * model.head_dim // tensor) * step.itemsize
        dots += step.tokens * adapter_ranks(model) * step.itemsize
        return entry + dots + step.tokens * model.num_local_experts * 4
    full = model.resolved_layer_types.count(FULL) / model.num_hidden_layers
    return entry + block_bytes(step) + round(full * step.context_bytes)


def block_bytes(step: Step) -> int:
    """Returns the bytes that the backward pass of a block reads, except the block's input: two normed copies
    of the residual stream; queries, keys, values, attention output and float32 log-sum-exp; x A of the
    attention adapters; expert rows."""
    model, tensor = step.model, step.mesh["tensor"]
    heads = 2 * model.num_attention_heads + 2 * model.num_key_value_heads
    stream = step.tokens * 2 * model.hidden_size * step.itemsize
    per_token = heads * model.head_dim * step.itemsize + model.num_attention_heads * 4
    adapters = step.tokens * adapter_ranks(model) * step.itemsize
    return stream + step.tokens * per_token // tensor + adapters + expert_row_bytes(step)


def adapter_ranks(model: ModelConfig, among: tuple[str, ...] = ("q", "k", "v", "out", "router")) -> int:
    """Returns the sum of the adapter ranks in a layer."""
    targets = () if model.lora is None else model.lora.targets
    return sum(model.lora_rank(target) for target in targets if target in among)


def expert_row_bytes(step: Step) -> int:
    """Returns the bytes of the (token, expert) rows in a layer: gate, up, and output; the input, and the
    activation, if the weights are trained or have adapters; and x A of the adapters. Assumes that rows are
    spread evenly over the experts."""
    model, tensor = step.model, step.mesh["tensor"]
    rows = step.tokens * model.num_experts_per_tok
    width = (1 + step.trains("gate_up")) * model.hidden_size + adapter_ranks(model, EXPERT_TARGETS)
    width += (2 + step.trains("down")) * model.intermediate_size // tensor
    return rows * width * step.itemsize


def block_temporaries(step: Step) -> int:
    """Returns the bytes in use during the backward pass of one block: its gathered weights in the compute
    dtype and the largest of their gradients, because each is reduced before the next one is computed; the
    gradients of its expert rows and, with remat, everything that is recomputed. Frozen weights have no
    gradient, and packed ones are read in place unless they are gathered."""
    blocks = [p for p in step.parameters if "blocks" in p.names]
    held = [p for p in blocks if p.is_trained or p.itemsize > 1 or p.gathered_over]
    gradients: collections.Counter[str] = collections.Counter()
    for parameter in blocks:
        gradients[parameter.names[-1]] += step.gathered([parameter]) if parameter.is_trained else 0
    weights = round((step.gathered(held) + max(gradients.values())) / step.model.num_hidden_layers)
    recomputed = block_bytes(step) if step.model.remat != "none" else 0
    # Keys and values of whole sequences, and their gradients.
    return weights + expert_row_bytes(step) + recomputed + 2 * step.context_bytes


def loss_temporaries(step: Step) -> int:
    """Returns the bytes in use during the loss: a device's shard of the head in the compute dtype and, unless
    it is frozen, its float32 gradient; and the logits of one chunk, their exponentials and gradient."""
    model, devices, context = step.model, math.prod(step.mesh.values()), step.mesh["context"]
    name = "embedding" if model.tie_word_embeddings else "head"
    head = next(p for p in step.parameters if p.names[-2:] == (name, "weight"))
    shard = model.vocab_size * model.hidden_size // step.axis_size(("tensor", *_exchanged_axes(step)))
    itemsize = step.itemsize if head.is_trained or head.gathered_over else 0
    itemsize += 4 if head.is_trained else 0
    vocabulary = model.vocab_size // step.mesh["tensor"]
    length = step.config.data.seq_len // context
    chunk = chunk_length(step.rows * context, length, model.vocab_size, devices)
    logits = step.sequences * chunk * vocabulary * (4 + 4 + step.itemsize)
    return shard * itemsize + logits


def _exchanged_axes(step: Step) -> tuple[str, ...]:
    """Returns the axes over which devices exchange hidden states instead of gathering the head
    (`parallel/vocabulary.py`)."""
    model = step.model
    if math.prod(step.mesh.values()) == 1:
        return ()
    stored = [storage_spec("VD", (model.vocab_size, model.hidden_size), step.mesh)]
    if model.lora is not None and "head" in model.lora.targets:
        stored *= 2  # the adapter is split in the same way
    with jax.sharding.use_abstract_mesh(abstract_mesh(step.mesh)):
        return split_head(stored, model.vocab_size, step.tokens).exchanged


def recomputed_flops(model: ModelConfig, seq_len: int) -> float:
    """Returns the FLOPs per token that remat recomputes: with "block" the forward pass of all blocks, with
    "dots" only that of experts and attention scores."""
    if model.remat == "none":
        return 0.0
    if model.remat == "block":
        head = model.hidden_size * model.vocab_size + adapter_weights(model, ("head",))
        return flops_per_token(model, seq_len, training=False) - 2 * head
    experts = model.num_experts_per_tok * 3 * model.hidden_size * model.intermediate_size
    visible = sum(mean_visible_keys(model, kind, seq_len) for kind in model.resolved_layer_types)
    scores = 2 * model.num_attention_heads * model.head_dim * visible
    return 2.0 * (model.num_hidden_layers * experts + adapter_weights(model, EXPERT_TARGETS) + scores)
