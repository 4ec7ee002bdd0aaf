"""What the benchmarks share: where they run, timing, tables and the JSON file.

Python looks first in the folder of the script it runs, so `import common` finds this from any of them.
"""

import importlib.metadata
import json
import os
import pathlib
import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence

import jax
from rich.console import Console
from rich.table import Table

RESULTS = pathlib.Path(__file__).parent / "results"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def hardware() -> dict:
    """The devices as JAX names them, and the machine around them."""
    device = jax.devices()[0]
    memory = (device.memory_stats() or {}).get("bytes_limit")
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        # Bytes that a program may use of one device; None where JAX cannot tell.
        "device_memory": memory,
        "driver": getattr(device.client, "platform_version", "").split("\n")[0],
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def _cpu() -> str:
    lines = pathlib.Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", lines.read_text()) if lines.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def versions(*more: str) -> dict[str, str]:
    """Python, the packages all benchmarks rest on, and those asked for; what is not there is left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES + more:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def timed(function: Callable, *args, repetitions: int = 5) -> list[float]:
    """Seconds of each call, until its result is there. One call before, to compile, is not counted."""
    jax.block_until_ready(function(*args))
    return [_seconds(function, *args) for _ in range(repetitions)]


def alternate(functions: dict[str, Callable], rounds: int = 5) -> dict[str, list[float]]:
    """The same of several functions without arguments, run in turn, so that a slow minute meets all alike."""
    for function in functions.values():
        jax.block_until_ready(function())
    seconds = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            seconds[name].append(_seconds(function))
    return seconds


def _seconds(function, *args) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - start


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def show(values: dict[str, float], digits: int = 2) -> str:
    """A spread for people: median (min–max)."""
    return "{median:,.{d}f} ({min:,.{d}f}–{max:,.{d}f})".format(**values, d=digits)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence]) -> None:
    """The first column to the left, the others to the right. None is a dash."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=not i)
    for row in rows:
        table.add_row(*("–" if cell is None else str(cell) for cell in row))
    # A file or a pipe has no width of its own: nothing is to be cut there.
    wide = Console()
    (wide if wide.is_terminal else Console(width=160)).print(table)


def write_json(name: str | pathlib.Path, record: dict) -> pathlib.Path:
    """Writes date, hardware, versions and `record`, whose entries win, to results/NAME.json.

    A name that ends in .json is the path itself.
    """
    path = pathlib.Path(name) if str(name).endswith(".json") else RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "versions": versions(),
    } | record
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(temporary, path)
    return path
