"""The real train step through the real TPU compiler (libtpu), for devices that need not be here.

The compiler writes to stderr what only its makers can read, and takes a whole process for itself: it runs in
a child, `python -m gptoss_jax.planning.compiled`, which is this file.
"""

import dataclasses
import importlib.machinery
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping

from gptoss_jax.config import MeshConfig, TrainConfig
from gptoss_jax.hardware import GIB, parse_topology

INSTALL = "pip install -e '.[tpu-compile]'"


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of one step; bytes of one device."""

    mesh: dict[str, int]
    fits: bool
    seconds: float
    # The compiler's own words, where it ran out of memory; and what it had and asked for, as far as it says.
    refusal: str = ""
    available: float | None = None
    needed: float | None = None
    arguments: int = 0
    outputs: int = 0
    temporaries: int = 0
    # Outputs that lie where arguments lay.
    aliased: int = 0
    code: int = 0
    # The most that is alive at once, as the compiler counts it; below the sum of these, which has gaps.
    peak: int = 0
    # One for each kind and axes: kind, axes, executions in a step, bytes a device sends, trips_known; those
    # in loops that run as often as the data asks, each counted once, stand apart (trips_known is False).
    # None where this jaxlib cannot read what this libtpu wrote.
    collectives: list[dict] | None = None

    @property
    def total(self) -> int:
        """Memory the program claims: arguments, new outputs, temporaries and code."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


def has_tpu_compiler() -> bool:
    """Returns True if libtpu is installed, even if `startup.hide_tpu_compiler` has hidden it."""
    return importlib.machinery.PathFinder.find_spec("libtpu") is not None


def compile_step(config: TrainConfig, topology: str, mesh: Mapping[str, int]) -> Compiled:
    """Compiles a step of `config` for a slice such as "v5p:4x4x4", in a process of its own.

    A step that is too large for the memory is a result; that takes the compiler as long as any other. Raises
    ValueError where libtpu is not installed or does not know the topology, and OSError where it fails.
    """
    if not has_tpu_compiler():
        raise ValueError(
            f"topology is {topology!r}: compiling for a TPU needs libtpu; run {INSTALL}, or give --chip and "
            "--devices for an estimate without compiling"
        )
    parse_topology(topology)
    config = dataclasses.replace(config, mesh=MeshConfig(**mesh))
    # Programs that compile side by side would wait for each other's lock.
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        # The last line of an error is then what went wrong, not a word on what is not shown.
        "JAX_TRACEBACK_FILTERING": "off",
    }
    with tempfile.TemporaryDirectory() as folder:
        result = os.path.join(folder, "result.json")
        child = subprocess.run(
            [sys.executable, "-m", "gptoss_jax.planning.compiled", topology, result],
            input=json.dumps(config.to_dict()),
            encoding="utf-8",
            errors="replace",
            capture_output=True,
            env=environment,
        )
        if child.returncode or not os.path.exists(result):
            lines = [line for line in child.stderr.splitlines() if line.strip()]
            last = lines[-1] if lines else "no word"
            raise OSError(f"the compiler of {topology} ended with {child.returncode}: {last}")
        with open(result, encoding="utf-8") as file:
            values = json.load(file)
    if "error" in values:
        raise ValueError(f"topology is {topology!r}: {values['error']}")
    return Compiled(mesh=dict(mesh), **values)


def read_refusal(message: str) -> dict:
    """The figures in the compiler's "Ran out of memory" message, as fields of `Compiled`."""
    line = message.strip().splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ")
    found = re.search(r"\(([\d.]+)G\) exceeds available \w+ \(([\d.]+)G\)", line) or re.search(
        r"[Uu]sed ([\d.]+)G of ([\d.]+)G", message
    )
    needed, available = (float(size) * GIB for size in found.groups()) if found else (None, None)
    return {"fits": False, "refusal": line, "needed": needed, "available": available}


def _compile(config: TrainConfig, topology: str) -> dict:
    import jax
    from jax.experimental import topologies

    from gptoss_jax.data.batches import abstract_batch
    from gptoss_jax.parallel.mesh import make_mesh
    from gptoss_jax.parallel.rules import batch_sharding
    from gptoss_jax.planning.hlo import collectives
    from gptoss_jax.training.state import abstract_state
    from gptoss_jax.training.step import make_train_step

    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except jax.errors.JaxRuntimeError as error:
        return {"error": str(error).splitlines()[0]}
    mesh = make_mesh(config.mesh, devices)
    batch = abstract_batch(config.data.batch_size, config.data.seq_len, batch_sharding(mesh))
    began = time.monotonic()
    with jax.set_mesh(mesh):
        lowered = make_train_step(config).lower(abstract_state(config, mesh), batch)
        try:
            program = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return {"seconds": time.monotonic() - began, **read_refusal(str(error))}
    memory = program.memory_analysis()
    values = {
        "fits": True,
        "seconds": time.monotonic() - began,
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
    }
    try:
        text = program.as_text()
    except jax.errors.JaxRuntimeError:
        # A libtpu that is newer than jaxlib writes instructions which that does not know.
        return values
    sums: dict[tuple, dict] = {}
    for one in collectives(text):
        axes = one.axes(mesh.shape)
        entry = {"kind": one.kind, "axes": axes, "times": 0, "sent": 0.0, "trips_known": one.trips_known}
        entry = sums.setdefault((one.kind, axes, one.trips_known), entry)
        entry["times"] += one.times
        entry["sent"] += one.times * one.sent
    return values | {"collectives": sorted(sums.values(), key=lambda entry: -entry["sent"])}


def main() -> None:
    topology, result = sys.argv[1:]
    values = _compile(TrainConfig.from_dict(json.load(sys.stdin)), topology)
    with open(result, "w", encoding="utf-8") as file:
        json.dump(values, file)


if __name__ == "__main__":
    main()
