"""Compiles the real train step with the real TPU compiler (libtpu), on a machine without a TPU.

libtpu prints to stderr and needs a separate process, so it runs in a child process,
`python -m gptoss_jax.planning.compile_tpu`, which is this file.
"""

import dataclasses
import importlib.machinery
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from gptoss_jax.config import MeshConfig, TrainConfig
from gptoss_jax.hardware import GIB, parse_topology
from gptoss_jax.interrupts import cleanup

INSTALL = "pip install -e '.[tpu-compile]'"


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """The compiler's report on a step, in bytes per device."""

    mesh: dict[str, int]
    fits: bool
    seconds: float
    # The compiler's message if it ran out of memory, and the bytes in the message.
    refusal: str = ""
    available: float | None = None
    needed: float | None = None
    arguments: int = 0
    outputs: int = 0
    temporaries: int = 0
    # Outputs that reuse the memory of arguments.
    aliased: int = 0
    code: int = 0
    # Peak memory in use; less than `total`, which has gaps.
    peak: int = 0
    # By kind, axes and network: kind, axes, across_slices (True on the data-center network), executions per
    # step, bytes sent per device, trips_known (False in loops with a data-dependent trip count, which are
    # counted once). None if this jaxlib cannot parse the HLO of this libtpu.
    collectives: list[dict] | None = None

    @property
    def total(self) -> int:
        """Bytes that the program reserves: arguments, new outputs, temporaries and code."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


def has_tpu_compiler() -> bool:
    """Returns True if libtpu is installed, even if `startup.hide_tpu_compiler` has hidden it."""
    return importlib.machinery.PathFinder.find_spec("libtpu") is not None


def compile_step(config: TrainConfig, topology: str, mesh: Mapping[str, int]) -> CompiledStep:
    """Compiles a step of `config` for a slice such as "v5p:4x4x4", or for as many of them as the config's
    mesh has, in a separate process; takes minutes.

    A step that does not fit in memory is a result, not an error. Raises ValueError if libtpu is not installed
    or does not support the topology, and OSError if the compiler fails.
    """
    if not has_tpu_compiler():
        raise ValueError(
            f"topology is {topology!r}: compiling for a TPU needs libtpu; run {INSTALL}, or give --chip and "
            "--devices for an estimate without compiling"
        )
    parse_topology(topology)
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **mesh))
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        # Otherwise, parallel compilations wait for each other's lock.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        # Makes the error the last line of a traceback, instead of a note on hidden frames.
        "JAX_TRACEBACK_FILTERING": "off",
    }
    with cleanup(), tempfile.TemporaryDirectory() as folder:
        result = os.path.join(folder, "result.json")
        child = subprocess.run(
            [sys.executable, "-m", "gptoss_jax.planning.compile_tpu", topology, result],
            input=json.dumps(config.to_dict()),
            encoding="utf-8",
            errors="replace",
            capture_output=True,
            env=environment,
        )
        if child.returncode < 0:
            raise OSError(f"the compiler of {topology} was ended by {signal.Signals(-child.returncode).name}")
        if child.returncode or not os.path.exists(result):
            lines = [line for line in child.stderr.splitlines() if line.strip()] or ["no message"]
            raise OSError(f"the compiler of {topology} ended with {child.returncode}: {lines[-1]}")
        with open(result, encoding="utf-8") as file:
            values = json.load(file)
    if "error" in values:
        raise ValueError(f"topology is {topology!r}: {values['error']}")
    return CompiledStep(mesh=dict(mesh), **values)


def read_refusal(message: str) -> dict:
    """Returns the fields of `CompiledStep` in the compiler's "Ran out of memory" message."""
    line = message.strip().splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ")
    found = re.search(r"\(([\d.]+)G\) exceeds available \w+ \(([\d.]+)G\)", line)
    found = found or re.search(r"[Uu]sed ([\d.]+)G of ([\d.]+)G", message)
    needed, available = (float(size) * GIB for size in found.groups()) if found else (None, None)
    return {"fits": False, "refusal": line, "needed": needed, "available": available}


