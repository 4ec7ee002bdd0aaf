"""Estimates the memory of inference per device from shapes.

Weights and the KV cache are exact. The rest is the worst case: all slots at their maximum context, all
prompts prefilled at the same time, and formulas for the temporaries of a prefill or decode call.
TPUs pad some layouts, so their weights take up to 3 % more.
"""

import collections
import contextlib
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from gptoss_jax.config import ModelConfig, TrainConfig, require
from gptoss_jax.hardware import CPU, Chip, find_chip, parameter_counts
from gptoss_jax.inference import slots
from gptoss_jax.inference.engine import DEFAULT_PREFIX_BYTES
from gptoss_jax.inference.prefill import (
    CHUNK_SIZES,
    MIN_CACHE_LEN,
    cache_length,
    prefill_batch,
    prefill_limit,
)
from gptoss_jax.kernels.attention.cached import BLOCK
from gptoss_jax.model.kv_cache import init_cache
from gptoss_jax.model.parameters import (
    adapted_target,
    parameter_name,
    parameter_shardings,
    path_names,
    tree_bytes,
)
from gptoss_jax.model.transformer import abstract_params
from gptoss_jax.parallel.mesh import batch_shards, parse_mesh
from gptoss_jax.planning.estimate import MEMORY_UTILIZATION
from gptoss_jax.planning.plan import all_meshes, chip_dict
from gptoss_jax.planning.shards import abstract_mesh, gathered_axes, local_bytes

