"""`gptoss plan`."""

import dataclasses
from typing import Annotated

import tyro

from gptoss_jax.cli.arguments import JsonFile, OptionalInt, OptionalText, Texts


@dataclasses.dataclass(frozen=True)
class Plan:
    """Estimate memory, FLOPs and communication of a training step on devices that need not be present.

    Exits with 1 if no mesh fits.
    """

    # Preset, such as configs/gpt_oss_20b.py.
    config: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]
    # TPU slice, such as v5p:4x4x4. The step is also compiled for it, which takes minutes.
    topology: OptionalText = None
    # v5e, v5p, v6e, tpu7x, a100, h100, h200 or b200, with --devices: estimates without compiling.
    chip: OptionalText = None
    # Number of JAX devices. A tpu7x chip has two.
    devices: OptionalInt = None
    # Mesh, such as fsdp=16,expert=4. Default: all possible meshes, best first.
    mesh: Texts = ()
    # Also write the results to this file.
    json_file: JsonFile = None
    # Override a field of the config; `--model.remat block` is short for `--set model.remat=block`.
    overrides: Annotated[
        tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(name="set", metavar="FLAG=VALUE")
    ] = ()

    def run(self) -> None:
        from rich.console import Console

        from gptoss_jax.config.base import write_json
        from gptoss_jax.config.paths import output_file
        from gptoss_jax.config.preset import flags_of, read_preset

        config = read_preset(self.config, flags_of(self.overrides), prog="gptoss plan CONFIG")
        meshes = self.mesh
        if not meshes and any(override.startswith("mesh.") for override in self.overrides):
            meshes = (",".join(f"{axis}={size}" for axis, size in dataclasses.asdict(config.mesh).items()),)

        from gptoss_jax.planning.plan import make_plan, mesh_name
        from gptoss_jax.planning.report import show

        path = None if self.json_file is None else output_file(self.json_file, "json")
        with Console(stderr=True).status("Estimating") as status:
            plan = make_plan(
                config,
                topology=self.topology,
                chip=self.chip,
                devices=self.devices,
                meshes=meshes,
                on_compile=lambda mesh: status.update(f"Compiling {mesh_name(mesh)}: minutes"),
            )
        show(plan, Console())
        if path is not None:
            write_json(path, plan.to_dict())
        if not plan.fits:
            raise SystemExit(1)