def _compile(config: TrainConfig, topology: str) -> dict:
    """Returns the fields of `CompiledStep` as JSON values, or only an error if the topology is unknown."""
    import jax
    from jax.experimental import topologies

    from gptoss_jax.checkpoints.load import load_target
    from gptoss_jax.data.batches import ADVANTAGES, REFERENCE_FIELD, SAMPLED_LOG_PROBS, abstract_batch
    from gptoss_jax.model.lora import is_adapter
    from gptoss_jax.model.transformer import compute_dtype
    from gptoss_jax.parallel.mesh import make_mesh
    from gptoss_jax.parallel.rules import batch_sharding
    from gptoss_jax.training.base_weights import base_config
    from gptoss_jax.training.rl import make_objective
    from gptoss_jax.training.state import abstract_state
    from gptoss_jax.training.step import make_train_step

    # By default, libtpu supports only slices of whole hosts with four chips each.
    is_one_chip = {*topology.partition(":")[2].split("x")} == {"1"}
    options: dict[str, Any] = {"chips_per_host_bounds": (1, 1, 1)} if is_one_chip else {}
    if config.mesh.slices > 1:
        options["num_slices"] = config.mesh.slices
    try:
        devices = topologies.get_topology_desc(topology, "tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        return {"error": str(error).splitlines()[0]}
    mesh = make_mesh(config.mesh, devices)
    is_compared = config.objective == "dpo" and config.dpo.needs_reference and config.model.lora is None
    compared = [REFERENCE_FIELD] if is_compared else []
    fields = [SAMPLED_LOG_PROBS, ADVANTAGES] if config.objective == "grpo" else compared
    size, length = config.data.batch_size, config.data.seq_len
    batch = abstract_batch(size, length, batch_sharding(mesh), fields)
    began = time.monotonic()
    with jax.set_mesh(mesh):
        frozen, is_trainable = {}, None
        if config.model.lora is not None:
            # Published weights: in bfloat16 where the model computes in it.
            dtype, is_trainable = compute_dtype(config.model).name, is_adapter
            frozen = load_target(base_config(config.model), mesh, dtype)
        state = abstract_state(config, mesh, is_trainable)
        lowered = make_train_step(config, make_objective(config)).lower(state, batch, frozen)
        try:
            program = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return {"seconds": time.monotonic() - began, **read_refusal(str(error))}
    memory: Any = program.memory_analysis()
    try:
        collectives = _sum_collectives(program.as_text() or "", mesh.shape, config.mesh)
    except jax.errors.JaxRuntimeError:
        collectives = None  # a libtpu newer than jaxlib may emit instructions that jaxlib cannot parse
    return {
        "fits": True,
        "seconds": time.monotonic() - began,
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
        "collectives": collectives,
    }


def _sum_collectives(hlo_text: str, mesh: Mapping[str, int], config: MeshConfig) -> list[dict]:
    """Returns executions and bytes sent per step by kind, mesh axes and network, sorted by bytes,
    descending."""
    from gptoss_jax.planning.hlo import collectives

    # The program of one slice: only transfers to other slices leave it.
    outer = {"data": config.dcn_data, "fsdp": config.dcn_fsdp}
    inside = {axis: size // outer.get(axis, 1) for axis, size in mesh.items()}
    joined = tuple(axis for axis, slices in outer.items() if slices > 1)
    sums: dict[tuple, dict] = {}
    for one in collectives(hlo_text):
        axes = joined if one.across_slices else one.axes(inside)
        key = {"kind": one.kind, "axes": axes, "trips_known": one.trips_known}
        key["across_slices"] = one.across_slices
        entry = sums.setdefault(tuple(key.values()), {**key, "times": 0, "sent": 0.0})
        entry["times"] += one.times
        entry["sent"] += one.times * one.sent
    return sorted(sums.values(), key=lambda entry: -entry["sent"])


if __name__ == "__main__":
    _topology, _result = sys.argv[1:]
    _values = _compile(TrainConfig.from_dict(json.load(sys.stdin)), _topology)
    with open(_result, "w", encoding="utf-8") as _file:
        json.dump(_values, _file)
