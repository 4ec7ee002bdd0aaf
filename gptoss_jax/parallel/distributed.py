"""Many processes: how they find each other, join, and end together. `lifelines.py` is what connects them."""

import contextlib
import functools
import itertools
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import jax
from jax._src import clusters, distributed

from gptoss_jax import startup
from gptoss_jax.config import require
from gptoss_jax.config.kernels import ENVIRONMENT, kernel_variable
from gptoss_jax.kernels import first_use, selection
from gptoss_jax.parallel.lifelines import COMING, LEAVING, SILENCE, Lifelines, connect, leave_at_once

# What a plain machine is told by; clusters are recognised without.
ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
BY_HAND = f"{ADDRESS} (HOST:PORT of process 0), {COUNT} and {INDEX}"
# JAX's own watch ends a process without a clear word: it comes after ours.
HEARTBEAT = 50
# Seconds in which all have to be started.
STARTING = 300


@contextlib.contextmanager
def joined(name: str) -> Iterator[None]:
    """Makes this process one of those of its job, if it is one of several; what `train.py` runs in.

    To be entered before anything touches a device. JAX's detection of Cloud TPU, SLURM, Open MPI and
    Kubernetes says who the processes are; elsewhere JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID do. A process that is alone, in a cluster or not, stays as it is: no network, no delay.

    Of several, only process 0 prints, errors aside. When one fails or is gone, all end at once, with exit
    code 1 or that of their own error, which is said once.

    Raises:
      ValueError: the environment names some of the processes, but not all that is needed.
      OSError: the processes cannot reach each other.
    """
    if not _several():
        yield
        return
    try:
        _join(name)
        with warnings.catch_warnings():
            if jax.process_index():
                warnings.simplefilter("ignore")
            yield
        finish()
    except BaseException as error:
        if _finished:
            raise
        # Not by `raise`: what runs at exit waits for the other processes.
        _end(name, error)


def exchange(value: Any) -> list[Any]:
    """The JSON-ready values that all processes gave, by their index: the same list in each.

    Every process has to call it, in the same order. Waits as long as it takes: no device and no time limit.
    """
    return [value] if _lifelines is None else _lifelines.exchange(value)


@functools.cache
def agree_on_kernels(setting: str) -> None:
    """Turns off, in all processes, the kernels that failed their check in one of them: all must compile the
    same programs. A process that is alone only runs the check. All processes must call it, with the same
    `model.kernels` setting.

    Raises ValueError if the processes have different values of GPTOSS_JAX_KERNELS.
    """
    with selection.using(setting):
        mine = kernel_variable(), sorted(selection.failed_kernels())
    variables, failed = zip(*exchange(mine), strict=True)
    for index, other in enumerate(variables):
        allowed = f"process 0 has {variables[0]!r}, and all processes must have the same value"
        require(other == variables[0], ENVIRONMENT, other, f"of process {index}; {allowed}")
        for kernel in sorted(set(failed[index]) - set(failed[0])):
            warnings.warn(f"kernel {kernel} is off: it failed its check in process {index}", stacklevel=2)
    first_use.turn_off(itertools.chain(*failed))


def check_joined() -> None:
    """Raises ValueError in one of several processes that were not brought together by `joined`."""
    require(
        jax.process_count() == 1 or _lifelines is not None,
        "jax.process_count()",
        jax.process_count(),
        "several processes train by train.py, or in `with gptoss_jax.parallel.distributed.joined(NAME)`",
    )


def finish() -> None:
    """Waits until all processes are done. From here on none minds that another one ends."""
    global _lifelines, _finished
    if _lifelines is not None:
        _lifelines.finish()
        _lifelines, _finished = None, True


def _several() -> bool:
    """Whether this process is one of several. Raises as `joined` does."""
    given = {name: os.environ.get(name) for name in (ADDRESS, COUNT, INDEX)}
    if given[COUNT] is not None or given[INDEX] is not None:
        return _several_by_hand(given)
    try:
        cluster = _cluster()
        count = 1 if cluster is None else cluster.get_process_count()
    except Exception as error:  # each cluster has its own: HTTP, Kubernetes, a variable that is no number
        raise OSError(
            f"the processes of this cluster cannot be told: {error}. Set {BY_HAND}, or {COUNT}=1 for this "
            "process alone"
        ) from error
    if cluster is None:
        require(given[ADDRESS] is None, ADDRESS, given[ADDRESS], f"needs {COUNT} and {INDEX} with it")
        size = os.environ.get("OMPI_COMM_WORLD_SIZE", "1")
        require(
            size == "1", "OMPI_COMM_WORLD_SIZE", size, f"JAX does not know this Open MPI; set {BY_HAND} too"
        )
    return count > 1


