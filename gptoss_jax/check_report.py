"""The command `gptoss check`: every kernel of this machine's backend against plain XLA, as a table."""

import dataclasses
import json
import os
import time

import jax
from rich.console import Console
from rich.table import Table

from gptoss_jax.config.kernels import plain_kernels
from gptoss_jax.config.paths import output_file
from gptoss_jax.kernels.check import Result, check_kernels, device_name
from gptoss_jax.kernels.first_use import check_and_record
from gptoss_jax.kernels.selection import ENVIRONMENT

STYLES = {"ok": "green", "unavailable": "yellow"}


def run(json_file: str | None = None) -> bool:
    """Checks, prints, and writes the results where asked. Returns whether every kernel that runs is right.

    On GPU and TPU the record of the first use is written again. Raises ValueError for a file whose folder
    does not exist, and OSError when a kernel breaks the device.
    """
    path = None if json_file is None else output_file(json_file, "json")
    off = plain_kernels(os.environ.get(ENVIRONMENT, "auto"), ENVIRONMENT)
    began, backend, results = time.monotonic(), jax.default_backend(), []
    console = Console()
    console.print(f"Kernels on {device_name()}", highlight=False)
    with console.status("checking"):
        if backend == "cpu":
            results += check_kernels(backend)
        else:
            check_and_record(backend, report=results.append)
    console.print(_table(results))
    failed = sorted({result.kernel for result in results if result.status in ("wrong", "failed")})
    for line in _remarks(backend, results, failed):
        console.print(line, highlight=False)
    if off:
        console.print(f"Turned off by {ENVIRONMENT}: {', '.join(sorted(off))}", highlight=False)
    checked = [result for result in results if result.status != "unavailable"]
    right = sum(result.status == "ok" for result in checked)
    seconds = time.monotonic() - began
    console.print(f"{right} of {len(checked)} checks passed in {seconds:.1f} s", highlight=False)
    if path is not None:
        values = {"device": device_name(), "results": [dataclasses.asdict(result) for result in results]}
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return not failed


def _table(results: list[Result]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("kernel")
    table.add_column("inputs")
    table.add_column("result")
    for name in ("error", "allowed", "kernel ms", "plain ms"):
        table.add_column(name, justify="right")
    for r in results:
        errors = ("–" if x is None else f"{x:.1e}" for x in (r.error, r.tolerance))
        times = ("–" if x is None else f"{x:.3f}" for x in (r.milliseconds, r.plain_milliseconds))
        inputs = f"{r.dtype}, {r.variant}" if r.variant else r.dtype
        table.add_row(r.kernel, inputs, f"[{STYLES.get(r.status, 'red')}]{r.status}", *errors, *times)
    return table


def _remarks(backend: str, results: list[Result], failed: list[str]) -> list[str]:
    """What the table does not say about results that are not ok."""
    lines = [f"{r.kernel} ({r.dtype}): {r.status}, {r.detail}" for r in results if r.detail]
    if not results:
        lines.append(f"{backend} has no kernels of its own here: plain XLA does everything.")
    if failed and backend == "cpu":
        lines.append(f"Run without {' and '.join(failed)}: {ENVIRONMENT}=plain:{','.join(failed)}")
    elif failed:
        lines.append(f"Plain XLA now does the work of {' and '.join(failed)} on this machine.")
    return lines
