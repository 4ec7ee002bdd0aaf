"""Metrics of a run (metrics.jsonl and TensorBoard), and step timing."""

import contextlib
import errno
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, Literal


@contextlib.contextmanager
def _hidden(name: str) -> Iterator[None]:
    """Lets a package that is not imported yet count as not installed."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.modules.pop(name, None)


# tensorboardX would import an installed torch, only to take its tensors: 3 s of a core and 200 MB.
with _hidden("torch"):
    from tensorboardX import SummaryWriter


def read_metrics(path: str | pathlib.Path) -> list[dict[str, Any]]:
    """Returns the rows of a metrics.jsonl in the order they were written.

    Ignores an incomplete last line, left by a process that was killed while writing. Raises a ValueError that
    names the line number if any other line is not a JSON object with a step, and FileNotFoundError if there
    is no file.
    """
    lines, rows = pathlib.Path(path).read_bytes().rstrip().split(b"\n"), []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError("not an object with a step")
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}: {error}") from None
        rows.append(row)
    return rows


def _to_json(value: Any) -> Any:
    """Converts a scalar or array to Python numbers, with None for NaN and infinities."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, (list, tuple)):
        return [_to_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class MetricsLog:
    """Appends to `run_dir/metrics.jsonl` and `run_dir/tensorboard/`; used in only one process of a run.

    `last_step` is the step of the checkpoint that the run resumes from, -1 for a new run. Rows of later steps
    are dropped on opening, so that the file of a resumed run equals that of an uninterrupted one.
    """

    def __init__(self, run_dir: str | pathlib.Path, last_step: int = -1) -> None:
        folder = pathlib.Path(run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        path, temporary = folder / "metrics.jsonl", folder / "metrics.jsonl.tmp"
        rows = read_metrics(path) if path.exists() else []
        kept = "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= last_step)
        temporary.write_text(kept, encoding="utf-8")
        os.replace(temporary, path)
        # Unbuffered: each row is a single write, so a killed process loses at most that one.
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        # Names of event files have a resolution of one second: the suffix keeps a quick restart from
        # overwriting one. The path is absolute because tensorboardX treats a path that begins with `s3:` as a
        # bucket.
        options = dict(max_queue=1000, flush_secs=10, filename_suffix=f".{time.time_ns()}")
        board = folder.absolute() / "tensorboard"
        self._board = SummaryWriter(str(board), purge_step=last_step + 1, **options)

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends a row with an integer `step`, or raises ValueError. Values may be Python's, NumPy's or
        JAX's.

        Floats keep every digit, so that losses can be compared bit for bit; NaN and infinities become null.
        """
        plain = {key: _to_json(value) for key, value in row.items()}
        step = plain.get("step")
        if not isinstance(step, int):
            raise ValueError(f"step is {step!r}: a row of metrics must hold an integer step")
        line = (json.dumps(plain, allow_nan=False) + "\n").encode()
        if self._file.write(line) != len(line):
            raise OSError(errno.ENOSPC, "a row could not be written completely", self._file.name)
        for key, value in plain.items():
            if key != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
                tag = f"eval/{key}" if key.startswith("val_") else f"train/{key}"
                self._board.add_scalar(tag, value, step)

    def close(self) -> None:
        """Flushes and closes both; may be called twice."""
        self._file.close()
        self._board.close()


class StepTimer:
    """Splits the time since the last `take` into running steps, sampling answers to train on (rollouts),
    waiting for data, and logging."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Starts a new interval now."""
        self._start, self.steps = time.perf_counter(), 0
        self._spent = {"data": 0.0, "rollout": 0.0, "logging": 0.0, "other": 0.0}

    @contextlib.contextmanager
    def measure(self, kind: Literal["data", "rollout", "logging", "other"]) -> Iterator[None]:
        """Attributes the time in the context to waiting for data, rollouts, logging, or other work besides
        steps."""
        start = time.perf_counter()
        try:
            yield
        finally:
            # Only time since the start of the interval counts: `take` may have been called inside.
            self._spent[kind] += time.perf_counter() - max(start, self._start)

    def take(self) -> dict[str, float]:
        """Ends the interval. Returns its seconds, seconds per step, and fractions of waiting, logging and, if
        there were any, rollouts."""
        spent, steps = self._spent, self.steps
        seconds = max(time.perf_counter() - self._start - spent["other"], 1e-9)
        self.restart()
        names = {"data": "data_wait_share", "logging": "logging_share"}
        names |= {"rollout": "rollout_share"} if spent["rollout"] else {}
        shares = {name: round(min(spent[kind] / seconds, 1), 6) for kind, name in names.items()}
        return {"seconds": seconds, "step_seconds": round(seconds / steps, 6)} | shares
