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
    # Maximum number of tokens to generate. (default: 200, or 4096 for a chat model in gptoss chat)
    max_new_tokens: OptionalInt = None
    # Sampling temperature; 0 always picks the most likely token. (default: 0.8, or 1 for a chat model in
    # gptoss chat)
    temperature: OptionalFloat = None
    # Sample from the k most likely tokens. (default: no limit)
    top_k: OptionalInt = None
    # Sample from the smallest set of most likely tokens whose total probability reaches p. (default: 1)
    top_p: OptionalFloat = None
    # Drop tokens less likely than this fraction of the most likely token's probability. (default: 0)
    min_p: OptionalFloat = None
    # Subtract this from the logit of every token already generated; from -2 to 2. (default: 0)
    presence_penalty: OptionalFloat = None
    # Subtract this from a token's logit for each time it was generated; from -2 to 2. (default: 0)
    frequency_penalty: OptionalFloat = None
    # Random seed for sampling.
    seed: int = 0

    def update(self, params: "SamplingParams") -> "SamplingParams":
        """Returns the parameters, updated with those given on the command line."""
        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return dataclasses.replace(params, **given)


Sampling = Annotated[SamplingFlags, tyro.conf.arg(name="")]
