"""`gptoss plan`."""

import dataclasses
import shlex
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from gptoss_jax.cli.arguments import JsonFile, OptionalFloat, OptionalInt, OptionalText, Texts
from gptoss_jax.status import status

if TYPE_CHECKING:
    from gptoss_jax.config import MeshConfig, ModelConfig
    from gptoss_jax.planning.inference import InferencePlan


@dataclasses.dataclass(frozen=True)
class Plan:
    """Estimate what training or inference needs on devices you don't have.

    Compares meshes by memory, FLOPs and communication. --topology also compiles the step with the real TPU
    compiler, best mesh first until one fits, which takes minutes for each and needs the extra "tpu-compile";
    --chip estimates from shapes. Flags of gptoss train with a dot, such as --data.seq-len 4096, change the
    config. With --inference, estimates the memory of generating, chatting and serving instead. Exits with
    status 1 if no mesh fits; with --topology, only compiled meshes count.

    Examples:
      gptoss plan gpt_oss_20b --chip h200 --devices 8
      gptoss plan gpt_oss_120b --topology v5p:4x4x4
      gptoss plan gpt_oss_20b --chip v5p --devices 16 --mesh fsdp=4,expert=4
      gptoss plan gpt_oss_20b --inference --chip h100 --slots 8 --context 32768
      gptoss plan quickstart --chip cpu
    """

    # Preset: its name, such as gpt_oss_20b, or a Python file.
    config: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]
    # TPU slice to compile for, such as v5p:4x4x4, or a Cloud TPU accelerator type, such as v5p-128.
    topology: OptionalText = None
    # Chip to estimate for, with --devices: v5e, v5p, v6e, tpu7x, a100, h100, h200 or b200; or cpu, for a
    # process on this machine.
    chip: OptionalText = None
    # JAX devices: chips, except that a tpu7x chip counts as two. A v5p-32 has 16.
    devices: OptionalInt = None
    # Memory of a device in GB (1e9 bytes), for a chip that is not listed: such a plan has no times.
    memory: OptionalFloat = None
    # Mesh to consider, such as fsdp=16,expert=4. (default: all possible meshes, best first)
    mesh: Texts = ()
    # Estimate inference instead of a training step, from shapes.
    inference: tyro.conf.FlagCreatePairsOff[bool] = False
    # With --inference: sequences that decode together. (default: 1)
    slots: OptionalInt = None
    # With --inference: most tokens of a prompt with its answer. (default: the model's limit)
    context: OptionalInt = None
    # With --inference: format of the experts. (default: mxfp4, as published)
    experts: Annotated[Literal["mxfp4", "bfloat16"] | None, tyro.conf.arg(help_behavior_hint="")] = None
    # Also write the results to this JSON file.
    json_file: JsonFile = None
    # Override a field of the config. `--model.remat block` is short for `--set model.remat=block`.
    overrides: Annotated[
        tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(name="set", metavar="FLAG=VALUE")
    ] = ()

    def run(self) -> None:
        from rich.console import Console

        from gptoss_jax.config import require
        from gptoss_jax.config.base import write_json
        from gptoss_jax.config.paths import output_file
        from gptoss_jax.config.preset import flags_of, read_preset

        config = read_preset(self.config, flags_of(self.overrides), prog="gptoss plan CONFIG")
        meshes = self.mesh
        is_mesh = (one.startswith("mesh.") and not one.startswith("mesh.dcn") for one in self.overrides)
        if not meshes and any(is_mesh):
            meshes = (",".join(f"{axis}={size}" for axis, size in config.mesh.sizes.items()),)

        with status("starting"):
            from gptoss_jax.planning.plan import make_plan, mesh_name
            from gptoss_jax.planning.report import show, show_inference

        path = None if self.json_file is None else output_file(self.json_file, "json")
        if self.inference:
            inference = self._plan_inference(config.model, meshes)
            show_inference(inference, Console())
            if path is not None:
                write_json(path, inference.to_dict())
            if inference.fits is False:
                raise SystemExit(1)
            return
        for name in ("slots", "context", "experts"):
            require(getattr(self, name) is None, name, getattr(self, name), "only applies with --inference")
        with status("estimating") as shown:
            plan = make_plan(
                config,
                topology=self.topology,
                chip=self.chip,
                devices=self.devices,
                memory=self._memory_bytes,
                meshes=meshes,
                on_compile=lambda mesh: shown.update(f"compiling {mesh_name(mesh)}, which takes minutes"),
            )
        show(plan, Console())
        if plan.best is not None:
            print("\nTo train, with your own --data.source and --run-dir, and perhaps --init-from:")
            print(self._command(plan.best.mesh, config.mesh))
        if path is not None:
            write_json(path, plan.to_dict())
        if not plan.fits:
            raise SystemExit(1)

    @property
    def _memory_bytes(self) -> float | None:
        return None if self.memory is None else 1e9 * self.memory

    def _command(self, mesh: dict[str, int], given: "MeshConfig") -> str:
        """Returns the command that trains on a mesh, with the given flags."""
        from gptoss_jax.config.preset import flags_of, read_preset

        overrides = [one for one in self.overrides if not one.startswith("mesh.")]
        preset = read_preset(self.config, flags_of(overrides)).mesh.sizes
        words = ["gptoss", "train", self.config]
        for axis, size in mesh.items():
            if size > 1 or preset[axis] not in (1, -1):
                words += [f"--mesh.{axis}", str(size)]
        for axis, slices in (("data", given.dcn_data), ("fsdp", given.dcn_fsdp)):
            words += [f"--mesh.dcn-{axis}", str(slices)] if slices > 1 else []
        return shlex.join([*words, *flags_of(overrides)])

    def _plan_inference(self, model: "ModelConfig", meshes: tuple[str, ...]) -> "InferencePlan":
        from gptoss_jax.config import require
        from gptoss_jax.planning.inference import Workload, plan_inference

        require(
            self.topology is None, "topology", self.topology, "give --chip and --devices with --inference"
        )
        if self.chip is None:
            raise ValueError("chip is None: give one with --inference, such as --chip h100")
        return plan_inference(
            model,
            chip=self.chip,
            devices=1 if self.devices is None else self.devices,
            memory=self._memory_bytes,
            workload=Workload(1 if self.slots is None else self.slots, self.context),
            experts=self.experts or "mxfp4",
            meshes=meshes,
        )
