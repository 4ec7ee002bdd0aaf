"""Selects between a hand-written kernel and its plain XLA equivalent.

A kernel is turned off by the setting `model.kernels`, the environment variable GPTOSS_JAX_KERNELS or, on GPU
and TPU, a failed check. All three are read when a program is traced.

On GPU and TPU, all kernels are checked on first use. The results are recorded in one file per machine, device
kind, JAX version, driver version, and source code of the kernels. While a kernel is checked, the record
contains its name and is locked: a name in an unlocked record means that the check crashed its process.
"""

import concurrent.futures
import contextlib
import contextvars
import fcntl
import functools
import hashlib
import json
import os
import pathlib
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from gptoss_jax.config.base import require, write_json
from gptoss_jax.config.kernels import ENVIRONMENT, KERNELS, kernel_variable, plain_kernels
from gptoss_jax.config.paths import cache_folder
from gptoss_jax.kernels import backend

if TYPE_CHECKING:
    from gptoss_jax.kernels.check import Case, Result

CHECK_CRASHED = "failed (its check crashed the process)"
_setting = contextvars.ContextVar("kernels", default="auto")
_lock = threading.RLock()
# Kernels that failed in other processes of this run.
_failed_elsewhere: set[str] = set()

# Checked kernel -> its problem, or "" if it passed.
Problems = dict[str, str]


@contextlib.contextmanager
def using(setting: str) -> Iterator[None]:
    """Applies a `model.kernels` setting to everything traced inside the context."""
    token = _setting.set(setting)
    try:
        yield
    finally:
        _setting.reset(token)


def is_enabled(kernel: str) -> bool:
    """Returns True if a kernel of `config.kernels.KERNELS` exists for the backend and is not turned off."""
    if backend.platform() not in KERNELS[kernel]:
        return False
    off = plain_kernels(_setting.get(), "model.kernels") | plain_kernels(kernel_variable(), ENVIRONMENT)
    return kernel not in off and kernel not in failed_kernels()


def failed_kernels() -> frozenset[str]:
    """Returns the kernels that failed their check on this machine; runs the check if there is no record.

    Empty on CPU, if the settings skip the check or use no kernels, and when compiling for devices that are
    not attached. Warns about each failed kernel once per process. May be called during tracing.

    Raises ValueError if a setting is "required" and a kernel that is not turned off failed.
    """
    here = backend.platform()
    setting, variable = _setting.get(), kernel_variable()
    is_skipped = {"unchecked", "plain"} & {setting, variable}
    if here == "cpu" or here != jax.default_backend() or is_skipped:
        return frozenset()
    with _lock:
        failed = _failed_here(here) | _failed_elsewhere
    if "required" in (setting, variable):
        off = plain_kernels(setting, "model.kernels") | plain_kernels(variable, ENVIRONMENT)
        names = ",".join(sorted(failed - off))
        field = "model.kernels" if setting == "required" else ENVIRONMENT
        allowed = (
            f"{names} failed on this {here}; `gptoss check` shows why, and 'plain:{names}' uses plain XLA"
        )
        require(not names, field, "required", allowed)
    return failed


def turn_off(kernels: Iterable[str]) -> None:
    """Marks kernels as failed, because all processes of a run must compile the same programs."""
    _failed_elsewhere.update(kernels)


@functools.cache
def _failed_here(platform: str) -> frozenset[str]:
    began = time.monotonic()
    results: list[Result] = []

    def announce(case: "Case") -> None:
        if not results:
            _say(f"checking the kernels on {backend.describe_device()}, once")

    # In a separate thread, because the caller may be tracing a program.
    problems = _in_thread(lambda: check_kernels(platform, announce, results.append))
    if results:
        passed = sum(result.status == "ok" for result in results)
        _say(f"{passed} of {len(results)} checks passed in {time.monotonic() - began:.0f} s")
    for result in results:
        if result.status == "unchecked":
            warnings.warn(f"kernel {result.kernel} could not be checked: {result.detail}", stacklevel=2)
    for kernel, problem in problems.items():
        if problem:
            text = f"kernel {kernel} is off on this {platform}, using plain XLA instead: {problem}"
            warnings.warn(f"{text}; `gptoss check` checks it again", stacklevel=2)
    return frozenset(kernel for kernel, problem in problems.items() if problem)


