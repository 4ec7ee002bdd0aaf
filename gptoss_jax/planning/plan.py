"""Plans a training step: estimates for all meshes of a number of devices, and compiled steps."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gptoss_jax.config import TrainConfig, require
from gptoss_jax.hardware import CPU, Chip, find_chip, parameter_counts, parse_topology, resolve_topology
from gptoss_jax.model.lora import adapter_counts
from gptoss_jax.parallel.mesh import AXES, divisors, parse_mesh
from gptoss_jax.planning.compile_tpu import CompiledStep, compile_step
from gptoss_jax.planning.estimate import Estimate, estimate
from gptoss_jax.planning.suggest import Suggestion, suggest_larger_microbatch, suggest_smaller

# Maximum number of meshes that are compiled, unless meshes are given.
MAX_COMPILED = 4


@dataclasses.dataclass(frozen=True)
class Plan:
    """Memory, FLOPs and collectives of a training step on a number of devices."""

    config: TrainConfig
    chip: Chip
    devices: int
    topology: str | None
    # Best first.
    estimates: list[Estimate]
    # One per compiled mesh.
    compiled: list[CompiledStep]
    # The accelerator type that was given as topology, such as "v5p-32".
    accelerator_type: str | None = None
    # A change that makes the step fit, or makes it faster.
    suggestion: Suggestion | None = None

    @property
    def trained_parameters(self) -> int:
        """Number of trained parameters: those of the adapters, if any, otherwise all."""
        model = self.config.model
        return parameter_counts(model)[0] if model.lora is None else sum(adapter_counts(model).values())

    @property
    def best(self) -> Estimate | None:
        """The best mesh that fits, according to the compiler if it ran; None if none does."""
        fitting = [one.mesh for one in self.compiled or self.estimates if one.fits]
        return next((one for one in self.estimates if one.mesh in fitting), None)

    @property
    def fits(self) -> bool:
        """True if any mesh fits, according to the compiler if it ran."""
        return self.best is not None

    def to_dict(self) -> dict[str, Any]:
        """Returns all results as JSON-serializable values; bytes, seconds and FLOPs are per device."""
        total, active = parameter_counts(self.config.model)
        estimates = []
        for one in self.estimates:
            extra: dict[str, Any] = {"fits": one.fits, "verdict": one.verdict}
            extra["communication_seconds"] = one.communication_seconds
            if not self.chip.has_times:
                extra |= {"compute_seconds": None, "communication_seconds": None, "collectives": None}
            extra["memory"] = {**dataclasses.asdict(one.memory), "total": one.memory.total}
            estimates.append(dataclasses.asdict(one) | extra)
        return {
            "config": self.config.to_dict(),
            "parameters": total,
            "active_parameters": active,
            "trained_parameters": self.trained_parameters,
            "chip": chip_dict(self.chip),
            "devices": self.devices,
            "topology": self.topology,
            "fits": self.fits,
            "best": None if self.best is None else self.best.mesh,
            "suggestion": None if self.suggestion is None else self.suggestion.flag,
            "estimates": estimates,
            "compiled": [dataclasses.asdict(one) | {"total": one.total} for one in self.compiled],
        }


def make_plan(
    config: TrainConfig,
    *,
    topology: str | None = None,
    chip: str | None = None,
    devices: int | None = None,
    memory: float | None = None,
    meshes: Sequence[str] = (),
    on_compile: Callable[[dict[str, int]], None] = lambda mesh: None,
    has_suggestion: bool = True,
) -> Plan:
    """Estimates the given meshes, or all possible ones; with a topology, also compiles the given meshes, or
    up to `MAX_COMPILED`, best first, until one fits.

    Args:
      topology: a TPU slice such as "v5p:4x4x4", or a Cloud TPU accelerator type such as "v5p-128"; with
        `config.mesh.dcn_data` or `dcn_fsdp`, several of them. Instead, `chip` (a name in
        `hardware.CHIPS`, or "cpu") and `devices` (as JAX counts them) plan without compiling.
      memory: bytes of a device, instead of those of the chip; required if the chip is not known. Such a plan
        has no times.
      meshes: such as "fsdp=16,expert=4".
      on_compile: called with each mesh before it is compiled, which takes minutes.
      has_suggestion: look for a batch that fits, or is faster.

    Raises:
      ValueError: an argument is invalid, a given mesh cannot shard the model or batch, or no mesh can.
      OSError: the compiler fails.
    """
    accelerator_type = None
    if topology is not None:
        is_given = (chip, devices, memory) != (None, None, None)
        require(not is_given, "topology", topology, "already gives chip, devices and memory")
        accelerator_type, topology = topology, resolve_topology(topology)
        kind, count = parse_topology(topology)
        count *= config.mesh.slices
    else:
        kind, count = _given_devices(chip, devices, memory)

    def estimates_of(config: TrainConfig) -> list[Estimate]:
        if meshes:
            return rank([estimate(config, kind, parse_mesh(mesh, count)) for mesh in meshes])
        return rank(_estimate_all(config, kind, count))

    estimates = estimates_of(config)
    compiled: list[CompiledStep] = []
    if topology is not None:
        possible = [one for one in estimates if one.memory.total <= one.capacity]
        for one in estimates if meshes else possible[:MAX_COMPILED]:
            on_compile(one.mesh)
            compiled.append(compile_step(config, topology, one.mesh))
            if compiled[-1].fits and not meshes:
                break
    given = None if accelerator_type == topology else accelerator_type
    plan = Plan(config, kind, count, topology, estimates, compiled, given)
    if not has_suggestion:
        return plan
    if plan.best is None:
        suggestion = suggest_smaller(config, estimates_of)
    else:
        suggestion = suggest_larger_microbatch(config, count, plan.best, estimates_of)
    return dataclasses.replace(plan, suggestion=suggestion)


def _given_devices(chip: str | None, devices: int | None, memory: float | None) -> tuple[Chip, int]:
    """Returns the chip and the number of devices. Raises ValueError if one is missing or invalid."""
    if chip is None and devices is None:
        raise ValueError(
            "topology is None: give one, such as --topology v5p:4x4x4, or --chip h200 --devices 64"
        )
    if chip is None:
        raise ValueError(f"chip is None: --devices {devices} also needs --chip, such as --chip h200")
    if chip.lower() == CPU:
        require(devices in (None, 1), "devices", devices, "must be 1 with --chip cpu")
        return find_chip(CPU, memory=memory), 1
    if devices is None:
        raise ValueError(f"devices is None: --chip {chip} also needs --devices, such as --devices 8")
    require(devices > 0, "devices", devices, "must be above 0")
    return find_chip(chip, memory=memory), devices


def rank(estimates: Sequence[Estimate]) -> list[Estimate]:
    """Sorts estimates, best first: those that fit, then those that are close, by their duration without
    overlap, then the rest by memory."""
    order = {"fits": 0, "close": 1, "no": 2}

    def key(one: Estimate) -> tuple[float, ...]:
        seconds = 0.0 if one.verdict == "no" else one.serial_seconds
        return order[one.verdict], seconds, one.memory.total

    return sorted(estimates, key=key)


def chip_dict(chip: Chip) -> dict[str, Any]:
    """Returns a chip as JSON-serializable values; None for what is not known."""
    return {name: None if value == math.inf else value for name, value in dataclasses.asdict(chip).items()}


def mesh_name(mesh: dict[str, int], separator: str = ",") -> str:
    """Formats a mesh for `--mesh`, such as "fsdp=16,expert=4"; axes of size 1 are omitted."""
    return separator.join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "data=1"


def all_meshes(devices: int, context: Sequence[int] = (1,)) -> Iterator[dict[str, int]]:
    """Yields all mesh shapes for the devices, with these sizes of the context axis."""
    sizes = divisors(devices, devices)
    for fsdp, n, expert, tensor in itertools.product(sizes, context, sizes, sizes):
        data, rest = divmod(devices, fsdp * n * expert * tensor)
        if rest == 0:
            yield dict(zip(AXES, (data, fsdp, n, expert, tensor), strict=True))


def _estimate_all(config: TrainConfig, chip: Chip, devices: int) -> list[Estimate]:
    """Returns the estimates of all meshes that can shard model and batch. Raises ValueError if none can."""
    found, refusal = [], None
    # If there is a sequence for each device, FSDP does the same as the context axis and sends less.
    is_needed = config.data.batch_size // config.optim.grad_accum_steps < devices
    for mesh in all_meshes(devices, divisors(devices, devices) if is_needed else (1,)):
        try:
            found.append(estimate(config, chip, mesh))
        except ValueError as error:
            refusal = error
    if not found:
        reason = f"no mesh of {devices} devices can split this model and batch"
        raise ValueError(f"{reason}; the last one tried: {refusal}")
    return found
