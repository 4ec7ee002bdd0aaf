"""What a run tells: `MetricsLog` writes metrics.jsonl and TensorBoard, `Console` shows how it goes."""

import errno
import json
import math
import os
import pathlib
import sys
import time
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from rich.cells import cell_len
from rich.console import Console as RichConsole
from rich.live import Live
from rich.text import Text
from tensorboardX import SummaryWriter

# Seconds between progress lines where there is no terminal to redraw one on.
PLAIN_INTERVAL = 10.0
# How much a step counts in the step rate one step later; the rate is that of about the last 50 steps.
RATE_DECAY = 0.98
# Categories of Unicode that can move a cursor, turn a line round or fail to encode.
_HARMFUL = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def _parse_lines(path: pathlib.Path) -> list[tuple[bytes, dict[str, Any]]]:
    """The lines of a metrics file and what they hold, without a last one that a killed process broke off."""
    lines = path.read_bytes().split(b"\n")
    while lines and not lines[-1].strip():
        lines.pop()
    parsed = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError("not an object with a step")
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}: {error}") from None
        parsed.append((line, row))
    return parsed


def read_metrics(path: str | pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, in the order they were written.

    A last line that breaks off is left out: a run killed while writing leaves one. Raises ValueError with the
    number of any other line that is not a JSON object with a step, FileNotFoundError if there is no file.
    """
    return [row for _, row in _parse_lines(pathlib.Path(path))]


def _plain(value: Any) -> Any:
    """A value as strict JSON knows it: numbers off their arrays, and null for NaN and the infinities."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


class MetricsLog:
    """Appends to `run_dir/metrics.jsonl` and `run_dir/tensorboard/`; one process of a run has one.

    `last_step` is the step of the checkpoint that the run goes on from, -1 where it starts anew. Rows of
    later steps are dropped on opening, so that a resumed run's file is that of an uninterrupted one.
    """

    def __init__(self, run_dir: str | pathlib.Path, last_step: int = -1) -> None:
        folder = pathlib.Path(run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        if path.exists():
            kept = [line + b"\n" for line, row in _parse_lines(path) if row["step"] <= last_step]
            temporary = folder / "metrics.jsonl.tmp"
            temporary.write_bytes(b"".join(kept))
            os.replace(temporary, path)
        # Unbuffered: each row is a single write, so a killed process loses at most the one under way.
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        # The name of an event file tells seconds only: the suffix keeps a quick restart from overwriting it.
        options = dict(max_queue=1000, flush_secs=10, filename_suffix=f".{time.time_ns()}")
        # Absolute, because tensorboardX takes a path that begins with `s3:` or `gs:` for a bucket.
        board = folder.absolute() / "tensorboard"
        self._board = SummaryWriter(str(board), purge_step=last_step + 1, **options)

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends a row with an integer `step`, else ValueError. Numbers may be Python's, NumPy's or JAX's.

        Floats keep every digit, so that losses can be compared bit for bit; NaN and infinities become null.
        """
        plain = {key: _plain(value) for key, value in row.items()}
        step = plain.get("step")
        if not isinstance(step, int):
            raise ValueError(f"step is {step!r}: a row of metrics must hold an integer step")
        line = (json.dumps(plain, allow_nan=False) + "\n").encode()
        if self._file.write(line) != len(line):
            raise OSError(errno.ENOSPC, "a row could not be written whole", self._file.name)
        for key, value in plain.items():
            if key != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
                tag = f"eval/{key}" if key.startswith("val_") else f"train/{key}"
                self._board.add_scalar(tag, value, step)

    def close(self) -> None:
        """Flushes and closes both; closing twice does no harm."""
        self._file.close()
        self._board.close()


def _with_unit(value: float | None, units: Sequence[str], digits: str) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    unit = 0
    # 999,950 must become 1.0M: what counts is the number as it will be printed.
    while unit + 1 < len(units) and float(format(value, digits)) >= 1000:
        value, unit = value / 1000, unit + 1
    return f"{value:{digits}}{units[unit]}"


def format_count(count: float | None) -> str:
    """A number of things in a few characters: 950, 1.2K, 105.7M, 20.9B. None gives a dash."""
    if count is not None and abs(count) < 1000:
        return f"{count:.0f}"
    return _with_unit(count, ["", "K", "M", "B", "T"], ".1f")


def format_flops(flops_per_second: float | None) -> str:
    """A rate in FLOP/s to three digits: 132 GFLOP/s, 1.05 PFLOP/s. None gives a dash."""
    units = [f" {unit}FLOP/s" for unit in ("", "K", "M", "G", "T", "P", "E")]
    return _with_unit(flops_per_second, units, "#.3g").replace(". ", " ")


def format_duration(seconds: float | None) -> str:
    """Seconds as 4:12 or 1:02:03. None gives a dash."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    minutes, second = divmod(round(max(seconds, 0)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def format_rate(rate: float) -> str:
    """A learning rate in the short scientific form, 1.2e-3."""
    mantissa, _, exponent = f"{rate:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if rate and exponent else f"{rate:g}"


def format_number(value: float | None, digits: int) -> str:
    """Returns a value with `digits` decimals; a dash for None, NaN and infinities."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def printable(text: str) -> str:
    """Arbitrary text made harmless to a terminal: line ends and tabs stay what they look like, and every
    other control character, lone surrogate and direction mark is spelled out (`\\x1b`).
    """

    def spelled(character: str) -> str:
        # Scripts and emoji need the two joiners, which are control characters by category.
        harmless = character in "\n\u200c\u200d" or unicodedata.category(character) not in _HARMFUL
        return character if harmless else character.encode("unicode_escape").decode()

    return "".join(map(spelled, text.replace("\r\n", "\n").expandtabs(4)))


class Console:
    """What a person sees of a run. At a terminal one line is redrawn in place and all else is printed above
    it; elsewhere the same goes out as plain lines, the progress every 10 seconds.

    `quiet` prints nothing: processes other than 0. `start` hides the cursor of a terminal, so call `stop`
    in a `finally`.
    """

    def __init__(
        self, quiet: bool = False, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._quiet, self._clock = quiet, clock
        self._stream = stream or sys.stdout
        self._encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._bar = "━" if self._encodable("━") == "━" else "="
        self._is_terminal = self._stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
        # Said outright, because variables such as FORCE_COLOR would bring escape codes into a log file.
        terminal, colors = self._is_terminal, "auto" if self._is_terminal else None
        self._rich = RichConsole(
            file=self._stream, force_terminal=terminal, color_system=colors, force_jupyter=False
        )
        self._live: Live | None = None
        self._step = self._total = 0
        self._stats: list[str] = []
        self._began = self._last_time = self._last_plain = -math.inf
        self._updated, self._rate_seconds, self._rate_steps = False, 0.0, 0.0

    def _encodable(self, text: str) -> str:
        return text.encode(self._encoding, "replace").decode(self._encoding)

    def _print(self, *parts: tuple[str, str]) -> None:
        """Prints one line made of (text, style) parts. No part is read as markup."""
        if not self._quiet:
            line = Text.assemble(*[(self._encodable(text), style) for text, style in parts])
            self._rich.print(line, soft_wrap=True, highlight=False)
            self._stream.flush()

    def start(self, step: int, total: int) -> None:
        """Begins to show progress: `step` steps of `total` are done already."""
        self._step, self._total, self._stats, self._updated = step, total, [], False
        self._rate_seconds = self._rate_steps = 0.0
        self._began, self._last_plain = self._clock(), -math.inf
        if self._is_terminal and not self._quiet:
            self._live = Live(console=self._rich, get_renderable=lambda: self._line(self._rich.width))
            self._live.start()

    def update(self, step: int, loss: float, tokens_per_second: float, learning_rate: float) -> None:
        """Shows that `step` steps are done. Loss in nats per token."""
        if self._quiet:
            return
        now = self._clock()
        # The time before the first update is that of compiling, which says nothing of the steps to come.
        if self._updated and step > self._step:
            decay = RATE_DECAY ** (step - self._step)
            self._rate_seconds = self._rate_seconds * decay + (now - self._last_time)
            self._rate_steps = self._rate_steps * decay + (step - self._step)
        self._step, self._last_time, self._updated = step, now, True
        rate = self._rate_seconds / self._rate_steps if self._rate_steps else None
        left = None if rate is None else rate * (self._total - step)
        self._stats = [
            f"loss {format_number(loss, 2)}",
            f"{tokens_per_second:,.0f} tok/s",
            f"lr {format_rate(learning_rate)}",
            f"left {format_duration(left)}",
        ]
        if self._live is None and (now - self._last_plain >= PLAIN_INTERVAL or step >= self._total):
            self._last_plain = now
            self._print((f"step {step}/{self._total} · {' · '.join(self._stats)}", ""))

    def _line(self, width: int) -> Text:
        """The progress line, narrower than `width`: the bar gives way first, then numbers from the right."""
        stats = self._stats or [f"compiling the first step · {format_duration(self._clock() - self._began)}"]
        head, count = f"step {self._step}/{self._total} ", len(stats)
        while count and cell_len(head + " · ".join(stats[:count])) > width - 1:
            count -= 1
        tail = " · ".join(stats[:count])
        room = min(40, width - 2 - cell_len(head + tail))
        line = Text(head, style="bold", no_wrap=True, overflow="ellipsis", end="")
        if room >= 4:
            done = round(room * min(self._step / max(self._total, 1), 1))
            line.append(self._bar * done, "not bold cyan")
            line.append(self._bar * (room - done) + " ", "not bold bright_black")
        line.append(self._encodable(tail), "not bold").rstrip()
        return line

    def message(self, text: str) -> None:
        """Prints a line (or several) that stays."""
        self._print((printable(text), ""))

    def evaluation(self, step: int, val_loss: float, bits_per_byte: float, is_best: bool) -> None:
        """Prints what an evaluation on held-out text gave: loss in nats per token, bits per byte of text."""
        self._print(
            (f"step {step} · ", "bold"),
            (f"held-out loss {format_number(val_loss, 3)} · ", ""),
            (f"{format_number(bits_per_byte, 4)} bits per byte", "cyan"),
            (" · best so far" if is_best else "", "green"),
        )

    def sample(self, text: str) -> None:
        """Prints text that the model wrote as a quoted block. It may hold anything: see `printable`."""
        for line in printable(text).split("\n"):
            # At a terminal the lines are wrapped here, so that their continuations carry the mark as well.
            parts = Text(line).wrap(self._rich, max(self._rich.width - 5, 1)) if self._is_terminal else ()
            for part in [part.plain.rstrip() for part in parts] or [line]:
                self._print(("  │ ", "bright_black"), (part, "dim"))

    def stop(self) -> None:
        """Ends the live line and leaves it as it is. Stopping twice, or before a start, is harmless."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def summary(self, rows: list[tuple[str, str]], next_command: str) -> None:
        """Prints the closing table, (name, value) a row, and the command to go on with."""
        width = max((cell_len(name) for name, _ in rows), default=0)
        self._print(("", ""))
        for name, value in rows:
            padding = " " * (width - cell_len(name) + 3)
            self._print((f"  {name}{padding}", "bright_black"), (printable(value), ""))
        self._print(("", ""))
        self._print(("  Next: ", "bright_black"), (printable(next_command), "bold"))

    def comparison(self, *, gzip: float | None, xz: float | None, model: float | None) -> None:
        """Prints bits per byte of held-out text for two compressors and the model; None gives a dash."""
        entries = [("gzip -9", gzip), ("xz -9", xz), ("this model", model)]
        known = [value for _, value in entries if value is not None and math.isfinite(value)]
        self._print(("", ""))
        self._print(("  Bits per byte of held-out text (fewer is better)", "bold"))
        for name, value in entries:
            best = value in known and value == min(known)
            length = round(28 * value / (max(known) or 1)) if value in known else 0
            self._print(
                (f"    {name:<10}  {format_number(value, 3):>6}  ", "bold green" if best else ""),
                (self._bar * length, "green" if best else "bright_black"),
                (" best" if best else "", "bold green"),
            )
