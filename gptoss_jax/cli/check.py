"""The command `gptoss check`: every kernel of this machine's backend against plain XLA, as a table."""

import dataclasses
import math
import time
from typing import Any

import jax
from rich.console import Console

from gptoss_jax.config.base import write_json
from gptoss_jax.config.kernels import ENVIRONMENT, kernel_variable, plain_kernels
from gptoss_jax.config.paths import output_file
from gptoss_jax.kernels.check import Case, Result, device_name
from gptoss_jax.kernels.first_use import check_again

STYLES = {"ok": "green", "unavailable": "yellow", "unchecked": "yellow"}
WIDTHS = (22, 20, 11)
HEADINGS = ("kernel", "inputs", "result", "error", "allowed", "kernel ms", "plain ms")


def run(json_file: str | None = None) -> bool:
    """Checks, prints, and writes the results where asked. Returns True if no kernel is wrong or fails.

    A row is printed as soon as it is known, and its kernel's name before, so that a kernel that ends the
    process is seen. Raises ValueError for a file whose folder does not exist, and OSError when a kernel
    leaves the device unusable.
    """
    path = None if json_file is None else output_file(json_file, "json")
    off = plain_kernels(kernel_variable(), ENVIRONMENT)
    began, backend, results = time.monotonic(), jax.default_backend(), []
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"Kernels on {device_name()}")
    console.print(_columns(*HEADINGS[:3]) + "".join(f"{name:>11}" for name in HEADINGS[3:]), style="bold")

    def announce(case: Case) -> None:
        console.print(_columns(case.kernel, _inputs(case)), end="")

    def report(result: Result) -> None:
        if not result.dtype:  # of an earlier process, so not announced
            console.print(_columns(result.kernel, ""), end="")
        results.append(result)
        console.print(f"{result.status:{WIDTHS[2]}}", style=STYLES.get(result.status, "red"), end="")
        console.print(_numbers(result))

    try:
        check_again(backend, announce, report)
    finally:
        if path is not None:
            write_json(path, {"device": device_name(), "results": list(map(_json_ready, results))})
    failed = sorted({result.kernel for result in results if result.status in ("wrong", "failed")})
    for line in _remarks(backend, results, failed):
        console.print(line, markup=False)
    if off:
        console.print(f"Turned off by {ENVIRONMENT}: {', '.join(sorted(off))}")
    checked = [result for result in results if result.status not in ("unavailable", "unchecked")]
    right = sum(result.status == "ok" for result in checked)
    console.print(f"{right} of {len(checked)} checks passed in {time.monotonic() - began:.1f} s")
    return not failed


def _json_ready(result: Result) -> dict[str, Any]:
    """A result for JSON, which has no infinite error: it is null, and `detail` says more."""
    error = result.error if result.error is not None and math.isfinite(result.error) else None
    return dataclasses.asdict(result) | {"error": error}


def _columns(*texts: str) -> str:
    return "".join(f"{text:{width}}" for text, width in zip(texts, WIDTHS, strict=False))


def _inputs(case: Case) -> str:
    return f"{case.dtype}, {case.variant}" if case.variant else case.dtype


def _numbers(result: Result) -> str:
    errors = ("–" if x is None else f"{x:.1e}" for x in (result.error, result.tolerance))
    times = ("–" if x is None else f"{x:.3f}" for x in (result.milliseconds, result.plain_milliseconds))
    return "".join(f"{text:>11}" for text in (*errors, *times))


def _remarks(backend: str, results: list[Result], failed: list[str]) -> list[str]:
    """The lines below the table: more about the results that are not ok."""
    shown = [(f"{r.kernel} ({r.dtype})" if r.dtype else r.kernel, r) for r in results if r.detail]
    lines = [f"{name}: {r.status}, {r.detail}" for name, r in shown]
    if not results:
        lines.append(f"{backend} has no kernels of its own here: plain XLA does everything.")
    if failed and backend == "cpu":
        lines.append(f"To run without {' and '.join(failed)}: {ENVIRONMENT}=plain:{','.join(failed)}")
    elif failed:
        lines.append(f"Plain XLA now replaces {' and '.join(failed)} on this machine.")
    return lines
