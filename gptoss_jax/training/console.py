"""Console output of a run: a live progress line below the log; plain lines without terminal and notebook."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Literal, TextIO

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from gptoss_jax.status import erase, status
from gptoss_jax.terminal import (
    encodable,
    format_duration,
    format_number,
    format_rate,
    has_colors,
    is_terminal,
    printable,
)

PLAIN_INTERVAL = 10.0  # seconds between progress lines without a terminal
NOTEBOOK_INTERVAL = 1.0  # seconds between updates of the progress line in a notebook
COMPILING = "compiling the first step"
NO_ACTIVITY = ("", 0.0)
RATE_INTERVAL = 3600.0  # seconds of steps that the remaining time is estimated from, at most 1000 steps


class _Stats(ProgressColumn):
    """Loss, speed, learning rate and remaining time; or what is done between steps, and for how long."""

    def render(self, task: Task) -> Text:
        activity, began = task.fields["activity"]
        if not activity:
            return Text(task.fields["stats"])
        return Text(f"{activity} · {format_duration(task.get_time() - began)}")


class Console:
    """Prints messages, evaluations and samples of a run, and its progress as one line.

    `quiet` prints nothing: processes other than 0. `start` hides the cursor of a terminal, so call `stop` in
    a `finally`.
    """

    def __init__(
        self, quiet: bool = False, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._quiet, self._clock, self._stream = quiet, clock, stream or sys.stdout
        self._is_terminal = is_terminal(self._stream)
        # Explicit, because Rich takes FORCE_COLOR for a terminal and would move the cursor in a log file.
        colors: Literal["auto", "standard"] | None = "auto" if self._is_terminal else None
        if colors is None and has_colors(self._stream):
            colors = "standard"
        self._rich = RichConsole(
            file=self._stream, force_terminal=self._is_terminal, color_system=colors, force_jupyter=False
        )
        self._progress: Progress | None = None
        self._last_plain, self._plain_interval = -math.inf, PLAIN_INTERVAL
        # Notebooks know no escape codes, but a carriage return: one line replaces the other.
        self._is_notebook = type(self._stream).__module__.startswith("ipykernel.")
        if self._is_notebook:
            self._plain_interval = NOTEBOOK_INTERVAL
        self._replaceable = ""  # the progress line that a notebook shows at the moment
        self._compiling = contextlib.ExitStack()  # without a terminal

    def _print(self, *parts: tuple[str, str]) -> None:
        """Prints one line made of (text, style) parts. No part is read as markup."""
        if not self._quiet:
            erase()
            self._replace_line("")
            line = Text.assemble(*[(encodable(text, self._stream), style) for text, style in parts])
            self._rich.print(line, soft_wrap=True, highlight=False)
            self._stream.flush()

    def _replace_line(self, line: str) -> None:
        """Puts a line in the place of the progress line of a notebook."""
        if self._replaceable or line:
            self._stream.write(f"\r{' ' * len(self._replaceable)}\r{line}")
            self._stream.flush()
        self._replaceable = line

    def start(self, step: int, total: int, activity: str = COMPILING) -> None:
        """Starts the progress line: `step` steps of `total` are done already. `activity` is shown until the
        first one is done."""
        # The bar gives way to the numbers in a narrow terminal, and those to the step.
        step_column = Column(no_wrap=True, min_width=len(f"step {total}/{total}"))
        self._progress = Progress(
            TextColumn("step {task.completed}/{task.total}", style="bold", table_column=step_column),
            BarColumn(complete_style="cyan", finished_style="cyan"),
            _Stats(Column(no_wrap=True, overflow="ellipsis")),
            console=self._rich,
            disable=self._quiet or not self._is_terminal,
            get_time=self._clock,
            refresh_per_second=4,
            speed_estimate_period=RATE_INTERVAL,
        )
        self._progress.add_task("", completed=step, total=total, stats="", activity=(activity, self._clock()))
        self._progress.start()
        if not self._is_terminal and not self._quiet:
            self._compiling.enter_context(status(activity))

    def update(
        self, step: int, value: float, tokens_per_second: float, learning_rate: float, label: str = "loss"
    ) -> None:
        """Shows that `step` steps are done. `value` is the loss, in nats per token, or what `label` says."""
        progress = self._progress
        assert progress is not None, "not started"
        (task,) = progress.tasks
        # Rich estimates the time from the first update on, so that compilation does not count.
        progress.update(task.id, completed=step)
        stats = (
            f"{label} {format_number(value, 2)} · {tokens_per_second:,.0f} tok/s · "
            f"lr {format_rate(learning_rate)} · left {format_duration(task.time_remaining)}"
        )
        progress.update(task.id, stats=encodable(stats, self._stream), activity=NO_ACTIVITY)
        self._compiling.close()
        now = self._clock()
        if not self._is_terminal and (now - self._last_plain >= self._plain_interval or task.finished):
            self._last_plain = now
            line = f"step {step}/{task.total} · {stats}"
            if not self._is_notebook or task.finished:
                self._print((line, ""))
            elif not self._quiet:
                self._replace_line(encodable(line, self._stream))

    def stop(self) -> None:
        """Ends the progress line and leaves it on the screen; may be called twice, or before `start`."""
        self._compiling.close()
        if self._replaceable:
            self._stream.write("\n")
            self._replaceable = ""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    @contextlib.contextmanager
    def status(self, text: str) -> Iterator[None]:
        """Says what is done while no step is: in the progress line of a terminal, or as a status."""
        progress = self._progress if self._is_terminal and not self._quiet else None
        if progress is None:
            with contextlib.nullcontext() if self._quiet else status(text):
                yield
            return
        (task,) = progress.tasks
        progress.update(task.id, activity=(text, self._clock()))
        try:
            yield
        finally:
            progress.update(task.id, activity=NO_ACTIVITY)

    def message(self, text: str) -> None:
        """Prints a line, or several."""
        self._print((printable(text), ""))

    def evaluation(self, step: int, value: float, details: str, is_best: bool, label: str = "loss") -> None:
        """Prints the result on held-out data: the loss, or what `label` says, and, if not empty, details."""
        self._print(
            (f"step {step} · ", "bold"),
            (f"held-out {label} {format_number(value, 3)}", ""),
            (f" · {details}" if details else "", "cyan"),
            (" · best so far" if is_best else "", "green"),
        )

    def sample(self, text: str, question: str = "", label: str = "the model's answer:") -> None:
        """Prints text that the model wrote, which may hold anything, as a quoted block, after the question
        that it answers."""
        blocks = [("held-out question:", question, "bold"), (label, text, "dim")]
        for label, block, style in blocks if question else [("", text, "dim")]:
            if label:
                self._print((f"  {label}", "bright_black"))
            for line in printable(block).split("\n"):
                # At a terminal, wrapped here so that continuation lines have the mark as well.
                parts = Text(line).wrap(self._rich, max(self._rich.width - 5, 1)) if self._is_terminal else ()
                for part in [part.plain.rstrip() for part in parts] or [line]:
                    self._print(("  │ ", "bright_black"), (part, style))

    def summary(self, values: dict[str, str], next_command: str) -> None:
        """Prints the closing table, and the command to run next."""
        width = max(map(len, values), default=0) + 3
        self._print(("", ""))
        for name, value in values.items():
            self._print((f"  {name:<{width}}", "bright_black"), (printable(value), ""))
        self._print(("", ""))
        self._print(("  Next: ", "bright_black"), (printable(next_command), "bold"))

    def comparison(self, bits_per_byte: dict[str, float | None]) -> None:
        """Prints bits per byte of held-out text, by compressor, as bars; None gives a dash."""
        known = [value for value in bits_per_byte.values() if value is not None and math.isfinite(value)]
        bar = "━" if encodable("━", self._stream) == "━" else "="
        self._print(("", ""))
        self._print(("  Bits per byte of held-out text (fewer is better)", "bold"))
        for name, value in bits_per_byte.items():
            is_best = value in known and value == min(known)
            length = round(28 * value / (max(known) or 1)) if value in known else 0
            self._print(
                (f"    {name:<10}  {format_number(value, 3):>6}  ", "bold green" if is_best else ""),
                (bar * length, "green" if is_best else "bright_black"),
                (" best" if is_best else "", "bold green"),
            )
