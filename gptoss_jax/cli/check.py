"""The command `gptoss check`: a table of every kernel of this machine's backend against plain XLA."""

import dataclasses
import math
import time

import jax
from rich.console import Console

from gptoss_jax.config.base import write_json
from gptoss_jax.config.kernels import ENVIRONMENT, kernel_variable, plain_kernels
from gptoss_jax.config.paths import output_file
from gptoss_jax.kernels.backend import describe_device
from gptoss_jax.kernels.check import Case, Result
from gptoss_jax.kernels.selection import check_kernels

STYLES = {"ok": "green", "unavailable": "yellow", "unchecked": "yellow"}
ROW = "{:22}{:20}"
NUMBERS = ("error", "allowed", "kernel ms", "plain ms")


def start() -> None:
    """Starts JAX's backend."""
    jax.devices()


def run(json_file: str | None = None) -> bool:
    """Checks all kernels, prints the results and writes them to a file. Returns False if a kernel failed.

    A kernel's name is printed before it runs, so that one that ends the process is seen. Raises ValueError
    for a file whose folder does not exist, and OSError when a kernel leaves the device unusable.
    """
    path = None if json_file is None else output_file(json_file, "json")
    off = plain_kernels(kernel_variable(), ENVIRONMENT)
    began, backend, results = time.monotonic(), jax.default_backend(), []
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"Kernels on {describe_device()}")
    heading = ROW.format("kernel", "inputs") + f"{'result':11}"
    console.print(heading + "".join(f"{name:>11}" for name in NUMBERS), style="bold")

    def announce(case: Case) -> None:
        inputs = f"{case.dtype}, {case.variant}" if case.variant else case.dtype
        console.print(ROW.format(case.kernel, inputs), end="")

    def report(result: Result) -> None:
        if not result.dtype:  # of an earlier process, so not announced
            console.print(ROW.format(result.kernel, ""), end="")
        results.append(result)
        console.print(f"{result.status:11}", style=STYLES.get(result.status, "red"), end="")
        errors = ("–" if x is None else f"{x:.1e}" for x in (result.error, result.tolerance))
        times = ("–" if x is None else f"{x:.3f}" for x in (result.milliseconds, result.plain_milliseconds))
        console.print("".join(f"{text:>11}" for text in (*errors, *times)))

    try:
        check_kernels(backend, announce, report, again=True)
    finally:
        if path is not None:
            write_json(path, {"device": describe_device(), "results": list(map(_json_ready, results))})
    failed = sorted({result.kernel for result in results if result.status in ("wrong", "failed")})
    for line in _remarks(backend, results, failed):
        console.print(line, markup=False)
    if off:
        console.print(f"Turned off by {ENVIRONMENT}: {', '.join(sorted(off))}")
    checked = [result for result in results if result.status not in ("unavailable", "unchecked")]
    passed = sum(result.status == "ok" for result in checked)
    console.print(f"{passed} of {len(checked)} checks passed in {time.monotonic() - began:.1f} s")
    return not failed


def _json_ready(result: Result) -> dict:
    """A result for JSON, which has no infinite error: it is null, and `detail` explains."""
    error = result.error if result.error is not None and math.isfinite(result.error) else None
    return dataclasses.asdict(result) | {"error": error}


def _remarks(backend: str, results: list[Result], failed: list[str]) -> list[str]:
    """The lines below the table, which explain the results that are not ok."""
    shown = [(f"{r.kernel} ({r.dtype})" if r.dtype else r.kernel, r) for r in results if r.detail]
    lines = [f"{name}: {r.status}, {r.detail}" for name, r in shown]
    if not results:
        lines.append(f"{backend} has no kernels of its own here: plain XLA does everything.")
    if failed and backend == "cpu":
        lines.append(f"To run without {' and '.join(failed)}: {ENVIRONMENT}=plain:{','.join(failed)}")
    elif failed:
        lines.append(f"Plain XLA now replaces {' and '.join(failed)} on this machine.")
    return lines
