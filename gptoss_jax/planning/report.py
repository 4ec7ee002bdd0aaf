"""The command `gptoss plan`: from a preset and devices to estimates, compiled steps and their report."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from gptoss_jax.config import TrainConfig, require
from gptoss_jax.config.base import write_json
from gptoss_jax.config.paths import output_file
from gptoss_jax.hardware import Chip, find_chip, parameter_counts, parse_topology
from gptoss_jax.planning.compiled import Compiled, compile_step
from gptoss_jax.planning.estimate import Estimate
from gptoss_jax.planning.meshes import compare, parse_mesh


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of a step on some devices."""

    config: TrainConfig
    chip: Chip
    devices: int
    topology: str | None
    # Best first.
    estimates: list[Estimate]
    # One for each mesh that was compiled.
    compiled: list[Compiled]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values; bytes, seconds and operations of one device."""
        total, active = parameter_counts(self.config.model)
        estimates = []
        for one in self.estimates:
            extra = {"fits": one.fits, "communication_seconds": one.communication_seconds}
            extra["memory"] = {**dataclasses.asdict(one.memory), "total": one.memory.total}
            estimates.append(dataclasses.asdict(one) | extra)
        return {
            "config": self.config.to_dict(),
            "parameters": total,
            "active_parameters": active,
            "chip": dataclasses.asdict(self.chip),
            "devices": self.devices,
            "topology": self.topology,
            "estimates": estimates,
            "compiled": [dataclasses.asdict(one) | {"total": one.total} for one in self.compiled],
        }


def make_plan(
    config: TrainConfig,
    topology: str | None = None,
    chip: str | None = None,
    devices: int | None = None,
    meshes: Sequence[str] = (),
    compiling: Callable[[dict[str, int]], None] = lambda mesh: None,
) -> Plan:
    """Estimates for the meshes given, or for all there are; with a topology, the meshes given (or the best by
    the estimate) are compiled too. `compiling` is told of each before it begins.

    Raises ValueError, in one line, for arguments that are not allowed; OSError where the compiler fails.
    """
    if topology is not None:
        require(chip is None and devices is None, "topology", topology, "says chip and devices already")
        kind, count = parse_topology(topology)
    else:
        require(
            chip is not None and devices is not None,
            "topology",
            topology,
            "give one, such as --topology v5p:4x4x4, or --chip h200 --devices 64",
        )
        require(devices > 0, "devices", devices, "must be above 0")
        kind, count = find_chip(chip), devices
    estimates = compare(config, kind, count, [parse_mesh(mesh, count) for mesh in meshes])
    compiled = []
    for one in (estimates if meshes else estimates[:1]) if topology else ():
        compiling(one.mesh)
        compiled.append(compile_step(config, topology, one.mesh))
    return Plan(config, kind, count, topology, estimates, compiled)


def run(
    config: TrainConfig,
    topology: str | None,
    chip: str | None,
    devices: int | None,
    meshes: Sequence[str],
    json_file: str | None,
) -> None:
    """Makes the plan, prints it, and writes it where asked."""
    from rich.console import Console

    from gptoss_jax.planning import table

    path = None if json_file is None else output_file(json_file, "json")
    errors = Console(stderr=True)
    with errors.status("Estimating") as status:
        plan = make_plan(
            config, topology, chip, devices, meshes,
            lambda mesh: status.update(f"Compiling {table.mesh_name(mesh)} for {topology}: minutes"),
        )  # fmt: skip
    table.show(plan, Console())
    if path is not None:
        write_json(path, plan.to_dict())
