"""Multi-process runs with `jax.distributed`: initialization, host-value collectives, and failures.

JAX's coordination service, hosted by process 0, terminates all other processes when one dies: immediately if
it is process 0, otherwise after missing heartbeats. Collectives on CPU notice a closed connection earlier.
"""

import contextlib
import functools
import itertools
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from gptoss_jax import startup
from gptoss_jax.config import require
from gptoss_jax.config.kernels import ENVIRONMENT, kernel_variable
from gptoss_jax.interrupts import TERMINATED
from gptoss_jax.kernels import selection

# Environment variables for jobs without a launcher that JAX detects.
ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
BY_HAND = f"{ADDRESS} (HOST:PORT of process 0), {COUNT} and {INDEX}"
# Seconds without a heartbeat after which a process is considered dead.
HEARTBEAT_TIMEOUT = 30
# Seconds that process 0 stays alive after an error, so that other processes can report the same error.
EXIT_GRACE = 5
# Practically infinite: a barrier waits for the slowest process, for example for tokenization.
BARRIER_TIMEOUT = 30 * 24 * 3600
# Substrings of errors that a collective or a barrier raises because another process is gone.
PEER_FAILURE = ("Gloo", "Barrier failed", "heartbeat", "coordination service")
# Each barrier needs a unique name.
_barriers = itertools.count()


@contextlib.contextmanager
def distributed_session(name: str) -> Iterator[None]:
    """Connects the processes of a job, and terminates all of them if this one fails; no-op for one process.

    Enter it before anything uses a device. JAX detects the processes of Cloud TPU, SLURM, Open MPI and
    Kubernetes; elsewhere, set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. Only process 0
    prints, except for errors. After one process fails or dies, the others exit with a nonzero code within
    about `HEARTBEAT_TIMEOUT`.

    Args:
      name: name of the command, for error messages.

    Raises:
      ValueError: the environment variables are incomplete or invalid.
      OSError: the processes cannot reach each other.
    """
    if not _initialize():
        yield
        return
    stop = None
    try:
        with warnings.catch_warnings():
            _silence_output()
            try:
                yield
            except SystemExit as error:
                # After a signal, raised in all processes. Rich raises another in one whose output is closed.
                if error.code != TERMINATED:
                    raise
                stop = error
        barrier()
    except BaseException as error:
        _exit(name, error)
    jax.distributed.shutdown()
    if stop is not None:
        raise stop


