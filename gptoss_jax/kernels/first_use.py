"""The check of all kernels at their first use on a GPU or TPU, and the record of what it found.

The record is a file for each machine, device kind, version of JAX and of the driver, and source of the
kernels, so that each combination is checked once. It names the kernel whose check is under way: a kernel that
ends the process is found failed by the next one.
"""

import contextlib
import functools
import hashlib
import json
import os
import pathlib
import platform
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from gptoss_jax.config.kernels import KERNELS
from gptoss_jax.config.paths import cache_folder

_lock = threading.RLock()
# Kernels that failed in other processes of this run.
_failed_elsewhere: set[str] = set()


def failed_kernels(backend: str) -> frozenset[str]:
    """The kernels that failed their check on this machine; checks them first if no record says so.

    Empty for a backend that is not this process's own, as when a program is compiled for other devices. What
    failed is said as a warning, once in a process. May be called while JAX traces.
    """
    if backend == "cpu" or backend != jax.default_backend():
        return frozenset()
    with _lock:
        return _failed_kernels(backend) | _failed_elsewhere


def turn_off(kernels: Iterable[str]) -> None:
    """Counts kernels as failed: all processes of a run must compile the same programs."""
    _failed_elsewhere.update(kernels)


@functools.cache
def _failed_kernels(backend: str) -> frozenset[str]:
    record = _read(_record_path(backend))
    if not record["done"]:
        began = time.monotonic()
        print(f"gptoss_jax: checking kernels on {_device()}, once", file=sys.stderr, flush=True)
        # In a thread: JAX's tracing state, which may be that of the caller's program, belongs to a thread.
        _in_thread(lambda: check_and_record(backend, record))
        seconds = time.monotonic() - began
        count = sum(not problem for problem in record["kernels"].values())
        print(f"gptoss_jax: {count} kernels ok, {seconds:.0f} s", file=sys.stderr, flush=True)
    failed = {kernel: problem for kernel, problem in record["kernels"].items() if problem}
    for kernel, problem in failed.items():
        warnings.warn(
            f"kernel {kernel} is off on this {backend}, plain XLA does its work: {problem}; `gptoss check` "
            "checks again",
            stacklevel=2,
        )
    return frozenset(failed)


def check_and_record(
    backend: str, record: dict[str, Any] | None = None, report: Callable[[Any], None] = lambda result: None
) -> dict[str, Any]:
    """Checks the backend's kernels and writes the record.

    Args:
      record: an unfinished record, whose kernels are not checked again; None checks all.
      report: gets each `check.Result` as it comes.

    Raises OSError when a kernel has broken the device for this process.
    """
    from gptoss_jax.kernels import check  # imports every kernel

    record = {"done": False, "kernels": {}} if record is None else record
    path = _record_path(backend)
    for kernel, backends in KERNELS.items():
        if backend not in backends or kernel in record["kernels"]:
            continue
        _write(path, record | {"running": kernel, "pid": os.getpid()})
        results = []
        for result in check.check_kernels(backend, frozenset([kernel])):
            report(result)
            results.append(result)
        problems = [f"{r.status} ({r.detail})" for r in results if r.status in ("wrong", "failed")]
        record["kernels"][kernel] = problems[0] if problems else ""
        if problems and not _device_works():
            _write(path, record)
            raise OSError(
                f"kernel {kernel} broke the device for this process ({problems[0]}). It is now off on this "
                "machine: start again"
            )
    record["done"] = True
    _write(path, record)
    return record


def _in_thread(function: Callable[[], Any]) -> None:
    raised = []

    def target() -> None:
        try:
            function()
        except BaseException as error:  # raised again below, in the caller's thread
            raised.append(error)

    thread = threading.Thread(target=target, name="kernel-check")
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


def _device_works() -> bool:
    """Whether the device still computes: after an illegal memory access a GPU refuses all work."""
    try:
        return float(jnp.sum(jnp.ones(8))) == 8
    except Exception:
        return False


@functools.cache
def _device() -> str:
    from gptoss_jax.kernels import check

    return check.device_name()


def _record_path(backend: str) -> pathlib.Path:
    sources = sorted(pathlib.Path(__file__).parent.rglob("*.py"))
    parts = [platform.node().encode(), _device().encode(), *(source.read_bytes() for source in sources)]
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    return cache_folder("native") / f"kernels-{backend}-{digest}.json"


def _read(path: pathlib.Path) -> dict[str, Any]:
    """A record; an empty one where there is none that can be read."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        record = {name: record.get(name) for name in ("done", "kernels", "running", "pid")}
        kernels = {kernel: str(problem) for kernel, problem in record["kernels"].items() if kernel in KERNELS}
    except (OSError, ValueError, AttributeError):
        return {"done": False, "kernels": {}}
    if record["running"] in KERNELS and not _is_alive(record["pid"]):
        kernels[record["running"]] = "failed (its check ended the process)"
    return {"done": bool(record["done"]), "kernels": kernels}


def _is_alive(pid: Any) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, TypeError, OverflowError):
        return False
    return True


def _write(path: pathlib.Path, record: dict[str, Any]) -> None:
    """Writes a record whole. Without a place for it, the next process checks again."""
    temporary = path.with_suffix(f".{os.getpid()}")
    with contextlib.suppress(OSError):
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)
