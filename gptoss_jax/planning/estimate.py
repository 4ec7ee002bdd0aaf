"""A training step worked out from shapes alone: bytes, operations and collectives of one device.

Parameters, optimiser state and gradients are exact. Activations and temporaries follow formulas for the
arrays that the backward pass cannot do without; a compiler needs room besides, for copies and for what its
schedule holds longer. Times divide by published peaks, so no step is faster.
"""

import dataclasses
import functools
import math

import jax
from jax.sharding import AbstractMesh, AxisType

from gptoss_jax.config import ModelConfig, TrainConfig
from gptoss_jax.hardware import Chip, flops_per_token, mean_visible_keys
from gptoss_jax.model.parameters import letters_of, parameter_shardings, path_names
from gptoss_jax.parallel.mesh import AXES, BATCH
from gptoss_jax.parallel.rules import compute_spec
from gptoss_jax.planning.hlo import sent_bytes
from gptoss_jax.training.losses import chunk_length
from gptoss_jax.training.state import TrainState, abstract_state

# Share of the memory that an estimate may fill: the rest is for what the formulas do not know.
ROOM = 0.9


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one kind of exchange costs in a whole step."""

    what: str
    # As in `hlo.KINDS`.
    kind: str
    axes: tuple[str, ...]
    # Bytes that one device sends.
    sent: float
    # At the published rates.
    seconds: float


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device."""

    parameters: int
    optimizer: int
    # Where a batch is worked through in parts, their sum and those of one part.
    gradients: int
    # Kept from the forward to the backward pass.
    activations: int
    # The most that is held besides, for one block or for the vocabulary.
    temporaries: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Estimate:
    """One device's part of a step on one mesh."""

    mesh: dict[str, int]
    memory: Memory
    # Room on the chip, in bytes.
    capacity: float
    # Operations of a device that the mathematics asks for, and with what is computed twice.
    useful_flops: float
    flops: float
    compute_seconds: float
    traffic: tuple[Traffic, ...]

    @property
    def fits(self) -> bool:
        return self.memory.total <= ROOM * self.capacity

    @property
    def communication_seconds(self) -> float:
        return sum(one.seconds for one in self.traffic)

    @property
    def overlapped_seconds(self) -> float:
        """The step where all communication hides behind computation, or the reverse."""
        return max(self.compute_seconds, self.communication_seconds)

    @property
    def serial_seconds(self) -> float:
        """The step where nothing overlaps."""
        return self.compute_seconds + self.communication_seconds


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """One parameter: its path's names, elements of a device, the axes that split it, and those of them over
    which it is gathered before it is used."""

    names: tuple[str, ...]
    size: int
    axes: frozenset[str]
    gathered: tuple[str, ...]


def estimate(config: TrainConfig, chip: Chip, mesh: dict[str, int]) -> Estimate:
    """Costs of a step of `config` (its own mesh aside) on `mesh`, sizes by axis, of `chip`s.

    Raises ValueError where the mesh cannot split the model or the batch.
    """
    model, parts = config.model, config.optim.grad_accum_steps
    shards = math.prod(mesh[axis] for axis in BATCH)
    rows = config.data.batch_size // parts
    if rows % shards:
        raise ValueError(
            f"data.batch_size is {config.data.batch_size}: the {rows} rows of a part must be a multiple of "
            f"the {shards} devices that mesh.data, mesh.fsdp and mesh.expert make"
        )
    state_shapes = _state_shapes(dataclasses.replace(config, mesh=type(config.mesh)()))
    shardings = parameter_shardings(state_shapes, _abstract_mesh(mesh))
    held = jax.tree.map(lambda leaf, place: _local_bytes(leaf, place), state_shapes, shardings)
    leaves = _leaves(state_shapes, shardings)
    tokens = rows // shards * config.data.seq_len
    width = compute_bytes(model)

    parameters = sum(jax.tree.leaves(held.params))
    memory = Memory(
        parameters=parameters,
        optimizer=sum(jax.tree.leaves(held)) - parameters,
        gradients=parameters * min(parts, 2),
        activations=model.num_hidden_layers * kept_bytes(model, config.data.seq_len, tokens, mesh),
        temporaries=max(
            block_temporaries(config, leaves, tokens, mesh),
            vocabulary_temporaries(config, rows, shards, mesh),
        ),
    )
    step_tokens = config.data.batch_size * config.data.seq_len
    useful = flops_per_token(model, config.data.seq_len) * step_tokens / math.prod(mesh.values())
    again = recomputed_flops(model, config.data.seq_len) * step_tokens / math.prod(mesh.values())
    return Estimate(
        mesh=dict(mesh),
        memory=memory,
        capacity=chip.memory,
        useful_flops=useful,
        flops=useful + again,
        compute_seconds=(useful + again) / chip.peak,
        traffic=tuple(
            Traffic(what, kind, axes, sent, transfer_seconds(chip, mesh, kind, axes, sent))
            for what, kind, axes, sent in _exchanges(model, leaves, tokens, parts, width, mesh)
            if sent > 0
        ),
    )


