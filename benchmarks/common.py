"""Shared by the benchmarks: flags, hardware and versions, timing, a small model, tables and JSON files.

Python puts the folder of the script it runs first on its path, so `import common` works in all of them.
"""

import argparse
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import signal
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from gptoss_jax import host_memory, interrupts, startup
from gptoss_jax.config.paths import user_path

RESULTS = pathlib.Path(__file__).parent / "results"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
PEAK = "matmul peak"


def keep_memory() -> None:
    """Restarts the process with the memory settings of `gptoss train`; Ctrl-C and SIGTERM end it as usual."""
    startup.keep_memory()
    # The restart blocks them until the command handles them.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, interrupts.CODES)


def base_parser(description: str, rounds: int) -> argparse.ArgumentParser:
    """Returns a parser with the flags of all CPU benchmarks."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=rounds, help=f"measured rounds (default: {rounds})")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="tiny sizes, to check that the script works; writes no file",
    )
    return parser


def hardware() -> dict:
    """Describes the devices, as JAX names them, and the machine."""
    device = jax.devices()[0]
    memory = (device.memory_stats() or {}).get("bytes_limit")
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        # Bytes of one device that a program may use; None if JAX does not know.
        "device_memory": memory,
        "driver": getattr(device.client, "platform_version", "").split("\n")[0],
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def _cpu() -> str:
    lines = pathlib.Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", lines.read_text(encoding="utf-8")) if lines.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def versions(*more: str) -> dict[str, str]:
    """Returns the versions of Python, of `PACKAGES` and of `more`, without those that are not installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES + more:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def timed(function: Callable, *args, repetitions: int = 5) -> list[float]:
    """Returns the seconds of each call until its result is ready, after one call that compiles."""
    jax.block_until_ready(function(*args))
    return [_seconds(function, *args) for _ in range(repetitions)]


def alternate(functions: dict[str, Callable], rounds: int = 5) -> dict[str, list[float]]:
    """Like `timed`, for several functions that alternate, so that a slow minute affects all alike."""
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


def square_matmul(size: int = 2048) -> Callable[[], jax.Array]:
    """Returns a matmul of two square float32 matrices, which measures the peak FLOP/s."""
    a, b = (jnp.full((size, size), value, jnp.float32) for value in (0.5, 2.0))
    return functools.partial(jax.jit(jnp.matmul), a, b)


def flops_per_second(seconds: Sequence[float], flops: float = 2 * 2048**3) -> dict[str, float]:
    """Returns the spread of FLOP/s for `flops` operations, by default those of `square_matmul`."""
    return spread([flops / one for one in seconds])


def with_gradients(function: Callable) -> Callable:
    """Returns a jitted (cotangent, arguments, others) -> result and gradients of the arguments.

    The others are arguments too, because with constants the compiler could do work in advance.
    """

    def both(g, arguments, others=()):
        y, pull = jax.vjp(lambda *arguments: function(*arguments, *others), *arguments)
        return y, pull(g)

    return jax.jit(both)


def largest_error(found, expected) -> float:
    """Returns the largest difference over the largest value of an array, for the worst array of a tree."""

    def one(found, expected):
        found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
        return float(np.max(np.abs(found - expected)) / np.max(np.abs(expected)))

    return max(jax.tree.leaves(jax.tree.map(one, found, expected)))


def uneven_sizes(rows: int, groups: int) -> np.ndarray:
    """Returns group sizes like a router's: log-normal shares, the largest about three times the mean."""
    shares = np.exp(0.5 * np.random.default_rng(0).standard_normal(groups))
    ends = np.round(np.cumsum(shares) / shares.sum() * rows).astype(np.int32)
    return np.diff(ends, prepend=0).astype(np.int32)


