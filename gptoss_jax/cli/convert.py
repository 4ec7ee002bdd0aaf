"""`gptoss convert`."""

import dataclasses
import sys
import time
from typing import Annotated, Literal

import tyro


@dataclasses.dataclass(frozen=True)
class Convert:
    """Write a model as a Hugging Face folder that transformers and vLLM can load."""

    # Run folder, Hugging Face folder of any type, original/ folder, or hf:OWNER/NAME of the Hugging Face Hub.
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    # New folder. It appears only when it is complete.
    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    # Type of the weights; mxfp4 is MXFP4 experts and bfloat16 for the rest. Default: the source's.
    experts: Annotated[
        Literal["bfloat16", "float32", "mxfp4"] | None, tyro.conf.arg(help_behavior_hint="")
    ] = None

    def run(self) -> None:
        import resource

        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        from gptoss_jax.checkpoints import export

        began, size = time.monotonic(), 0
        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            task = progress.add_task("", total=None)

            def show(done: int, total: int) -> None:
                nonlocal size
                size = total
                progress.update(task, completed=done, total=total)

            export.convert(self.source, self.target, self.experts, show)
        # Kilobytes on Linux, bytes on macOS.
        unit = 1 if sys.platform == "darwin" else 1024
        peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        time_and_memory = f"{time.monotonic() - began:,.0f} s, peak memory {peak / 1e9:,.2f} GB"
        print(f"{self.target}: {size / 1e9:,.2f} GB written in {time_and_memory}")