def compute_bytes(model: ModelConfig) -> int:
    """Bytes of one activation; "auto" is bfloat16 on every chip."""
    return 4 if model.compute_dtype == "float32" else 2


def kept_bytes(model: ModelConfig, seq_len: int, tokens: int, mesh: dict[str, int]) -> int:
    """Bytes that one layer keeps for the backward pass: its input; with remat "dots" the results of the
    products of attention and router too; with "none" all of `block_bytes`."""
    width, tensor = compute_bytes(model), mesh["tensor"]
    entry = tokens * model.hidden_size * width
    if model.remat == "block":
        return entry
    heads = model.num_attention_heads + 2 * model.num_key_value_heads
    if model.remat == "dots":
        dots = tokens * (model.hidden_size + heads * model.head_dim // tensor) * width
        return entry + dots + tokens * model.num_local_experts * 4
    return entry + block_bytes(model, seq_len, tokens, mesh)


def block_bytes(model: ModelConfig, seq_len: int, tokens: int, mesh: dict[str, int]) -> int:
    """Bytes of what the backward pass of one whole block reads, its input aside: the two normed copies of the
    residual stream, queries, keys and values, attention's output and the logarithm of each softmax's sum in
    float32, and for each (token, expert) row the expert's input, gate, up, product and output. Experts are
    taken to be in balance."""
    width, tensor = compute_bytes(model), mesh["tensor"]
    heads = 2 * model.num_attention_heads + 2 * model.num_key_value_heads
    stream = tokens * 2 * model.hidden_size * width
    attention = tokens * (heads * model.head_dim * width + model.num_attention_heads * 4) // tensor
    return stream + attention + expert_row_bytes(model, tokens, tensor)


def expert_row_bytes(model: ModelConfig, tokens: int, tensor: int) -> int:
    """Bytes of the (token, expert) rows: input, gate, up, their product, output."""
    rows = tokens * model.num_experts_per_tok
    return rows * (2 * model.hidden_size + 3 * model.intermediate_size // tensor) * compute_bytes(model)


def block_temporaries(config: TrainConfig, leaves: list[_Leaf], tokens: int, mesh: dict[str, int]) -> int:
    """Bytes held while one block runs backward: its weights in the compute type and their gradients, both
    gathered; the gradients of its expert rows; with remat, all that was not kept."""
    model, width = config.model, compute_bytes(config.model)
    weights = sum(_gathered(leaf, mesh) for leaf in leaves if "blocks" in leaf.names)
    weights = round(weights / model.num_hidden_layers) * 2 * width
    seq_len, tensor = config.data.seq_len, mesh["tensor"]
    rows = expert_row_bytes(model, tokens, tensor)
    again = block_bytes(model, seq_len, tokens, mesh) if model.remat != "none" else 0
    return weights + rows + again


def vocabulary_temporaries(config: TrainConfig, rows: int, shards: int, mesh: dict[str, int]) -> int:
    """Bytes held while the loss runs: the head in the compute type and its float32 gradient, both
    gathered, and one chunk's logits, their exponentials and gradient."""
    model, width = config.model, compute_bytes(config.model)
    vocabulary = model.vocab_size // mesh["tensor"]
    chunk = chunk_length(rows, config.data.seq_len, model.vocab_size, shards * mesh["tensor"])
    logits = rows // shards * chunk * vocabulary * (4 + 4 + width)
    return vocabulary * model.hidden_size * (width + 4) + logits


def recomputed_flops(model: ModelConfig, seq_len: int) -> float:
    """Operations for one token that remat does a second time: with "block" the forward pass of all blocks,
    with "dots" that of experts and attention scores."""
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
    """Seconds for one device to send so many bytes along some axes, neighbours of the mesh's order lying near
    each other.

    In a slice all links of a chip work at once. Where a group spans nodes, its k devices in a node share the
    way out: around rings each carries 1/k of it, while of an exchange all that is for other nodes goes out.
    """
    inside = sent / chip.link
    if chip.node is None or math.prod(mesh.values()) <= chip.node:
        return inside
    names = list(mesh)
    near = 1
    for i, axis in enumerate(names):
        if axis in axes:
            stride = math.prod(mesh[other] for other in names[i + 1 :])
            near *= min(mesh[axis], max(1, chip.node // stride))
    size = math.prod(mesh[axis] for axis in axes)
    if near >= size:
        return inside
    out = sent * (size - near) / (size - 1) if "all-to-all" in kind else sent / near
    return max(inside, out / chip.network)


def _exchanges(model, leaves, tokens, parts, width, mesh):
    """(what, kind, axes, bytes a device sends in a step) of every exchange that the sharding asks for."""
    layers, again = model.num_hidden_layers, model.remat == "block"
    passes = 3 if again else 2
    expert, tensor = mesh["expert"], mesh["tensor"]
    for axes in sorted({leaf.gathered for leaf in leaves if leaf.gathered}):
        split, size = [leaf for leaf in leaves if leaf.gathered == axes], math.prod(mesh[a] for a in axes)
        blocks = sum(_gathered(leaf, mesh) for leaf in split if "blocks" in leaf.names)
        embedding = sum(_gathered(leaf, mesh) for leaf in split if "embedding" in leaf.names)
        head = sum(_gathered(leaf, mesh) for leaf in split if "head" in leaf.names)
        # Forward and backward gather anew, recomputation or not. The embedding and the gradients of the
        # vocabulary travel in float32.
        gathers = parts * (width * 2 * blocks + 4 * embedding + width * head)
        yield "gather parameters", "all-gather", axes, sent_bytes("all-gather", gathers, size)
        scatters = parts * (width * blocks + 4 * (embedding + head))
        yield "scatter gradients", "reduce-scatter", axes, sent_bytes("reduce-scatter", scatters, size)
    # What an axis of the batch does not split, it holds copies of.
    copied: dict[tuple[str, ...], int] = {}
    for leaf in leaves:
        axes = tuple(axis for axis in BATCH if axis not in leaf.axes and mesh[axis] > 1)
        copied[axes] = copied.get(axes, 0) + leaf.size * (width if "blocks" in leaf.names else 4)
    for axes, sums in copied.items():
        size = math.prod(mesh[axis] for axis in axes)
        yield "sum gradients", "all-reduce", axes, parts * sent_bytes("all-reduce", sums, size)
    # Rows go to their experts and come back, forward and backward.
    rows = tokens * model.num_experts_per_tok * model.hidden_size * width
    rows *= 2 * passes * layers * parts
    yield "exchange expert rows", "ragged-all-to-all", ("expert",), sent_bytes("all-to-all", rows, expert)
    # Outputs of attention and experts forward, gradients of their inputs backward; embedding and loss.
    sums = parts * tokens * model.hidden_size * width * (2 * passes * layers + 2)
    yield "sum over tensor", "all-reduce", ("tensor",), sent_bytes("all-reduce", sums, tensor)


def _gathered(leaf: _Leaf, mesh: dict[str, int]) -> int:
    """Elements of a parameter on a device once it is gathered."""
    return leaf.size * math.prod(mesh[axis] for axis in leaf.gathered)


def _abstract_mesh(mesh: dict[str, int]) -> AbstractMesh:
    return AbstractMesh(tuple(mesh[axis] for axis in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES))


@functools.cache
def _state_shapes(config: TrainConfig) -> TrainState:
    return abstract_state(config, _abstract_mesh(dict.fromkeys(AXES, 1)))


def _local_bytes(leaf, sharding) -> int:
    return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _axes(spec) -> frozenset[str]:
    return frozenset(a for part in spec for a in ((part,) if isinstance(part, str) else part or ()))


def _leaves(state: TrainState, shardings: TrainState) -> list[_Leaf]:
    def one(path, leaf, sharding):
        axes, kept = _axes(sharding.spec), _axes(compute_spec(letters_of(path)))
        gathered = tuple(axis for axis in AXES if axis in axes - kept and sharding.mesh.shape[axis] > 1)
        return _Leaf(path_names(path), math.prod(sharding.shard_shape(leaf.shape)), axes, gathered)

    found = jax.tree_util.tree_map_with_path(one, state.params, shardings.params)
    return jax.tree.leaves(found, is_leaf=lambda leaf: isinstance(leaf, _Leaf))
