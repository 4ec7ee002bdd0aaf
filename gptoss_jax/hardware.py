"""Accelerators (peak FLOP/s, memory, bandwidths), and the FLOPs of a model on them (MFU).

Figures are per JAX device. FLOPs include only useful work: the experts that a token is routed to, and the
keys in its window. Recomputation, padding and the masked half of attention scores lower the MFU.
"""

import dataclasses
import math
import os
import re

from gptoss_jax.config import SLIDING, ModelConfig
from gptoss_jax.config.base import nearest, require
from gptoss_jax.config.model import EXPERT_TARGETS, LORA_TARGETS

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of device. If memory and links are not given, only its peak is known."""

    name: str
    # Pattern for the entire `device.device_kind`, so that an unknown chip has no peak instead of that of a
    # similar chip.
    device_kind: str
    # Dense bfloat16 FLOP/s with float32 accumulation.
    peak: float
    # Usable memory, in bytes.
    memory: float = 0.0
    # Bytes per second: memory bandwidth, and one-way bandwidth of all links to other devices in the slice or
    # node.
    memory_bandwidth: float = 0.0
    link: float = 0.0
    # Devices per node, connected by the links, and bytes per second and device between nodes; a TPU slice has
    # no nodes.
    node: int | None = None
    network: float | None = None
    # Dimensions of a TPU slice.
    dimensions: int = 0
    devices_per_chip: int = 1
    # False for v5e, where `ragged_all_to_all` is missing on slices of more than 16 chips.
    has_ragged_all_to_all: bool = True

    @property
    def has_times(self) -> bool:
        """False if only the memory is known."""
        return self.peak < math.inf


# TPU: https://docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e and /tpu7x: "Peak compute per chip (bf16)",
# "HBM bandwidth per chip" and "Bidirectional inter-chip interconnect (ICI) bandwidth per chip" (halved here).
# Their memory is what the compiler of libtpu 0.0.42 grants ("exceeds available HBM (15.75G)"). A tpu7x chip
# is two devices.
# GPU: NVIDIA's data sheets, with peaks halved if they count 2:4 sparsity, and the architecture brief
# of Blackwell; NVLink halved to one way; networks of DGX A100 (eight ports of 200 Gb/s), H100, H200 and B200
# (eight of 400 Gb/s).
TABLE = (
    Chip("v4", r"TPU v4", 275e12),
    Chip(
        "v5e", r"TPU v5 ?(lite|e)", 197e12, 15.75 * GIB, 819e9, 400e9 / 2,
        dimensions=2, has_ragged_all_to_all=False,
    ),
    Chip("v5p", r"TPU v5p?", 459e12, 95.74 * GIB, 2765e9, 1200e9 / 2, dimensions=3),
    Chip("v6e", r"TPU v6 ?(lite|e)", 918e12, 31.25 * GIB, 1638e9, 800e9 / 2, dimensions=2),
    Chip(
        "tpu7x", r"TPU ?7x", 2307e12 / 2, 94.75 * GIB, 7380e9 / 2, 1200e9 / 2 / 2,
        dimensions=3, devices_per_chip=2,
    ),
    Chip("a100", r"NVIDIA A100[- ].*", 312e12, 80e9, 2039e9, 600e9 / 2, node=8, network=200e9 / 8),
    Chip("h100", r"NVIDIA H100 80GB HBM3", 1979e12 / 2, 80e9, 3350e9, 900e9 / 2, node=8, network=400e9 / 8),
    Chip("h200", r"NVIDIA H200", 1979e12 / 2, 141e9, 4800e9, 900e9 / 2, node=8, network=400e9 / 8),
    Chip("b200", r"NVIDIA B200", 4500e12 / 2, 180e9, 8000e9, 1800e9 / 2, node=8, network=400e9 / 8),
    Chip("h100-pcie", r"NVIDIA H100 PCIe", 1513e12 / 2),
    Chip("h100-nvl", r"NVIDIA H100 NVL", 1671e12 / 2),
    Chip("h200-nvl", r"NVIDIA H200 NVL", 1671e12 / 2),
    Chip("gh200", r"NVIDIA GH200 .*", 1979e12 / 2),
    Chip("gb200", r"NVIDIA GB200", 5000e12 / 2),
    Chip("l4", r"NVIDIA L4", 242e12 / 2),
    Chip("l40s", r"NVIDIA L40S", 362e12),
    Chip("a10", r"NVIDIA A10", 125e12),
    Chip("a30", r"NVIDIA A30", 165e12),
    Chip("a40", r"NVIDIA A40", 149.7e12),
)  # fmt: skip
# Name of the chip for planning on this machine's CPU.
CPU = "cpu"
# Chips that `gptoss plan` supports, besides CPU.
CHIPS = {chip.name: chip for chip in TABLE if chip.memory}

# Standard slices of Cloud TPU, at the same addresses: prefix of the accelerator type, chip, what the number
# after the prefix counts (TensorCores, two per chip, or chips), shapes.
_SHAPES_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SHAPES_3D = (
    "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16",
    "16x16x24",
)  # fmt: skip
ACCELERATOR_TYPES = {
    f"{prefix}-{per_chip * math.prod(map(int, shape.split('x')))}": f"{chip}:{shape}"
    for prefix, chip, per_chip, shapes in (
        ("v5litepod", "v5e", 1, _SHAPES_2D),
        ("v5e", "v5e", 1, _SHAPES_2D),
        ("v6e", "v6e", 1, _SHAPES_2D),
        ("v5p", "v5p", 2, _SHAPES_3D),
    )
    for shape in shapes
}


def find_chip(name: str, field: str = "chip", memory: float | None = None) -> Chip:
    """Returns the chip with the given name, or, with `memory` bytes, one of which nothing else need be known.
    "cpu" is this machine, of which only the memory is known, that of the host even in a container.

    Raises a ValueError that names `field` and the known chips, or for memory that is not above 0.
    """
    if memory is not None:
        require(0 < memory < math.inf, "memory", memory / 1e9, "must be above 0 GB")
        known = CHIPS.get(name.lower(), Chip(name, "", math.inf, link=math.inf))
        return dataclasses.replace(known, memory=memory)
    if name.lower() in CHIPS:
        return CHIPS[name.lower()]
    if name.lower() == CPU:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return Chip(CPU, "", math.inf, memory=memory, link=math.inf)
    near = nearest(name.lower(), CHIPS)
    hint = f"did you mean {near}? " if near else ""
    other = "; for another, add --memory GB" if field == "chip" else ""
    known_names = (*CHIPS, CPU) if field == "chip" else CHIPS
    raise ValueError(f"{field} is {name!r}: {hint}known chips: {', '.join(known_names)}{other}")


def resolve_topology(name: str) -> str:
    """Returns the topology of a Cloud TPU accelerator type, such as "v5p:2x2x4" for "v5p-32"; a topology is
    returned unchanged.

    Raises ValueError for a size that is not a standard slice, and for an unknown chip.
    """
    kind, dash, _ = name.lower().partition("-")
    if ":" in name or not dash:
        return name
    if name.lower() in ACCELERATOR_TYPES:
        return ACCELERATOR_TYPES[name.lower()]
    known = [one for one in ACCELERATOR_TYPES if one.partition("-")[0] == kind]
    allowed = f"give one of {', '.join(known)}, or a shape" if known else "give an accelerator type of v5e"
    allowed += (
        ", such as v5p:4x4x4" if known else ", v5p or v6e, such as v5p-32, or a shape, such as v5p:2x2x4"
    )
    raise ValueError(f"topology is {name!r}: {allowed}")


def parse_topology(name: str) -> tuple[Chip, int]:
    """Returns the chip and the number of devices of a TPU slice such as "v5p:4x4x4".

    Raises ValueError for an unknown chip, a GPU, or the wrong number of dimensions.
    """
    kind, _, shape = name.partition(":")
    chip = find_chip(kind, "topology")
    if not chip.dimensions:
        raise ValueError(
            f"topology is {name!r}: only TPUs have topologies; for this chip: --chip {chip.name} --devices N"
        )
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) or shape.count("x") + 1 != chip.dimensions:
        example = "x".join("4" * chip.dimensions)
        allowed = f"{chip.name} has {chip.dimensions} dimensions, such as {chip.name}:{example}"
        raise ValueError(f"topology is {name!r}: {allowed}")
    return chip, chip.devices_per_chip * math.prod(map(int, shape.split("x")))


def peak_flops(device_kind: str) -> float | None:
    """Returns the dense bfloat16 peak of one device in FLOP/s, by `jax.devices()[0].device_kind`.

    None for a chip that is not in the table (every CPU) and for a slice of a GPU.
    """
    if "MIG" in device_kind:
        return None
    return next((c.peak for c in TABLE if re.fullmatch(c.device_kind, device_kind, re.IGNORECASE)), None)


def mfu(flops_per_second: float, device_kind: str, device_count: int = 1) -> float | None:
    """Model FLOPs utilization (Chowdhery et al. 2022, arXiv:2204.02311, appendix B): the useful FLOP/s of all
    devices over their peak, between 0 and 1. None if the peak is unknown."""
    peak = peak_flops(device_kind)
    return None if peak is None else flops_per_second / (peak * device_count)


def _matmul_weights(config: ModelConfig) -> tuple[int, int, int, int]:
    """Returns the number of weights in one layer's attention projections and router, in one expert, and in
    the head."""
    hidden = config.hidden_size
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    attention, router = hidden * heads * config.head_dim, hidden * config.num_local_experts
    return attention, router, 3 * hidden * config.intermediate_size, hidden * config.vocab_size


def parameter_counts(config: ModelConfig) -> tuple[int, int]:
    """Returns the number of parameters, `(total, active)`, without adapters; both include norms, biases and
    sinks.

    Active parameters are those that a token is multiplied with: `num_experts_per_tok` of the experts, but not
    the input embedding, which is only looked up. Tied weights count once, in both, because the head uses
    them.
    """
    attention, router, expert, vocabulary = _matmul_weights(config)
    hidden, layers = config.hidden_size, config.num_hidden_layers
    if config.attention_bias:
        queries_keys_values = config.num_attention_heads + 2 * config.num_key_value_heads
        attention += queries_keys_values * config.head_dim + hidden
    attention += config.learned_sinks * config.num_attention_heads
    router += config.router_bias * config.num_local_experts
    expert += config.expert_bias * (2 * config.intermediate_size + hidden)
    outside_experts = layers * (attention + router + 2 * hidden) + hidden + vocabulary
    total = outside_experts + layers * expert * config.num_local_experts
    active = outside_experts + layers * expert * config.num_experts_per_tok
    return (total if config.tie_word_embeddings else total + vocabulary), active


def adapter_weights(config: ModelConfig, targets: tuple[str, ...] = LORA_TARGETS) -> int:
    """Returns the number of active adapter weights per token of the given targets, in all layers."""
    if config.lora is None:
        return 0
    hidden, width, size = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * size, config.num_key_value_heads * size
    outputs = {"q": queries, "k": keys, "v": keys, "out": queries, "gate_up": 2 * width, "down": width}
    outputs |= {"router": config.num_local_experts, "head": config.vocab_size}
    count = 0
    for target in targets:
        times = config.num_experts_per_tok if target in EXPERT_TARGETS else 1
        times *= 1 if target == "head" else config.num_hidden_layers
        if target in config.lora.targets:
            count += times * config.lora_rank(target) * (hidden + outputs[target])
    return count


def mean_visible_keys(config: ModelConfig, layer_type: str, seq_len: int) -> float:
    """Returns the number of keys that a query sees, averaged over a document of `seq_len` tokens.

    A query at position i sees i + 1 keys in a full-attention layer, and min(i + 1, W + sink_tokens) in a
    sliding-window layer, because sink tokens stay visible after they leave the window.
    """
    most = seq_len
    if layer_type == SLIDING:
        most = min(seq_len, config.sliding_window + config.sink_tokens)
    return (most * (most + 1) / 2 + (seq_len - most) * most) / seq_len


def flops_per_token(config: ModelConfig, seq_len: int, training: bool = True) -> float:
    """Returns the useful FLOPs per token in a row of `seq_len` tokens, including the head.

    Counts two FLOPs per multiply-add of all matmuls: projections, router, active experts, head, their
    adapters, and q·k and p·v over the mean number of visible keys. Norms, softmax and activations are
    omitted, as usual. Training is three times the forward pass (Kaplan et al. 2020, arXiv:2001.08361, section
    2.1), but twice for frozen weights with adapters, which have no gradient. Assumes one document per row;
    attention is cheaper in rows packed from several short documents.

    Raises ValueError if `seq_len` is below 1.
    """
    if seq_len < 1:
        raise ValueError(f"seq_len is {seq_len}: must be 1 or more")
    attention, router, expert, head = _matmul_weights(config)
    layer = attention + router + config.num_experts_per_tok * expert
    keys = sum(mean_visible_keys(config, kind, seq_len) for kind in config.resolved_layer_types)
    scores = 2 * config.num_attention_heads * config.head_dim * keys
    weights, adapters = config.num_hidden_layers * layer + head, adapter_weights(config)
    if not training:
        return 2.0 * (weights + adapters + scores)
    return 2.0 * ((3 if config.lora is None else 2) * weights + 3 * (adapters + scores))