class Training:
    """Trains a model on one device, by default always on the same batch of random tokens, one document per
    row. A model with adapters trains only them, beside random weights."""

    def __init__(self, model, rows: int, length: int):
        from gptoss_jax.config import DataConfig, MeshConfig, TrainConfig
        from gptoss_jax.model.lora import is_adapter
        from gptoss_jax.model.parameters import split_params
        from gptoss_jax.parallel.mesh import make_mesh
        from gptoss_jax.training.state import create_params, create_state
        from gptoss_jax.training.step import make_train_step

        config = TrainConfig(
            model=model,
            data=DataConfig(seq_len=length, batch_size=rows),
            mesh=MeshConfig(data=1),
            steps=10_000,
        )
        self._batch = batch_of(random_tokens(model.vocab_size, rows, length))
        self._mesh = make_mesh(config.mesh, jax.devices()[:1])
        with jax.set_mesh(self._mesh):
            params = create_params(config, self._mesh)
            trained, self._frozen = split_params(params, is_adapter if model.lora else None)
            self._state = create_state(config, self._mesh, trained)
            self._step = make_train_step(config)
        self._programs = {}
        start = time.perf_counter()
        self.program = self.compile(self._batch)
        self.compile_seconds = time.perf_counter() - start
        self._is_first = True

    def compile(self, batch: dict):
        """Returns the step's program for batches of this shape."""
        shape = batch["tokens"].shape
        if shape not in self._programs:
            with jax.set_mesh(self._mesh):
                self._programs[shape] = self._step.lower(self._state, batch, self._frozen).compile()
        return self._programs[shape]

    def step(self, batch: dict | None = None) -> jax.Array:
        """Takes one step and returns its loss, when the loss and the whole state are ready."""
        batch = self._batch if batch is None else batch
        program = self.compile(batch)
        with jax.set_mesh(self._mesh):
            self._state, metrics = program(self._state, batch, self._frozen)
        jax.block_until_ready(self._state)
        if self._is_first:
            host_memory.release()  # as the training loop does
            self._is_first = False
        return metrics["loss"]


def random_tokens(vocabulary: int, rows: int, length: int) -> np.ndarray:
    """Returns rows of `length` + 1 tokens: the last one is the target of the one before."""
    return np.random.default_rng(0).integers(0, vocabulary, (rows, length + 1)).astype(np.int32)


def batch_of(rows: np.ndarray) -> dict[str, jax.Array]:
    tokens, targets = jnp.asarray(rows[:, :-1]), jnp.asarray(rows[:, 1:])
    positions_BT = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    return {
        "tokens": tokens,
        "targets": targets,
        "segment_ids": jnp.ones_like(tokens),
        "positions": positions_BT,
        "loss_weights": jnp.ones(tokens.shape, jnp.float32),
    }


def small_model(**sizes):
    """Returns the `ModelConfig` of a small model: width 384, two layers unless `sizes` says otherwise."""
    from gptoss_jax.config import ModelConfig

    defaults = {
        "vocab_size": 4096,
        "hidden_size": 384,
        "intermediate_size": 960,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "sliding_window": 128,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "compute_dtype": "float32",
        "scan_layers": False,
    }
    return ModelConfig(**defaults | sizes)


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def show(values: dict[str, float], digits: int = 2) -> str:
    """Formats a spread as median (min–max)."""
    return "{median:,.{d}f} ({min:,.{d}f}–{max:,.{d}f})".format(**values, d=digits)


def milliseconds(seconds: dict[str, float]) -> str:
    return show({name: 1e3 * value for name, value in seconds.items()}, 3)


def percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.1f} %"


def bounded(name: str, value: float, most: float = float("inf"), least: float = 0.0) -> dict:
    """Prints a value with its bound, and returns both."""
    bound = f"at most {most:g}" if most < float("inf") else f"at least {least:g}"
    is_met = least <= value <= most
    print(f"{name}: {value:.2f} ({bound}: {'met' if is_met else 'MISSED'})", flush=True)
    return {"name": name, "value": value, "bound": bound, "kept": is_met}


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence]) -> None:
    """Prints a table: the first column left-aligned, the others right-aligned, None as a dash."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=not i)
    for row in rows:
        table.add_row(*("–" if cell is None else str(cell) for cell in row))
    # Files and pipes have no width: do not cut the table there.
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)


def previous_results(name: str) -> list[dict]:
    """Returns the results in results/NAME.json with their dates, so that a run of some cases keeps those of
    the others."""
    file = RESULTS / f"{name}.json"
    record = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"results": [], "date": None}
    return [{"date": record["date"]} | result for result in record["results"]]


def today() -> str:
    return time.strftime("%Y-%m-%d")


def write_json(name: str | pathlib.Path, record: dict) -> pathlib.Path:
    """Writes date, hardware, versions and `record`, which may override them, to results/NAME.json.

    A name that ends in .json is a path. Returns the path.
    """
    path = user_path(name, "out") if str(name).endswith(".json") else RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "date": today(),
        "hardware": hardware(),
        "versions": versions(),
    } | record
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return path
