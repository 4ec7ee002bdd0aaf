"""The check of all kernels at their first use on a GPU or TPU, and the record of what it found.

The record is a file for each machine, device kind, version of JAX and of the driver, and source of the
kernels, so that each combination is checked once. It names the kernel whose check is running, and a lock is
held meanwhile: a name that is found while the lock is free is that of a kernel that ended its process.
"""

import contextlib
import fcntl
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
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from gptoss_jax.config.base import write_json
from gptoss_jax.config.kernels import KERNELS
from gptoss_jax.config.paths import cache_folder

if TYPE_CHECKING:
    from gptoss_jax.kernels.check import Case, Result

ENDED_THE_PROCESS = "failed (its check ended the process)"
_lock = threading.RLock()
# Kernels that failed in other processes of this run.
_failed_elsewhere: set[str] = set()

# The checked kernels, each with what is wrong with it, empty if nothing is.
Problems = dict[str, str]


def failed_kernels(backend: str) -> frozenset[str]:
    """The kernels that failed their check on this machine; checks them first if no record says so.

    Empty for a backend that is not this process's own, as when a program is compiled for other devices. Warns
    of each failed kernel, once in a process. May be called while JAX traces.
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
    path = record_path(backend)
    with _exclusive(path):
        problems = _read(path)
        if any(backend in backends and kernel not in problems for kernel, backends in KERNELS.items()):
            began, results = time.monotonic(), []
            _say(f"checking the kernels on {_device()}, once")
            # In another thread: the caller's may be tracing a program.
            _in_thread(lambda: _check(backend, path, problems, lambda case: None, results.append))
            right = sum(r.status == "ok" for r in results)
            _say(f"{right} of {len(results)} checks passed in {time.monotonic() - began:.0f} s")
            for r in results:
                if r.status == "unchecked":
                    warnings.warn(f"kernel {r.kernel} could not be checked: {r.detail}", stacklevel=2)
    failed = {kernel: problem for kernel, problem in problems.items() if problem}
    for kernel, problem in failed.items():
        warnings.warn(
            f"kernel {kernel} is off on this {backend}, plain XLA replaces it: {problem}; `gptoss check` "
            "checks it again",
            stacklevel=2,
        )
    return frozenset(failed)


def check_again(backend: str, announce: Callable[["Case"], None], report: Callable[["Result"], None]) -> None:
    """Checks all kernels of a backend whatever the record says, and writes the record.

    A kernel whose check has ended an earlier process is reported as failed and not run again.

    Args:
      announce: gets each case before it runs.
      report: gets each result as it comes.

    Raises OSError when a kernel leaves the device unusable for this process.
    """
    from gptoss_jax.kernels.check import Result

    path = record_path(backend)
    with _exclusive(path):
        problems = {kernel: text for kernel, text in _read(path).items() if text == ENDED_THE_PROCESS}
        for kernel in problems:
            detail = f"its check ended an earlier process; remove {path} to run it again"
            report(Result(kernel, "", "", "failed", detail))
        _check(backend, path, problems, announce, report)


def _check(
    backend: str,
    path: pathlib.Path,
    problems: Problems,
    announce: Callable[["Case"], None],
    report: Callable[["Result"], None],
) -> None:
    """Checks the kernels that `problems` does not have, adds them to it, and writes the record."""
    from gptoss_jax.kernels import check  # imports every kernel

    for kernel, backends in KERNELS.items():
        if backend not in backends or kernel in problems:
            continue
        results = []
        _write(path, problems, running=kernel)
        try:
            for case in check.cases(backend):
                if case.kernel == kernel:
                    announce(case)
                    results.append(check.check_case(case, backend))
                    report(results[-1])
        finally:
            # An exception, such as Ctrl-C, says nothing about the kernel.
            _write(path, problems)
        if any(r.status == "unchecked" for r in results):
            continue
        found = [f"{r.status} ({r.detail})" for r in results if r.status in ("wrong", "failed")]
        problems[kernel] = found[0] if found else ""
        _write(path, problems)
        if found and not _device_works():
            raise OSError(
                f"kernel {kernel} left the device unusable: {found[0]}. It is now off on this machine. Run "
                "the command again"
            )


def _say(line: str) -> None:
    print(f"gptoss_jax: {line}", file=sys.stderr, flush=True)


def _in_thread(function: Callable[[], None]) -> None:
    raised = []

    def target() -> None:
        try:
            function()
        except BaseException as error:  # raised again below, in the caller's thread
            raised.append(error)

    # A daemon, so that Ctrl-C ends the process while a kernel hangs.
    thread = threading.Thread(target=target, name="kernel-check", daemon=True)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


def _device_works() -> bool:
    """Returns True if the device still computes: after an illegal memory access a GPU refuses all work."""
    try:
        return float(jnp.sum(jnp.ones(8))) == 8
    except Exception:
        return False


@functools.cache
def _device() -> str:
    from gptoss_jax.kernels import check

    return check.device_name()


def record_path(backend: str) -> pathlib.Path:
    """The file that keeps what the check of a backend's kernels found."""
    sources = sorted(pathlib.Path(__file__).parent.rglob("*.py"))
    parts = [platform.node().encode(), _device().encode(), *(source.read_bytes() for source in sources)]
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    return cache_folder("kernel-check") / f"{backend}-{digest}.json"


@contextlib.contextmanager
def _exclusive(path: pathlib.Path) -> Iterator[None]:
    """Holds the lock of a record. Other processes of the machine wait, and then read what was found."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a file system without locks
            file = stack.enter_context(open(path.with_suffix(".lock"), "w", encoding="utf-8"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read(path: pathlib.Path) -> Problems:
    """Reads a record; a missing or damaged one is empty."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        kernels, running = record["kernels"].items(), record["running"]
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return {}
    problems = {kernel: str(problem) for kernel, problem in kernels if kernel in KERNELS}
    return problems | ({running: ENDED_THE_PROCESS} if running in KERNELS else {})


def _write(path: pathlib.Path, problems: Problems, running: str | None = None) -> None:
    """Writes a record whole. If it cannot be written, the next process checks again."""
    temporary = path.with_suffix(f".{os.getpid()}")
    with contextlib.suppress(OSError):
        write_json(temporary, {"kernels": problems, "running": running})
        os.replace(temporary, path)
