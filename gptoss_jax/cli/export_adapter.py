"""`gptoss export-adapter`."""

import dataclasses
from typing import Annotated

import tyro

from gptoss_jax.cli.convert import UNWRITTEN
from gptoss_jax.interrupts import explain
from gptoss_jax.status import status


@dataclasses.dataclass(frozen=True)
class ExportAdapter:
    """Write a run's LoRA adapter as a PEFT folder for transformers and vLLM.

    Examples:
      gptoss export-adapter runs/lora adapter
      gptoss export-adapter runs/quickstart-lora ~/adapters/quickstart
    """

    # Run that trained adapters (model.lora).
    run_dir: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    # Folder to create. It appears only when it is complete.
    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]

    def run(self) -> None:
        import pathlib

        with explain(UNWRITTEN), status(f"exporting {self.run_dir}"):
            from gptoss_jax.checkpoints.adapters import export_adapter
            from gptoss_jax.checkpoints.run_params import is_run
            from gptoss_jax.checkpoints.safetensors_io import ADAPTER_CONFIG
            from gptoss_jax.config.base import read_json
            from gptoss_jax.config.model import EXPERT_TARGETS

            lora = export_adapter(self.run_dir, self.target).lora
        size = sum(path.stat().st_size for path in pathlib.Path(self.target).iterdir())
        each = f" ({lora.expert_rank} in each expert)" if {*lora.targets} & {*EXPERT_TARGETS} else ""
        targets = ", ".join(lora.targets)
        print(f"{self.target}: adapter of rank {lora.rank}{each} on {targets}, {size / 1e6:,.2f} MB")
        base = read_json(pathlib.Path(self.target) / ADAPTER_CONFIG)["base_model_name_or_path"]
        if is_run(base):
            print(
                "The base model is a run, which PEFT and vLLM cannot load; convert it: "
                f"gptoss convert {base} OUT"
            )
