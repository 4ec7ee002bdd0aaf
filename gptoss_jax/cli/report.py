"""`gptoss report`."""

import dataclasses
from typing import Annotated

import tyro


@dataclasses.dataclass(frozen=True)
class Report:
    """Plot the training curves of a run as RUN/report.png, and print its path."""

    # Run folder of train.py.
    run_dir: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]

    def run(self) -> None:
        from gptoss_jax.training.plots import draw_report

        print(draw_report(self.run_dir))
