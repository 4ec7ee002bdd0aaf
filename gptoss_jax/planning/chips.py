"""Published figures of accelerators, for one device as JAX counts devices, and the names of TPU slices."""

import dataclasses
import difflib
import math
import re

from gptoss_jax.training.flops import peak_flops

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of device. Bandwidths are one way, in bytes per second: published ones that count both
    directions are halved here."""

    name: str
    # As `device.device_kind` says it.
    device_kind: str
    # Bytes that a program may use.
    memory: float
    # To and from its memory.
    memory_bandwidth: float
    # To the other devices of the slice or of the node, all links together.
    link: float
    # Devices that these links join: a node's; None for a TPU slice, all of whose devices they join.
    node: int | None = None
    # Beyond the node, for one device.
    network: float | None = None
    # Dimensions of a slice; 0 for what has no slices.
    dimensions: int = 0
    devices_per_chip: int = 1

    @property
    def peak(self) -> float:
        """Dense bfloat16 FLOP/s."""
        return peak_flops(self.device_kind)


# Memory of a TPU: what the compiler of libtpu 0.0.42 lets a program have ("exceeds available HBM (15.75G)");
# the pages give 16, 95, 32 and, for a chip of two devices, 192 GiB. Bandwidths:
# https://docs.cloud.google.com/tpu/docs/v5e, /v5p, /v6e and /tpu7x, "HBM bandwidth per chip" and
# "Bidirectional inter-chip interconnect (ICI) bandwidth per chip": 400, 1200, 800 and 1200 GB/s.
# GPUs: NVIDIA's data sheets of A100 80GB SXM, H100 SXM, H200 SXM and of DGX B200 (1,440 GB and 64 TB/s in
# eight), NVLink 600, 900, 900 and 1,800 GB/s in both directions; networks are those of DGX A100 (eight ports
# of 200 Gb/s), DGX H100, H200 and B200 (eight of 400 Gb/s).
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "TPU v5e", 15.75 * GIB, 819e9, 400e9 / 2, dimensions=2),
        Chip("v5p", "TPU v5p", 95.74 * GIB, 2765e9, 1200e9 / 2, dimensions=3),
        Chip("v6e", "TPU v6e", 31.25 * GIB, 1638e9, 800e9 / 2, dimensions=2),
        Chip("tpu7x", "TPU7x", 94.75 * GIB, 7380e9 / 2, 1200e9 / 2 / 2, dimensions=3, devices_per_chip=2),
        Chip("a100", "NVIDIA A100-SXM4-80GB", 80e9, 2039e9, 600e9 / 2, node=8, network=200e9 / 8),
        Chip("h100", "NVIDIA H100 80GB HBM3", 80e9, 3350e9, 900e9 / 2, node=8, network=400e9 / 8),
        Chip("h200", "NVIDIA H200", 141e9, 4800e9, 900e9 / 2, node=8, network=400e9 / 8),
        Chip("b200", "NVIDIA B200", 180e9, 8000e9, 1800e9 / 2, node=8, network=400e9 / 8),
    )
}


def find_chip(name: str, field: str = "chip") -> Chip:
    """The chip of a name. Raises ValueError that lists those there are."""
    if name.lower() in CHIPS:
        return CHIPS[name.lower()]
    near = difflib.get_close_matches(name.lower(), CHIPS, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ValueError(f"{field} is {name!r}: {hint}known are {', '.join(CHIPS)}")


def parse_topology(name: str) -> tuple[Chip, int]:
    """The chip and the number of devices of a TPU slice, such as "v5p:4x4x4".

    Raises ValueError for an unknown chip, one that comes in no slices, or dimensions that are not the chip's.
    """
    kind, _, shape = name.partition(":")
    chip = find_chip(kind, "topology")
    if not chip.dimensions:
        raise ValueError(
            f"topology is {name!r}: only TPUs have topologies; for this chip: --chip {chip.name} --devices N"
        )
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) or shape.count("x") + 1 != chip.dimensions:
        example = "x".join(["4"] * chip.dimensions)
        raise ValueError(
            f"topology is {name!r}: {chip.name} has {chip.dimensions} dimensions, such as "
            f"{chip.name}:{example}"
        )
    return chip, chip.devices_per_chip * math.prod(map(int, shape.split("x")))
