"""Cost of a training step from shapes: memory, FLOPs and collectives of one device.

Parameters, optimizer state and gradients are exact. Activations and temporaries follow formulas for the
arrays that the backward pass needs; a compiler needs more, for copies and for what its schedule holds longer.
Times divide by published peaks, so no real step is faster.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator

import jax
from jax.sharding import AbstractMesh, AxisType

from gptoss_jax.config import ModelConfig, TrainConfig, require
from gptoss_jax.hardware import Chip, flops_per_token, mean_visible_keys
from gptoss_jax.model.parameters import letters_of, parameter_shardings, path_names
from gptoss_jax.parallel.mesh import AXES, BATCH, batch_shards
from gptoss_jax.parallel.rules import compute_spec
from gptoss_jax.planning.hlo import bytes_sent
from gptoss_jax.training.losses import chunk_length
from gptoss_jax.training.state import TrainState, abstract_state

# Share of a chip's memory that an estimate may fill; the rest is for what the formulas do not know.
MEMORY_UTILIZATION = 0.9


@dataclasses.dataclass(frozen=True)
class CollectiveCost:
    """All collectives of one purpose in a step: bytes that a device sends, seconds at the published rates."""

    purpose: str
    # One of `hlo.KINDS`.
    kind: str
    axes: tuple[str, ...]
    sent: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device."""

    parameters: int
    optimizer: int
    # With gradient accumulation, their sum and one microbatch's gradients.
    gradients: int
    # Saved by the forward pass for the backward pass.
    activations: int
    # The most that one block, or the loss, holds in addition.
    temporaries: int

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


@dataclasses.dataclass(frozen=True)
class _Parameter:
    """A parameter's path, its elements on one device, and the mesh axes that shard it in storage and over
    which it is gathered for use."""

    names: tuple[str, ...]
    size: int
    axes: frozenset[str]
    gathered_over: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Step:
    """Shared inputs of the formulas: a config on a mesh, as seen by one device."""

    config: TrainConfig
    mesh: dict[str, int]
    parameters: list[_Parameter]

    @property
    def model(self) -> ModelConfig:
        return self.config.model

    @property
    def microbatches(self) -> int:
        return self.config.optim.grad_accum_steps

    @property
    def rows(self) -> int:
        """Rows of a microbatch, on all devices."""
        return self.config.data.batch_size // self.microbatches

    @property
    def tokens(self) -> int:
        """Tokens of a microbatch, on one device."""
        return self.rows // batch_shards(self.mesh) * self.config.data.seq_len

    @property
    def itemsize(self) -> int:
        """Bytes of an activation; "auto" is bfloat16 on every accelerator."""
        return 4 if self.model.compute_dtype == "float32" else 2

    def axis_size(self, axes: tuple[str, ...]) -> int:
        return math.prod(self.mesh[axis] for axis in axes)

    def gathered(self, part: str, axes: tuple[str, ...] | None = None) -> int:
        """Elements of the parameters below a name, gathered; only of those gathered over `axes` if given."""
        chosen = (p for p in self.parameters if part in p.names and axes in (None, p.gathered_over))
        return sum(p.size * self.axis_size(p.gathered_over) for p in chosen)


def estimate(config: TrainConfig, chip: Chip, mesh: dict[str, int]) -> Estimate:
    """Estimates a step of `config` on a mesh of `chip`s, given as sizes by axis in place of the config's own.

    Raises ValueError if the mesh cannot split the model or the batch.
    """
    rows = config.data.batch_size // config.optim.grad_accum_steps
    allowed = f"the {rows} rows of a microbatch must be a multiple of the {batch_shards(mesh)} devices that"
    allowed = f"{allowed} mesh.data, mesh.fsdp and mesh.expert make"
    require(rows % batch_shards(mesh) == 0, "data.batch_size", config.data.batch_size, allowed)
    shapes = _state_shapes(dataclasses.replace(config, mesh=type(config.mesh)()))
    shardings = parameter_shardings(shapes, _abstract_mesh(mesh))
    step = _Step(config, mesh, _parameters(shapes, shardings))
    stored = jax.tree.map(_local_bytes, shapes, shardings)
    parameters = sum(jax.tree.leaves(stored.params))
    memory = Memory(
        parameters=parameters,
        optimizer=sum(jax.tree.leaves(stored)) - parameters,
        gradients=parameters * min(step.microbatches, 2),
        activations=config.model.num_hidden_layers * saved_activation_bytes(step),
        temporaries=max(block_temporaries(step), loss_temporaries(step)),
    )
    seq_len, devices = config.data.seq_len, math.prod(mesh.values())
    tokens = config.data.batch_size * seq_len / devices
    useful = flops_per_token(config.model, seq_len) * tokens
    flops = useful + recomputed_flops(config.model, seq_len) * tokens
    costs = (
        CollectiveCost(*cost, sent, transfer_seconds(chip, mesh, *cost[1:], sent))
        for *cost, sent in _collectives(step)
        if sent > 0
    )
    return Estimate(dict(mesh), memory, chip.memory, useful, flops, flops / chip.peak, tuple(costs))


