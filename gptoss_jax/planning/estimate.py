"""Cost of a training step from shapes: memory, FLOPs and collectives of one device.

Parameters, optimizer state and gradients are exact. With `model.lora` only adapters have the latter two; the
frozen weights are those of published files: packed, or in bfloat16 where the model computes in it.
Activations and temporaries follow formulas for the arrays that the backward pass needs; a compiler needs
more, for copies and for what its schedule holds longer. Times divide by published peaks, so no real step is
faster.
"""

import dataclasses
import math

from gptoss_jax.config import ModelConfig, TrainConfig, require
from gptoss_jax.config.model import EXPERT_TARGETS
from gptoss_jax.hardware import Chip, adapter_weights, flops_per_token, mean_visible_keys
from gptoss_jax.parallel.mesh import batch_shards
from gptoss_jax.planning.shards import Step, step_on
from gptoss_jax.planning.traffic import CollectiveCost, collective_costs
from gptoss_jax.training.losses import chunk_length

# Share of a chip's memory that an estimate may fill; the rest is for what the formulas do not know.
MEMORY_UTILIZATION = 0.9


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device."""

    # Those that are trained.
    parameters: int
    optimizer: int
    # With gradient accumulation, their sum and one microbatch's gradients.
    gradients: int
    # Saved by the forward pass for the backward pass.
    activations: int
    # The most that one block, or the loss, holds in addition.
    temporaries: int
    # Weights beside adapters.
    frozen: int = 0

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Cost of a step on one mesh, for one device."""

    mesh: dict[str, int]
    memory: Memory
    # Bytes of the chip.
    capacity: float
    # Without and with what is recomputed.
    useful_flops: float
    flops: float
    compute_seconds: float
    collectives: tuple[CollectiveCost, ...]

    @property
    def fits(self) -> bool:
        return self.memory.total <= MEMORY_UTILIZATION * self.capacity

    @property
    def communication_seconds(self) -> float:
        return sum(cost.seconds for cost in self.collectives)

    @property
    def overlapped_seconds(self) -> float:
        """Duration of the step if the shorter of computation and communication is hidden by the other."""
        return max(self.compute_seconds, self.communication_seconds)

    @property
    def serial_seconds(self) -> float:
        """Duration of the step if nothing overlaps."""
        return self.compute_seconds + self.communication_seconds


def estimate(config: TrainConfig, chip: Chip, mesh: dict[str, int]) -> Estimate:
    """Estimates a step of `config` on a mesh of `chip`s, given as sizes by axis in place of the config's own.

    Raises ValueError if the mesh cannot split the model or the batch.
    """
    rows = config.data.batch_size // config.optim.grad_accum_steps
    allowed = f"the {rows} rows of a microbatch must be a multiple of the {batch_shards(mesh)} devices that"
    allowed = f"{allowed} mesh.data, mesh.fsdp and mesh.expert make"
    require(rows % batch_shards(mesh) == 0, "data.batch_size", config.data.batch_size, allowed)
    step = step_on(config, mesh)
    memory = Memory(
        parameters=step.trained_bytes,
        optimizer=step.optimizer_bytes,
        gradients=step.trained_bytes * min(step.microbatches, 2),
        activations=config.model.num_hidden_layers * saved_activation_bytes(step),
        temporaries=max(block_temporaries(step), loss_temporaries(step)),
        frozen=step.frozen_bytes,
    )
    seq_len, devices = config.data.seq_len, math.prod(mesh.values())
    tokens = config.data.batch_size * seq_len / devices
    useful = flops_per_token(config.model, seq_len) * tokens
    flops = useful + recomputed_flops(config.model, seq_len) * tokens
    costs = collective_costs(step, chip)
    return Estimate(dict(mesh), memory, chip.memory, useful, flops, flops / chip.peak, costs)