def _several_by_hand(given: dict[str, str | None]) -> bool:
    for name in (COUNT, INDEX):
        value = given[name]
        if name == INDEX and given[COUNT] == "1" and value is None:
            return False
        require(value is not None, name, value, f"must be set where one of {BY_HAND} is")
        require(value.isascii() and value.isdigit(), name, value, "must be a whole number")
    count, index = int(given[COUNT]), int(given[INDEX])
    require(count > 0, COUNT, count, "must be above 0")
    require(index < count, INDEX, index, f"must be below {COUNT}, {count}")
    if count == 1:
        return False
    address = given[ADDRESS]
    host, _, port = (address or "").rpartition(":")
    known = bool(host) and port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16
    require(known, ADDRESS, address, "must be HOST:PORT of process 0")
    return True


def _cluster() -> type[clusters.ClusterEnv] | None:
    """What JAX recognises, as `jax.distributed.initialize` would."""
    for cluster in clusters.ClusterEnv._cluster_types:
        # Most pods are nobody's part, and JAX would ask the API server about each.
        if cluster.__name__ == "K8sCluster":
            if "KUBERNETES_SERVICE_HOST" not in os.environ or "JOB_COMPLETION_INDEX" not in os.environ:
                continue
            import kubernetes  # noqa: F401 (JAX would take the pod for a machine of its own)
        if not cluster.opt_in_only_method and cluster.is_env_present():
            return cluster
    return None


def _join(name: str) -> None:
    global _lifelines
    # Its handler would take SIGTERM, which asks the loop to save.
    jax.config.update("jax_enable_preemption_service", False)
    named = {}
    if os.environ.get(COUNT) is not None:
        named = {"num_processes": int(os.environ[COUNT]), "process_id": int(os.environ[INDEX])}
        named |= {"cluster_detection_method": "deactivate"}
    _keep_stdout()
    # JAX would end the process itself, with a dump of its stack.
    late = threading.Timer(STARTING, _too_late, [name])
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            **named,
            initialization_timeout=STARTING + COMING,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=COMING,
        )
        late.cancel()
        index, count = jax.process_index(), jax.process_count()
        if index:
            # Closed by nobody: it is standard output until the process ends.
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        _lifelines = Lifelines(name, index, count, connect(index, count))
    except RuntimeError as error:
        raise OSError(f"the processes do not come together: {error}") from error


def _too_late(name: str) -> None:
    state = distributed.global_state
    startup.say(
        name,
        "error",
        f"after {STARTING} seconds the {state.num_processes} processes have not all come to "
        f"{state.coordinator_address}, where process 0 waits for them",
    )
    leave_at_once(1)


def _keep_stdout() -> None:
    """Keeps standard output for Python: gloo writes a line for each of its groups to the same descriptor."""
    sys.stdout.flush()
    with contextlib.suppress(OSError):  # where it is no file there is nothing to keep
        kept = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding=sys.stdout.encoding)
        kept.reconfigure(errors=sys.stdout.errors, line_buffering=sys.stdout.line_buffering)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        sys.stdout = kept


_lifelines: Lifelines | None = None
_finished = False


def _end(name: str, error: BaseException) -> None:
    """Ends this process because of an error of its own, and so all others."""
    if _lifelines is None:
        leave_at_once(_report(name, error))
    cause = error.__cause__ if isinstance(error, OSError) else error
    if isinstance(cause, jax.errors.JaxRuntimeError):
        # Most likely it is another process that is gone, and this one will be ended for that.
        _lifelines.wait_for_failure(SILENCE + LEAVING)
    text = f"{type(error).__name__}: {error}"
    first = _lifelines.fail(text)
    if first[0] == _lifelines.index:
        _lifelines.leave(_report(name, error))
    if first[1] != text:
        _lifelines.say(first)
        _lifelines.leave(1)
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stderr(nowhere):
        code = _report(name, error)
    _lifelines.leave(code)


def _report(name: str, error: BaseException) -> int:
    """Prints an error as `startup.run` does, and returns the exit code."""

    def again() -> None:
        raise error

    try:
        return startup.run(again, name)
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else 1
    except BaseException:
        traceback.print_exception(error)
        return 1
