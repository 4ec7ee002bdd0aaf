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
            with WriteProgress(self.target) as progress:
                survival = merge(self.source, self.target, self.adapter, self.experts, progress.show)
        print("\n".join(describe(survival)))


def describe(survival: "dict[str, Survival]") -> list[str]:
    """Returns a table of what survived for each target, and advice where it is little."""
    lines = [f"{'':<9}{'change':>9}{'written':>9}{'noise':>9}   (change and noise relative to the weights)"]
    for target, found in survival.items():
        lines.append(f"{target:<9}{found.size:>9.3%}{found.share:>9.1%}{found.noise:>9.3%}")
    rounded = {target: found for target, found in survival.items() if found.base_noise}
    if rounded:
        each = ", ".join(f"{found.base_noise:.3%} in {target}" for target, found in rounded.items())
        lines.append(f"The base was not in MXFP4. Its own rounding is not part of the noise: {each}")
    lost = [
        target for target, found in survival.items() if found.share < LITTLE or found.base_noise > found.size
    ]
    if lost:
        lines.append(
            f"Rounding outweighs or removes the adapter in {' and '.join(lost)}. Write a wider type "
            "(--experts bfloat16, or float32), or serve the base model with the adapter beside it (gptoss "
            "export-adapter). Training with quantization (QAT) would help, but is not part of this project"
        )
    return lines