def saved_activation_bytes(step: Step) -> int:
    """Bytes that one layer saves for the backward pass: its input; with remat "dots" also the outputs of
    attention's and the router's matmuls; with "none" all of `block_bytes`."""
    model, tensor = step.model, step.mesh["tensor"]
    entry = step.tokens * model.hidden_size * step.itemsize
    if model.remat == "block":
        return entry
    if model.remat == "dots":
        heads = model.num_attention_heads + 2 * model.num_key_value_heads
        dots = step.tokens * (model.hidden_size + heads * model.head_dim // tensor) * step.itemsize
        dots += step.tokens * adapter_ranks(model) * step.itemsize
        return entry + dots + step.tokens * model.num_local_experts * 4
    return entry + block_bytes(step)


def block_bytes(step: Step) -> int:
    """Bytes that the backward pass of a block reads, except for the block's input: two normed copies of the
    residual stream; queries, keys, values, attention's output and its float32 log-sum-exp; what is between
    the factors of attention's adapters; expert rows."""
    model, tensor = step.model, step.mesh["tensor"]
    heads = 2 * model.num_attention_heads + 2 * model.num_key_value_heads
    stream = step.tokens * 2 * model.hidden_size * step.itemsize
    per_token = heads * model.head_dim * step.itemsize + model.num_attention_heads * 4
    adapters = step.tokens * adapter_ranks(model) * step.itemsize
    return stream + step.tokens * per_token // tensor + adapters + expert_row_bytes(step)


def adapter_ranks(model: ModelConfig, among: tuple[str, ...] = ("q", "k", "v", "out", "router")) -> int:
    """Returns the sum of the ranks of a layer's adapters."""
    targets = () if model.lora is None else model.lora.targets
    return sum(model.lora_rank(target) for target in targets if target in among)


def expert_row_bytes(step: Step) -> int:
    """Bytes of the (token, expert) rows of a layer: gate, up, and output; input and product of gate and up if
    their weights are trained or have adapters, and what is between the adapters' factors. Rows are taken to
    spread evenly over the experts."""
    model, tensor = step.model, step.mesh["tensor"]
    rows = step.tokens * model.num_experts_per_tok
    width = (1 + step.trains("gate_up")) * model.hidden_size + adapter_ranks(model, EXPERT_TARGETS)
    width += (2 + step.trains("down")) * model.intermediate_size // tensor
    return rows * width * step.itemsize


def block_temporaries(step: Step) -> int:
    """Bytes held while one block runs backward: its gathered weights in the compute type and their gradients,
    the gradients of its expert rows, and with remat everything that is recomputed. Frozen weights have no
    gradient, and packed ones are read where they are stored unless they are gathered."""
    blocks = [p for p in step.parameters if "blocks" in p.names]
    held = [p for p in blocks if p.is_trained or p.itemsize > 1 or p.gathered_over]
    weights = step.gathered(held) + step.gathered(p for p in blocks if p.is_trained)
    weights = round(weights / step.model.num_hidden_layers)
    recomputed = block_bytes(step) if step.model.remat != "none" else 0
    return weights + expert_row_bytes(step) + recomputed


def loss_temporaries(step: Step) -> int:
    """Bytes held while the loss runs: the gathered head in the compute type and its float32 gradient, unless
    it is frozen, and one chunk's logits, their exponentials and gradient."""
    model, shards = step.model, batch_shards(step.mesh)
    name = "embedding" if model.tie_word_embeddings else "head"
    head = [p for p in step.parameters if name in p.names and (p.is_trained or p.gathered_over)]
    trained = (p for p in head if p.is_trained)
    vocabulary = model.vocab_size // step.mesh["tensor"]
    chunk = chunk_length(step.rows, step.config.data.seq_len, model.vocab_size, shards * step.mesh["tensor"])
    logits = step.rows // shards * chunk * vocabulary * (4 + 4 + step.itemsize)
    return step.gathered(head) + step.gathered(trained, itemsize=4) + logits


def recomputed_flops(model: ModelConfig, seq_len: int) -> float:
    """Returns the FLOPs per token that remat repeats: with "block" the forward pass of all blocks, with
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
