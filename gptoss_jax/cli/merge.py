"""`gptoss merge`."""

import dataclasses
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from gptoss_jax.cli.arguments import OptionalText
from gptoss_jax.cli.convert import UNWRITTEN, WriteProgress
from gptoss_jax.interrupts import explain
from gptoss_jax.status import status

if TYPE_CHECKING:
    from gptoss_jax.checkpoints.merge import Survival

# Below this share of the delta, the merged model is closer to its base than to the trained one.
LITTLE = 0.5


@dataclasses.dataclass(frozen=True)
class Merge:
    """Merge a LoRA adapter into its model and write a Hugging Face folder.

    Prints how much of the adapter's change survives rounding to the output type, for each kind of weight.

    Examples:
      gptoss merge runs/lora merged --experts bfloat16
      gptoss merge hf:openai/gpt-oss-20b merged --adapter my-peft-adapter
    """

    # Run that trained adapters, or the base model for --adapter.
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    # Folder to create. It appears only when it is complete.
    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    # LoRA adapter to merge: a PEFT folder, or a run that trained adapters. (default: the adapter of the run
    # SRC)
    adapter: OptionalText = None
    # Type of the weights. mxfp4 packs the experts in MXFP4 and writes the rest in bfloat16. (default: as in
    # the base model)
    experts: Annotated[
        Literal["bfloat16", "float32", "mxfp4"] | None, tyro.conf.arg(help_behavior_hint="")
    ] = None

    def run(self) -> None:
        with explain(UNWRITTEN):
            with status(f"opening {self.source}"):
                from gptoss_jax.checkpoints.merge import merge
                from gptoss_jax.checkpoints.readers import local_folder
                from gptoss_jax.checkpoints.run_params import is_run
                from gptoss_jax.config import TrainConfig
                from gptoss_jax.config.base import read_json
                from gptoss_jax.config.paths import user_path
            with WriteProgress(self.target) as progress:
                survival = merge(self.source, self.target, self.adapter, self.experts, progress.show)
        config = read_json(user_path(self.target, "DST") / "config.json")
        written = "mxfp4" if "quantization_config" in config else config.get("dtype", "bfloat16")
        run = local_folder(self.adapter or self.source)
        is_trained = is_run(run) and TrainConfig.load(run / "config.json").model.expert_fake_quant
        print("\n".join(describe(survival, written, is_trained and written == "mxfp4")))


def describe(survival: "dict[str, Survival]", written: str, is_trained: bool = False) -> list[str]:
    """Returns a table of what survived for each target, and advice where it is little.

    Args:
      written: the type of the experts in the merged folder: mxfp4, bfloat16 or float32.
      is_trained: whether the adapter was trained with the weights as they are written
        (`model.expert_fake_quant`).
    """
    lines = [f"{'':<9}{'change':>9}{'written':>9}{'noise':>9}   (change and noise relative to the weights)"]
    for target, found in survival.items():
        lines.append(f"{target:<9}{found.size:>9.3%}{found.share:>9.1%}{found.noise:>9.3%}")
    rounded = {target: found for target, found in survival.items() if found.base_noise}
    if rounded:
        each = ", ".join(f"{found.base_noise:.3%} in {target}" for target, found in rounded.items())
        lines.append(f"The base was not in MXFP4. Its own rounding is not part of the noise: {each}")
    if is_trained:
        return [*lines, "The run computed with the weights as they are written (model.expert_fake_quant)"]
    wider = {"mxfp4": "merge with --experts bfloat16, or ", "bfloat16": "merge with --experts float32, or "}
    advice = f"{wider.get(written, '')}serve the base model with the adapter (gptoss export-adapter)"
    lost = [target for target, found in survival.items() if found.share < LITTLE]
    if lost:
        change = f"Most of the adapter's change in {', '.join(lost)} was lost to rounding"
        lines.append(f"{change} to {written}; {advice}")
    outweighed = [
        f"{found.base_noise:.3%} against {found.size:.3%} in {target}"
        for target, found in rounded.items()
        if target not in lost and found.base_noise > found.size
    ]
    if outweighed:
        change = f"Quantizing the base changed its weights more than the adapter: {', '.join(outweighed)}"
        lines.append(f"{change}; {advice}")
    return lines
