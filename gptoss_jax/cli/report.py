"""`gptoss report`."""

import dataclasses
from typing import Annotated

import tyro

from gptoss_jax.status import status


@dataclasses.dataclass(frozen=True)
class Report:
    """Plot the training curves of a run.

    Writes RUN/report.png and prints its path. Works while the run is training.

    Examples:
      gptoss report runs/quickstart
      gptoss report runs/quickstart-sft
    """

    # Run folder.
    run_dir: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]

    def run(self) -> None:
        with status("drawing"):
            from gptoss_jax.training.plots import draw_report

            picture = draw_report(self.run_dir)
        print(picture)
