"""Command-line arguments that several commands share. Imports no jax: `--help` should be fast."""

import dataclasses
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    from gptoss_jax.inference.sampling_params import SamplingParams

Folder = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
# Optional arguments: help says what None stands for, so "(default: None)" is left out.
OptionalInt = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]
OptionalFloat = Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="")]
OptionalText = Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")]
# A field named `json` would shadow the module.
JsonFile = Annotated[str | None, tyro.conf.arg(name="json", metavar="FILE", help_behavior_hint="")]
Texts = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="TEXT")]


@dataclasses.dataclass(frozen=True)
class SamplingFlags:
    # Maximum number of new tokens. Default: 200, or 4096 in a Harmony chat.
    max_new_tokens: OptionalInt = None
    # Sampling temperature; 0 always takes the most likely token. Default: 0.8, or 1 in a Harmony chat.
    temperature: OptionalFloat = None
    # Sample from this many of the most likely tokens.
    top_k: OptionalInt = None
    # Sample from the smallest set of most likely tokens whose probabilities add up to this.
    top_p: OptionalFloat = None
    # Sample from the tokens at least this many times as likely as the most likely one.
    min_p: OptionalFloat = None
    # Lowers the logit of each token that the answer already has, -2 to 2. Default: 0.
    presence_penalty: OptionalFloat = None
    # The same for each occurrence, -2 to 2. Default: 0.
    frequency_penalty: OptionalFloat = None
    # Random seed.
    seed: int = 0

    def update(self, params: "SamplingParams") -> "SamplingParams":
        """Returns the parameters, updated with those given on the command line."""
        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return dataclasses.replace(params, **given)


Sampling = Annotated[SamplingFlags, tyro.conf.arg(name="")]