# Width of a tile of TPU memory.
LANES = 128
Experts = Literal["mxfp4", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class Workload:
    """Capacity of an inference engine."""

    # Number of sequences that decode together, and maximum tokens per sequence; None is the model's limit.
    slots: int = 1
    context: int | None = None
    prefix_cache_bytes: int = DEFAULT_PREFIX_BYTES


@dataclasses.dataclass(frozen=True)
class InferenceMemory:
    """Memory in bytes per device."""

    weights: int
    # State of all slots: keys, values, and counts of sampled tokens.
    cache: int
    # Keys and values of prompts during prefill, before they are copied to slots.
    prompts: int
    # Keys and values in the prefix cache.
    prefixes: int
    # In use during a call.
    temporaries: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class InferenceEstimate:
    """Memory on one mesh, per device."""

    mesh: dict[str, int]
    memory: InferenceMemory
    # Memory of the chip, in bytes; None on CPU.
    capacity: float | None

    @property
    def fits(self) -> bool | None:
        """None if the memory is unknown."""
        return None if self.capacity is None else self.memory.total <= MEMORY_UTILIZATION * self.capacity


@dataclasses.dataclass(frozen=True)
class _Engine:
    """An engine on a mesh: model with resolved compute dtype, slots, and tokens per slot."""

    model: ModelConfig
    mesh: dict[str, int]
    num_slots: int
    cache_len: int
    is_cpu: bool
    is_tpu: bool

    @property
    def itemsize(self) -> int:
        return jnp.dtype(self.model.compute_dtype).itemsize


def estimate_inference(
    model: ModelConfig, chip: Chip | None, mesh: dict[str, int], workload: Workload
) -> InferenceEstimate:
    """Estimates an engine of `model` on a mesh of `chip`s; None is a CPU.

    Raises ValueError if the mesh cannot shard the model.
    """
    context = model.max_position_embeddings if workload.context is None else workload.context
    model = dataclasses.replace(model, compute_dtype="float32" if chip is None else "bfloat16")
    shards = batch_shards(mesh)
    num_slots = -(-workload.slots // shards) * shards
    is_tpu = chip is not None and chip.dimensions > 0
    engine = _Engine(model, mesh, num_slots, cache_length(model, context), chip is None, is_tpu)
    row = row_bytes(engine, engine.cache_len)
    # Either all prompts are in prefill, or one answer decodes while the other prompts are.
    prompts, temporaries = max(
        (num_slots * row, prefill_temporaries(engine)),
        ((num_slots - 1) * row, decode_temporaries(engine)),
        key=sum,
    )
    prefixes = workload.prefix_cache_bytes
    memory = InferenceMemory(
        weight_bytes(engine)[0].total(), slot_bytes(engine), prompts, prefixes, temporaries
    )
    return InferenceEstimate(dict(mesh), memory, None if chip is None else chip.memory)


def rollout_memory(config: TrainConfig, chip: Chip, mesh: dict[str, int]) -> int:
    """Returns the bytes per device, besides the parameters, in use while a run with objective grpo samples
    the answers of a step."""
    workload = Workload(config.data.batch_size, config.data.seq_len, prefix_cache_bytes=0)
    memory = estimate_inference(config.model, None if chip.name == CPU else chip, mesh, workload).memory
    # Equal prompts are prefilled once.
    return memory.cache + memory.prompts // config.grpo.group_size + memory.temporaries


def weight_bytes(engine: _Engine) -> tuple[collections.Counter, int]:
    """Returns the bytes of the parameters by name (such as `attention.q`, all layers), in the dtypes that
    `gptoss serve` uses for published weights, and the bytes of parameters gathered for use: one layer,
    embedding and head.

    Expert matrices are packed or bfloat16, adapters float32; the rest has the compute dtype.
    """
    model, mesh = engine.model, abstract_mesh(engine.mesh)

    def typed(path, leaf):
        name = parameter_name(path)
        if leaf.dtype == jnp.uint8 or adapted_target(name) is not None:
            return leaf
        is_expert = name in ("moe.gate_up", "moe.down")
        return jax.ShapeDtypeStruct(leaf.shape, "bfloat16" if is_expert else model.compute_dtype)

    tree = jax.tree_util.tree_map_with_path(typed, abstract_params(model))
    shardings = jax.tree.leaves(parameter_shardings(tree, mesh))
    stored: collections.Counter[str] = collections.Counter()
    gathered = 0
    for (path, leaf), sharding in zip(jax.tree_util.tree_leaves_with_path(tree), shardings, strict=True):
        size, axes = local_bytes(leaf, sharding), gathered_axes(path, sharding)
        stored[parameter_name(path)] += size
        if axes:
            layers = model.num_hidden_layers if "blocks" in path_names(path) else 1
            gathered += size * math.prod(engine.mesh[axis] for axis in axes) // layers
    return stored, gathered


def row_bytes(engine: _Engine, cache_len: int) -> int:
    """Returns the bytes of the keys and values of one sequence, which only the tensor axis splits."""
    dtype = jnp.dtype(engine.model.compute_dtype)
    cache = jax.eval_shape(lambda: init_cache(engine.model, 1, cache_len, dtype))
    return tree_bytes(cache.layers) // engine.mesh["tensor"]


def slot_bytes(engine: _Engine) -> int:
    """Returns the bytes of the state of all slots; only the cache is split."""
    state = jax.eval_shape(lambda: slots.init_slots(engine.model, engine.num_slots, engine.cache_len))
    layers, lengths, shards = state.cache.layers, state.cache.lengths, batch_shards(engine.mesh)
    cache = tree_bytes(layers) // (shards * engine.mesh["tensor"]) + tree_bytes(lengths) // shards
    return tree_bytes(state) - tree_bytes(state.cache) + cache


def decode_temporaries(engine: _Engine) -> int:
    """Returns the bytes in use during a decode call: logits and their copies in sampling. Except on CPU, also
    the scores of a layer and copies that the TPU compiler makes to change layouts: attention's q and output
    matrices, and all keys and values, with heads padded to 128 lanes.

    On CPU, XLA converts bfloat16 experts to float32, for all layers at once and through a copy.
    """
    model, rows = engine.model, engine.num_slots // batch_shards(engine.mesh)
    stored, gathered = weight_bytes(engine)
    logits = 4 * engine.num_slots * model.vocab_size * 4
    if engine.is_cpu:
        return logits + gathered + _converted(stored)
    tensor = engine.mesh["tensor"]
    scores = 2 * rows * model.num_attention_heads // tensor * engine.cache_len * 4
    cache = rows * row_bytes(engine, engine.cache_len)
    if engine.is_tpu:
        cache = cache * -(-model.head_dim // LANES) * LANES // model.head_dim
    return logits + gathered + scores + cache + stored["attention.q"] + stored["attention.out"]


def prefill_temporaries(engine: _Engine) -> int:
    """Returns the bytes in use during the largest prefill call: a copy of the prompts' keys and values, the
    activations of a layer, and its scores for a block of the cache."""
    model, tensor = engine.model, engine.mesh["tensor"]
    stored, gathered = weight_bytes(engine)
    heads = 2 * model.num_attention_heads + 2 * model.num_key_value_heads
    per_token = 2 * model.hidden_size + heads * model.head_dim // tensor
    experts = 2 * model.hidden_size + 3 * model.intermediate_size // tensor
    per_token = (per_token + model.num_experts_per_tok * experts) * engine.itemsize
    per_token += 3 * model.num_attention_heads // tensor * BLOCK * 4
    shards, most, cache_len = batch_shards(engine.mesh), 0, MIN_CACHE_LEN
    while True:
        # Shorter prompts are read in larger groups.
        cache_len = min(cache_len, engine.cache_len)
        for chunk in CHUNK_SIZES:
            limit = prefill_limit(
                model, chunk, cache_len, engine.num_slots, shards=shards, is_one_cpu=engine.is_cpu
            )
            rows = -(-prefill_batch(limit, engine.num_slots) // shards)
            most = max(most, rows * (row_bytes(engine, cache_len) + min(chunk, cache_len) * per_token))
        if cache_len == engine.cache_len:
            return most + gathered + (_converted(stored) if engine.is_cpu else 0)
        cache_len *= 2


def _converted(stored: collections.Counter) -> int:
    return 3 * (stored["moe.gate_up"] + stored["moe.down"])


@dataclasses.dataclass(frozen=True)
class InferencePlan:
    """Memory of an engine on a number of devices."""

    model: ModelConfig
    workload: Workload
    # None is a CPU.
    chip: Chip | None
    devices: int
    # Best first.
    estimates: list[InferenceEstimate]

    @property
    def fits(self) -> bool | None:
        """True if any mesh fits; None if the memory is unknown."""
        return None if self.chip is None else any(one.fits for one in self.estimates)

    def to_dict(self) -> dict[str, Any]:
        """Returns all results as JSON-serializable values; bytes are per device."""
        total, active = parameter_counts(self.model)
        estimates = []
        for one in self.estimates:
            memory = {**dataclasses.asdict(one.memory), "total": one.memory.total}
            estimates.append(dataclasses.asdict(one) | {"fits": one.fits, "memory": memory})
        return {
            "model": self.model.to_dict(),
            "parameters": total,
            "active_parameters": active,
            "workload": dataclasses.asdict(self.workload),
            "chip": None if self.chip is None else chip_dict(self.chip),
            "devices": self.devices,
            "fits": self.fits,
            "estimates": estimates,
        }


def plan_inference(
    model: ModelConfig,
    *,
    chip: str,
    devices: int = 1,
    memory: float | None = None,
    workload: Workload = Workload(),  # noqa: B008 (it is frozen)
    experts: Experts = "mxfp4",
    meshes: Sequence[str] = (),
) -> InferencePlan:
    """Estimates an engine on the given meshes, or on all that can split the model, least memory first.

    Args:
      chip: a name in `hardware.CHIPS`, or "cpu", whose memory is not compared.
      memory: bytes of a device, instead of those of the chip; required if the chip is not known.

    Raises ValueError if an argument is not allowed, or a given mesh cannot split the model.
    """
    is_cpu = chip.lower() == CPU
    require(devices > 0, "devices", devices, "must be above 0")
    require(not is_cpu or devices == 1, "devices", devices, "must be 1 with --chip cpu")
    limit, context = model.max_position_embeddings, workload.context
    allowed = f"must be from 2 to {limit}, the model's limit"
    require(context is None or 2 <= context <= limit, "context", context, allowed)
    require(workload.slots >= 1, "slots", workload.slots, "must be 1 or more")
    require(not is_cpu or memory is None, "memory", memory, "must not be given with --chip cpu")
    kind = None if is_cpu else find_chip(chip, memory=memory)
    model = dataclasses.replace(model, expert_format="mxfp4" if experts == "mxfp4" else "plain")
    found = []
    for mesh in [parse_mesh(mesh, devices) for mesh in meshes] or all_meshes(devices):
        # The data axis can always split it.
        with contextlib.nullcontext() if meshes else contextlib.suppress(ValueError):
            found.append(estimate_inference(model, kind, mesh, workload))
    found.sort(key=lambda one: one.memory.total)
    return InferencePlan(model, workload, kind, devices, found)
