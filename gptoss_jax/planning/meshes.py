"""Which meshes a number of devices can make, and which of them fits best."""

import difflib
import math
from collections.abc import Iterator, Sequence

from gptoss_jax.config import MeshConfig, TrainConfig
from gptoss_jax.hardware import Chip
from gptoss_jax.parallel.mesh import AXES
from gptoss_jax.planning.estimate import Estimate, estimate


def parse_mesh(text: str, devices: int) -> dict[str, int]:
    """Sizes by axis from such as "fsdp=16,expert=4"; axes that are not named are 1, and one may be -1.

    Raises ValueError for an axis that is not known, and where the sizes do not multiply to the devices.
    """
    sizes = dict.fromkeys(AXES, 1)
    for part in filter(None, text.replace(" ", "").split(",")):
        name, _, size = part.partition("=")
        if name not in sizes:
            near = difflib.get_close_matches(name, AXES, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"mesh is {text!r}: {hint}axes are {', '.join(AXES)}")
        if not size.lstrip("-").isdigit():
            raise ValueError(f"mesh is {text!r}: must be axis=number, such as fsdp=16,expert=4")
        sizes[name] = int(size)
    MeshConfig(**sizes)
    product = math.prod(size for size in sizes.values() if size != -1)
    if -1 in sizes.values() and devices % product == 0:
        sizes = {name: devices // product if size == -1 else size for name, size in sizes.items()}
    if math.prod(sizes.values()) != devices:
        raise ValueError(f"mesh is {text!r}: the axes must multiply to the {devices} devices there are")
    return sizes


def all_meshes(devices: int) -> Iterator[dict[str, int]]:
    """Every way to lay so many devices out along the four axes."""
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    for fsdp in divisors:
        for expert in (n for n in divisors if devices // fsdp % n == 0):
            for tensor in (n for n in divisors if devices // fsdp // expert % n == 0):
                data = devices // fsdp // expert // tensor
                yield dict(zip(AXES, (data, fsdp, expert, tensor), strict=True))


def rank(estimates: Sequence[Estimate]) -> list[Estimate]:
    """Best first: what fits by its step without overlap, the shortest first, then the rest by its memory."""
    return sorted(
        estimates,
        key=lambda one: (not one.fits, one.serial_seconds if one.fits else one.memory.total),
    )


def compare(
    config: TrainConfig, chip: Chip, devices: int, meshes: Sequence[dict[str, int]]
) -> list[Estimate]:
    """Estimates for these meshes, or for all that are possible where none is given, best first.

    Raises ValueError for a given mesh that cannot split model or batch, and where none can.
    """
    if meshes:
        return rank([estimate(config, chip, mesh) for mesh in meshes])
    found, refusal = [], None
    for mesh in all_meshes(devices):
        try:
            found.append(estimate(config, chip, mesh))
        except ValueError as error:
            refusal = error
    if not found:
        raise ValueError(
            f"no mesh of {devices} devices can split this model and batch; the last tried: {refusal}"
        )
    return rank(found)