def saved_activation_bytes(step: _Step) -> int:
    """Bytes that one layer saves for the backward pass: its input; with remat "dots" also the outputs of
    attention's and the router's matmuls; with "none" all of `block_bytes`."""
    model, tensor = step.model, step.mesh["tensor"]
    entry = step.tokens * model.hidden_size * step.itemsize
    if model.remat == "block":
        return entry
    if model.remat == "dots":
        heads = model.num_attention_heads + 2 * model.num_key_value_heads
        dots = step.tokens * (model.hidden_size + heads * model.head_dim // tensor) * step.itemsize
        return entry + dots + step.tokens * model.num_local_experts * 4
    return entry + block_bytes(step)


def block_bytes(step: _Step) -> int:
    """Bytes that the backward pass of a block reads, except for the block's input: two normed copies of the
    residual stream; queries, keys, values, attention's output and its float32 log-sum-exp; expert rows."""
    model, tensor = step.model, step.mesh["tensor"]
    heads = 2 * model.num_attention_heads + 2 * model.num_key_value_heads
    stream = step.tokens * 2 * model.hidden_size * step.itemsize
    per_token = heads * model.head_dim * step.itemsize + model.num_attention_heads * 4
    return stream + step.tokens * per_token // tensor + expert_row_bytes(step)


def expert_row_bytes(step: _Step) -> int:
    """Bytes of the (token, expert) rows of a layer: input, gate, up, their product and output. Rows are taken
    to spread evenly over the experts."""
    model, tensor = step.model, step.mesh["tensor"]
    rows = step.tokens * model.num_experts_per_tok
    return rows * (2 * model.hidden_size + 3 * model.intermediate_size // tensor) * step.itemsize


def block_temporaries(step: _Step) -> int:
    """Bytes held while one block runs backward: its gathered weights in the compute type and their gradients,
    the gradients of its expert rows, and with remat everything that is recomputed."""
    weights = round(step.gathered("blocks") / step.model.num_hidden_layers) * 2 * step.itemsize
    recomputed = block_bytes(step) if step.model.remat != "none" else 0
    return weights + expert_row_bytes(step) + recomputed


def loss_temporaries(step: _Step) -> int:
    """Bytes held while the loss runs: the gathered head in the compute type and its float32 gradient, and one
    chunk's logits, their exponentials and gradient."""
    model, shards = step.model, batch_shards(step.mesh)
    vocabulary = model.vocab_size // step.mesh["tensor"]
    chunk = chunk_length(step.rows, step.config.data.seq_len, model.vocab_size, shards * step.mesh["tensor"])
    logits = step.rows // shards * chunk * vocabulary * (4 + 4 + step.itemsize)
    return vocabulary * model.hidden_size * (step.itemsize + 4) + logits


def recomputed_flops(model: ModelConfig, seq_len: int) -> float:
    """Returns the FLOPs per token that remat repeats: with "block" the forward pass of all blocks, with
    "dots" only that of experts and attention scores."""
    if model.remat == "none":
        return 0.0
    if model.remat == "block":
        return flops_per_token(model, seq_len, training=False) - 2 * model.hidden_size * model.vocab_size
    experts = model.num_experts_per_tok * 3 * model.hidden_size * model.intermediate_size
    visible = sum(mean_visible_keys(model, kind, seq_len) for kind in model.resolved_layer_types)
    scores = 2 * model.num_attention_heads * model.head_dim * visible
    return 2.0 * (model.num_hidden_layers * experts + scores)


def transfer_seconds(
    chip: Chip, mesh: dict[str, int], kind: str, axes: tuple[str, ...], sent: float
) -> float:
    """Seconds for one device to send `sent` bytes along some axes; the mesh's last axis has the nearest
    neighbors.

    In a slice all links of a chip work at once. If a group spans nodes, its k devices in a node share the
    uplink: each carries 1/k of a ring's traffic; an all-to-all sends all cross-node traffic out.
    """
    inside = sent / chip.link
    if chip.node is None or math.prod(mesh.values()) <= chip.node:
        return inside
    near, stride = 1, 1
    for axis, size in reversed(mesh.items()):
        if axis in axes:
            near *= min(size, max(1, chip.node // stride))
        stride *= size
    size = math.prod(mesh[axis] for axis in axes)
    if near >= size:
        return inside
    out = sent * (size - near) / (size - 1) if "all-to-all" in kind else sent / near
    return max(inside, out / chip.network)


def _collectives(step: _Step) -> Iterator[tuple[str, str, tuple[str, ...], float]]:
    """Yields (purpose, kind, axes, bytes sent by a device in a step) for all that the sharding requires."""
    model, width, n = step.model, step.itemsize, step.microbatches
    for axes in sorted({p.gathered_over for p in step.parameters if p.gathered_over}):
        size = step.axis_size(axes)
        blocks, embedding, head = (step.gathered(part, axes) for part in ("blocks", "embedding", "head"))
        # Forward and backward pass gather, with or without remat. The embedding is sent in float32, and so
        # are the gradients of embedding and head.
        gathers = n * (width * 2 * blocks + 4 * embedding + width * head)
        yield "gather parameters", "all-gather", axes, bytes_sent("all-gather", gathers, size)
        scatters = n * (width * blocks + 4 * (embedding + head))
        yield "scatter gradients", "reduce-scatter", axes, bytes_sent("reduce-scatter", scatters, size)
    # Gradients are summed over the batch axes that do not shard the parameter: they hold copies of it.
    replicated: dict[tuple[str, ...], int] = {}
    for p in step.parameters:
        axes = tuple(axis for axis in BATCH if axis not in p.axes and step.mesh[axis] > 1)
        replicated[axes] = replicated.get(axes, 0) + p.size * (width if "blocks" in p.names else 4)
    for axes, size in replicated.items():
        yield "sum gradients", "all-reduce", axes, n * bytes_sent("all-reduce", size, step.axis_size(axes))
    # Rows travel to their experts and back, in the forward and backward pass and, with remat, once more.
    passes = (3 if model.remat == "block" else 2) * model.num_hidden_layers
    stream = n * step.tokens * model.hidden_size * width
    rows = stream * model.num_experts_per_tok * 2 * passes
    sent = bytes_sent("all-to-all", rows, step.mesh["expert"])
    yield "dispatch and combine", "ragged-all-to-all", ("expert",), sent
    # Outputs of attention and experts, gradients of their inputs; embedding and loss.
    sums = stream * (2 * passes + 2)
    yield "sum over tensor", "all-reduce", ("tensor",), bytes_sent("all-reduce", sums, step.mesh["tensor"])


def _abstract_mesh(mesh: dict[str, int]) -> AbstractMesh:
    return AbstractMesh(tuple(mesh[axis] for axis in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES))


@functools.cache
def _state_shapes(config: TrainConfig) -> TrainState:
    return abstract_state(config, _abstract_mesh(dict.fromkeys(AXES, 1)))


def _local_bytes(leaf, sharding) -> int:
    return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _parameters(state: TrainState, shardings: TrainState) -> list[_Parameter]:
    def axes_of(spec) -> frozenset[str]:
        return frozenset(a for entry in spec for a in ((entry,) if isinstance(entry, str) else entry or ()))

    def parameter(path, leaf, sharding) -> _Parameter:
        axes, kept = axes_of(sharding.spec), axes_of(compute_spec(letters_of(path)))
        gathered = tuple(axis for axis in AXES if axis in axes - kept and sharding.mesh.shape[axis] > 1)
        return _Parameter(path_names(path), math.prod(sharding.shard_shape(leaf.shape)), axes, gathered)

    found = jax.tree_util.tree_map_with_path(parameter, state.params, shardings.params)
    return jax.tree.leaves(found, is_leaf=lambda leaf: isinstance(leaf, _Parameter))
