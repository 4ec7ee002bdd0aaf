"""`gptoss convert`."""

import dataclasses
import sys
import time
from typing import Annotated, Literal

import tyro

from gptoss_jax.interrupts import explain
from gptoss_jax.status import status
from gptoss_jax.terminal import format_si, is_terminal

PLAIN_INTERVAL = 10.0  # seconds between lines of progress without a terminal
UNWRITTEN = "the new folder was not written"


@dataclasses.dataclass(frozen=True)
class Convert:
    """Write a model as a Hugging Face folder for transformers and vLLM.

    Examples:
      gptoss convert runs/quickstart out
      gptoss convert runs/mine out --experts mxfp4
      gptoss convert hf:openai/gpt-oss-20b gpt-oss-20b-bf16 --experts bfloat16
    """

    # Model: a run folder, a Hugging Face folder, OpenAI's original/ folder, or hf:OWNER/NAME to download one
    # from the Hugging Face Hub.
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    # Folder to create. It appears only when it is complete.
    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    # Type of the weights. mxfp4 packs the experts in MXFP4 and writes the rest in bfloat16. (default: as in
    # SRC)
    experts: Annotated[
        Literal["bfloat16", "float32", "mxfp4"] | None, tyro.conf.arg(help_behavior_hint="")
    ] = None

    def run(self) -> None:
        with explain(UNWRITTEN):
            with status(f"opening {self.source}"):
                from gptoss_jax.checkpoints import export
            with WriteProgress(self.target) as progress:
                export.convert(self.source, self.target, self.experts, progress.show)


class WriteProgress:
    """Shows the progress of writing a model on a terminal, and prints size, time and memory at the end."""

    def __init__(self, target: str) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        console = Console(stderr=True)
        self._is_terminal = is_terminal(sys.stderr)
        self._progress = Progress(
            *columns, TimeRemainingColumn(), console=console, disable=not self._is_terminal
        )
        self._target, self._size, self._began = target, 0, time.monotonic()
        self._task = self._progress.add_task("opening", total=None)
        self._last_line = self._began

    def __enter__(self) -> "WriteProgress":
        self._progress.start()
        return self

    def show(self, done: int, total: int) -> None:
        self._size = total
        self._progress.update(self._task, completed=done, total=total, description="writing")
        if not self._is_terminal and time.monotonic() - self._last_line >= PLAIN_INTERVAL:
            self._last_line = time.monotonic()
            print(f"{format_si(done, 'B')} of {format_si(total, 'B')} written", file=sys.stderr, flush=True)

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        import resource

        self._progress.stop()
        if kind is None:
            # Kilobytes on Linux, bytes on macOS.
            unit = 1 if sys.platform == "darwin" else 1024
            peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            cost = f"{time.monotonic() - self._began:,.0f} s, peak memory {peak / 1e9:,.2f} GB"
            print(f"{self._target}: {format_si(self._size, 'B')} written in {cost}")