def check_kernels(
    platform: str, announce: Callable[["Case"], None], report: Callable[["Result"], None], again: bool = False
) -> Problems:
    """Checks the kernels of a backend that are not in the record, and adds the results to it.

    Args:
      announce: called with each case before it runs.
      report: called with each result.
      again: checks all kernels, ignoring the record. A kernel that crashed an earlier process is reported as
        failed without running it.

    Raises OSError if a kernel leaves the device unusable for this process.
    """
    path = record_path(platform)
    with _exclusive(path):
        problems = _read(path)
        if again:
            problems = {kernel: text for kernel, text in problems.items() if text == CHECK_CRASHED}
        pending = [
            name for name, platforms in KERNELS.items() if platform in platforms and name not in problems
        ]
        if pending or again:
            from gptoss_jax.kernels import check  # imports every kernel
        for kernel in problems if again else ():
            detail = f"its check crashed an earlier process; remove {path} to run it again"
            report(check.Result(kernel, "", "", "failed", detail))
        for kernel in pending:
            results: list[Result] = []
            _write(path, problems, running=kernel)
            try:
                for case in check.cases(platform):
                    if case.kernel == kernel:
                        announce(case)
                        results.append(check.check_case(case, platform))
                        report(results[-1])
            finally:
                # An exception such as Ctrl-C says nothing about the kernel.
                _write(path, problems)
            if any(result.status == "unchecked" for result in results):
                continue
            found = [f"{r.status} ({r.detail})" for r in results if r.status in ("wrong", "failed")]
            problems[kernel] = found[0] if found else ""
            _write(path, problems)
            if found and not _device_works():
                raise OSError(
                    f"kernel {kernel} left the device unusable: {found[0]}. It is now off on this machine. "
                    "Run the command again"
                )
    return problems


def _say(line: str) -> None:
    print(f"gptoss_jax: {line}", file=sys.stderr, flush=True)


def _in_thread(function: Callable[[], Problems]) -> Problems:
    done: concurrent.futures.Future[Problems] = concurrent.futures.Future()

    def run() -> None:
        try:
            done.set_result(function())
        except BaseException as error:  # raised again in the caller's thread
            done.set_exception(error)

    # A daemon thread, so that Ctrl-C ends the process even if a kernel hangs.
    threading.Thread(target=run, name="kernel-check", daemon=True).start()
    return done.result()


def _device_works() -> bool:
    """Returns True if the device still works; after an illegal memory access, a GPU rejects all work."""
    try:
        return float(jnp.sum(jnp.ones(8))) == 8
    except Exception:
        return False


def record_path(platform: str) -> pathlib.Path:
    """Returns the file that records the check results of a backend's kernels."""
    sources = sorted(pathlib.Path(__file__).parent.rglob("*.py"))
    machine = f"{socket.gethostname()}, {backend.describe_device()}"
    parts = [machine.encode(), *(source.read_bytes() for source in sources)]
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    return cache_folder("kernel-check") / f"{platform}-{digest}.json"


@contextlib.contextmanager
def _exclusive(path: pathlib.Path) -> Iterator[None]:
    """Locks a record. Other processes on the machine wait, and then read the record."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # file systems without locks
            file = stack.enter_context(open(path.with_suffix(".lock"), "w", encoding="utf-8"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read(path: pathlib.Path) -> Problems:
    """Reads a record; a missing or corrupt one is treated as empty."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        kernels, running = record["kernels"].items(), record["running"]
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return {}
    problems = {kernel: str(problem) for kernel, problem in kernels if kernel in KERNELS}
    return problems | ({running: CHECK_CRASHED} if running in KERNELS else {})


def _write(path: pathlib.Path, problems: Problems, running: str | None = None) -> None:
    """Replaces a record atomically. If it cannot be written, the next process repeats the check."""
    temporary = path.with_suffix(f".{os.getpid()}")
    with contextlib.suppress(OSError):
        write_json(temporary, {"kernels": problems, "running": running})
        os.replace(temporary, path)