def allgather_host(value: Any) -> list[Any]:
    """All-gathers JSON-serializable values, ordered by process index. All processes must call it."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(data.size))
    # Padded to a power of two, so that few sizes are compiled.
    padded = np.zeros(1 << int(sizes.max() - 1).bit_length(), np.uint8)
    padded[: data.size] = data
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def barrier() -> None:
    """Waits until all processes have called it, without using a device."""
    if jax.process_count() > 1:
        from orbax.checkpoint import multihost

        everyone = set(range(jax.process_count()))
        name = f"gptoss_jax.barrier.{next(_barriers)}"
        multihost.sync_global_processes(name, processes=everyone, timeout=BARRIER_TIMEOUT)


def stop_requested(step: int) -> bool:
    """Returns True, for the same step in all processes, after one of them has received SIGTERM.

    All processes must call it before every step. `jax.distributed` handles the signal once initialized.
    """
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)


@functools.cache
def agree_on_kernels(setting: str) -> None:
    """Turns off kernels in all processes if their check failed in any, so that all compile the same programs.

    With one process, only runs the check. All processes must call it, with the same `model.kernels` setting.

    Raises ValueError if the processes have different values of GPTOSS_JAX_KERNELS.
    """
    with selection.using(setting):
        mine = kernel_variable(), sorted(selection.failed_kernels())
    variables, failed = zip(*allgather_host(mine), strict=True)
    for index, other in enumerate(variables):
        allowed = f"process 0 has {variables[0]!r}, and all processes must have the same value"
        require(other == variables[0], ENVIRONMENT, other, f"of process {index}; {allowed}")
        for kernel in sorted(set(failed[index]) - set(failed[0])):
            warnings.warn(f"kernel {kernel} is off: it failed its check in process {index}", stacklevel=2)
    selection.turn_off(itertools.chain(*failed))


def _initialize() -> bool:
    """Initializes `jax.distributed` if there are several processes; returns False if there is only one."""
    arguments, launcher = _explicit_processes(), _launcher()
    if arguments is None and launcher is None:
        address = os.environ.get(ADDRESS)
        require(address is None, ADDRESS, address, f"requires {COUNT} and {INDEX}")
        return False
    if arguments is not None and arguments["num_processes"] == 1:
        return False
    try:
        jax.distributed.initialize(
            **(arguments or {}),
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
            shutdown_timeout_seconds=HEARTBEAT_TIMEOUT,
        )
    except Exception as error:  # depends on the launcher: HTTP, Kubernetes, a variable that is not a number
        if launcher == "Cloud TPU" and isinstance(error, ValueError):
            return False  # a TPU machine outside of a cluster
        raise OSError(
            f"cannot connect to the processes of {launcher or 'the environment'}: {error}. Set {BY_HAND}, "
            f"or {COUNT}=1 to run a single process"
        ) from error
    return True


def _explicit_processes() -> dict[str, Any] | None:
    """Returns the arguments of `jax.distributed.initialize` from environment variables, or None if unset."""
    count, index, address = (os.environ.get(name) for name in (COUNT, INDEX, ADDRESS))
    if count is None and index is None:
        return None
    index = "0" if count == "1" and index is None else index
    numbers = []
    for name, value in ((COUNT, count), (INDEX, index)):
        require(value is not None, name, value, f"must be set together with the others of {BY_HAND}")
        text = value or ""
        require(text.isascii() and text.isdigit(), name, value, "must be an integer of at least 0")
        numbers.append(int(text))
    num_processes, process_id = numbers
    require(num_processes > 0, COUNT, num_processes, "must be above 0")
    require(process_id < num_processes, INDEX, process_id, f"must be below {COUNT}, {count}")
    if count != "1":
        host, _, port = (address or "").rpartition(":")
        is_valid = host != "" and port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16
        require(is_valid, ADDRESS, address, "must be HOST:PORT of process 0")
    named = {"coordinator_address": address, "num_processes": num_processes, "process_id": process_id}
    return named | {"cluster_detection_method": "deactivate"}


def _launcher() -> str | None:
    """Returns the name of a launcher that `jax.distributed` supports and that started several processes.

    A single task, such as `mpirun -n 1`, is not initialized, because JAX would restrict it to one GPU.
    """
    if "SLURM_STEP_NODELIST" in os.environ and os.environ.get("SLURM_NTASKS", "1") != "1":
        return "SLURM"
    if os.environ.get("OMPI_COMM_WORLD_SIZE", "1") != "1":
        return "Open MPI"
    if "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" in os.environ:
        return "Kubernetes"
    return "Cloud TPU" if startup.may_have_tpu() else None


def _silence_output() -> None:
    """Silences stdout, except for Python's output in process 0: gloo writes to the same file descriptor."""
    sys.stdout.flush()
    with contextlib.suppress(OSError):  # not backed by a file
        stdout = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding=sys.stdout.encoding)
        stdout.reconfigure(errors=sys.stdout.errors, line_buffering=bool(sys.stdout.line_buffering))
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())
        os.close(devnull)
        sys.stdout = stdout
    if jax.process_index() > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (open until the process ends)
        warnings.simplefilter("ignore")


def _exit(name: str, error: BaseException) -> None:
    """Reports an error and exits without running exit handlers, which would wait for the other processes."""
    try:
        index, count = jax.process_index(), jax.process_count()
    except RuntimeError:  # no backend
        index, count = 0, 1
    if any(word in str(error) for word in PEER_FAILURE):
        advice = "check that process's output, and restart all processes to resume from the last checkpoint"
        lost = f"process {index} of {count} lost contact with another process, which failed or was killed"
        startup.say(name, "error", f"{lost}; {advice} ({str(error).splitlines()[0]})")
        code = 1
    else:
        try:
            code = startup.report(error, name if index == 0 else f"{name}: process {index} of {count}")
        except BaseException:
            traceback.print_exception(error)
            code = 1
    if index == 0:
        time.sleep(EXIT_GRACE)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
