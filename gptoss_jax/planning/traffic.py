"""Estimates the collectives of a training step from shapes, in bytes and seconds."""

import dataclasses
import math
from collections.abc import Iterator

from gptoss_jax.config import FULL
from gptoss_jax.hardware import Chip
from gptoss_jax.parallel.all_to_all import BUFFER_PERCENT
from gptoss_jax.parallel.mesh import BATCH
from gptoss_jax.planning.hlo import bytes_sent
from gptoss_jax.planning.shards import Step


@dataclasses.dataclass(frozen=True)
class CollectiveCost:
    """All collectives in a step with the same purpose: bytes sent per device, seconds at published rates."""

    purpose: str
    # One of `hlo.KINDS`.
    kind: str
    axes: tuple[str, ...]
    sent: float
    seconds: float


def collective_costs(step: Step, chip: Chip) -> tuple[CollectiveCost, ...]:
    """Returns the collectives of a step that send more than zero bytes."""
    return tuple(
        CollectiveCost(purpose, kind, axes, sent, transfer_seconds(chip, step.mesh, kind, axes, sent))
        for purpose, kind, axes, sent in _collectives(step, chip.has_ragged_all_to_all)
        if sent > 0
    )


def transfer_seconds(
    chip: Chip, mesh: dict[str, int], kind: str, axes: tuple[str, ...], sent: float
) -> float:
    """Returns the seconds for one device to send `sent` bytes along some axes; devices along the last axis of
    the mesh are nearest neighbors.

    In a slice, all links of a chip work in parallel. If a group spans nodes, its k devices per node share the
    uplink: each carries 1/k of a ring's traffic; an all-to-all sends all cross-node traffic over it.
    """
    inside = sent / chip.link
    if chip.node is None or chip.network is None or math.prod(mesh.values()) <= chip.node:
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


def _keys_and_values(step: Step) -> Iterator[tuple[str, str, tuple[str, ...], float]]:
    """Yields what context parallelism sends: keys and values in the forward pass and, with remat, once more;
    and their gradients."""
    model, n, axes = step.model, step.mesh["context"], ("context",)
    passes = 1 if model.remat == "none" else 2
    full = model.resolved_layer_types.count(FULL) * step.microbatches
    sent = full * bytes_sent("all-gather", step.context_bytes, n)
    yield "gather keys and values", "all-gather", axes, passes * sent
    yield "scatter their gradients", "reduce-scatter", axes, sent
    # Each device sends the last keys of its two chunks.
    halos = 2 * (model.sliding_window - 1) * step.sequences * step.key_bytes
    sent = (model.num_hidden_layers * step.microbatches - full) * halos * (passes + 1)
    yield "exchange halos", "collective-permute", axes, sent if n > 1 else 0.0


def _collectives(step: Step, has_ragged: bool) -> Iterator[tuple[str, str, tuple[str, ...], float]]:
    """Yields (purpose, kind, axes, bytes sent per device and step) for all collectives due to sharding."""
    model, width, n = step.model, step.itemsize, step.microbatches
    for axes in sorted({p.gathered_over for p in step.parameters if p.gathered_over}):
        size = step.axis_size(axes)
        found = [p for p in step.parameters if p.gathered_over == axes]
        blocks, embedding, head = (
            [p for p in found if part in p.names] for part in ("blocks", "embedding", "head")
        )
        # Both forward and backward pass gather, with or without remat. The embedding is sent in its storage
        # dtype, and the gradients of embedding and head in float32.
        stored = width if model.lora else 4
        gathers = n * (2 * step.gathered(blocks) + step.gathered(embedding, stored) + step.gathered(head))
        yield "gather parameters", "all-gather", axes, bytes_sent("all-gather", gathers, size)
        blocks, rest = ([p for p in part if p.is_trained] for part in (blocks, embedding + head))
        scatters = n * (step.gathered(blocks) + step.gathered(rest, itemsize=4))
        yield "scatter gradients", "reduce-scatter", axes, bytes_sent("reduce-scatter", scatters, size)
    # Gradients are summed over the batch axes that replicate the parameter.
    replicated: dict[tuple[str, ...], int] = {}
    for p in step.parameters:
        axes = tuple(axis for axis in BATCH if axis not in p.axes and step.mesh[axis] > 1)
        size = p.size * (width if "blocks" in p.names else 4)
        replicated[axes] = replicated.get(axes, 0) + p.is_trained * size
    for axes, size in replicated.items():
        yield "sum gradients", "all-reduce", axes, n * bytes_sent("all-reduce", size, step.axis_size(axes))
    yield from _keys_and_values(step)
    # Rows are sent to their experts and back in the forward and backward pass and, with remat, once more.
    passes = (3 if model.remat == "block" else 2) * model.num_hidden_layers
    stream = n * step.tokens * model.hidden_size * width
    rows = stream * model.num_experts_per_tok * 2 * passes
    sent = bytes_sent("all-to-all", rows, step.mesh["expert"])
    # Without `ragged_all_to_all`, whole buffers are sent.
    kind, percent = ("ragged-all-to-all", 100) if has_ragged else ("all-to-all", BUFFER_PERCENT["padded"])
    yield "dispatch and combine", kind, ("expert",), sent * percent / 100
    # Outputs of attention and experts, gradients of their inputs; embedding and loss. Packed experts gather
    # their rows instead, between their two matmuls and after them.
    is_packed, tensor = model.expert_format == "mxfp4", step.mesh["tensor"]
    sums = stream * ((1 if is_packed else 2) * passes + 2)
    yield "sum over tensor", "all-reduce", ("tensor",), bytes_sent("all-reduce", sums, tensor)
    if is_packed:
        width_of_rows = model.intermediate_size + model.hidden_size
        rows = n * step.tokens * model.num_experts_per_tok * width_of_rows * width * passes
        yield "gather expert rows", "all-gather", ("tensor",), bytes_sent("all-gather", rows, tensor)
