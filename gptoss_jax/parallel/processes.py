"""Many processes: how they find each other, what they tell each other, and how they end together.

Process 0 holds a TCP connection to each of the others, its lifeline. Over it small values are exchanged
without a device, a process that fails says why, and the kernel closes it when a process is killed: so no
process waits for one that is gone.
"""

import collections
import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax._src import clusters, distributed
from jax.experimental import multihost_utils

from gptoss_jax import startup
from gptoss_jax.config import require

# What a plain machine is told by; clusters are recognised without.
ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
BY_HAND = f"{ADDRESS} (HOST:PORT of process 0), {COUNT} and {INDEX}"
# Seconds until a machine that went silent counts as gone; a process that ends is noticed at once.
SILENCE = 24
# JAX's own watch ends a process without a clear word: it comes after ours.
HEARTBEAT = 50
# Seconds for the others to leave first, to come when all have been started, and to fail in the same way.
LEAVING, COMING, ALIKE = 10, 60, 2
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


def check_joined() -> None:
    """Raises ValueError in one of several processes that were not brought together by `joined`."""
    require(
        jax.process_count() == 1 or _lifelines is not None,
        "jax.process_count()",
        jax.process_count(),
        "several processes train by train.py, or in `with gptoss_jax.parallel.processes.joined(NAME)`",
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
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        _lifelines = Lifelines(name, index, count, _connect(index, count))
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
    _leave(1)


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


def _connect(index: int, count: int) -> dict[int, socket.socket]:
    """Process 0: a connection to each other process, by index. The others: the one to process 0."""
    host = distributed.global_state.coordinator_address.rpartition(":")[0].strip("[]")
    if index:
        port, *password = multihost_utils.broadcast_one_to_all(np.zeros(5, np.int32)).tolist()
        try:
            line = socket.create_connection((host, port), timeout=COMING)
            line.sendall(_packed([index, password]))
        except OSError as error:
            raise OSError(
                f"process {index} of {count} cannot reach process 0 at {host}:{port} ({error}): the machines "
                "must let each other's ports through"
            ) from error
        return {0: _kept_alive(line)}
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    with socket.create_server(
        ("", 0), family=family, backlog=count, dualstack_ipv6=family == socket.AF_INET6
    ) as server:
        password = [secrets.randbits(31) for _ in range(4)]
        multihost_utils.broadcast_one_to_all(np.array([server.getsockname()[1], *password], np.int32))
        lines, until = {}, time.monotonic() + COMING
        while len(lines) < count - 1:
            server.settimeout(max(until - time.monotonic(), 0.01))
            try:
                line = server.accept()[0]
            except TimeoutError:
                missing = sorted(set(range(1, count)) - lines.keys())
                raise OSError(f"processes {missing} of {count} have not come to process 0") from None
            # Whoever is not one of us is sent away. Without a buffer: what follows the line is not for here.
            with contextlib.suppress(OSError, ValueError, TypeError):
                line.settimeout(COMING)
                other, said = json.loads(line.makefile("rb", buffering=0).readline(1 << 10))
                if said == password:
                    lines[other] = _kept_alive(line)
    return lines


def _kept_alive(line: socket.socket) -> socket.socket:
    """A connection that breaks when the other machine has been silent for `SILENCE` seconds."""
    line.settimeout(None)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    settings = {"IDLE": SILENCE // 2, "INTVL": SILENCE // 6, "CNT": 3}
    for setting, value in settings.items():
        # Not every system has all of them.
        if hasattr(socket, f"TCP_KEEP{setting}"):
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_KEEP{setting}"), value)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE * 1000)
    return line


def _packed(message: Any) -> bytes:
    return json.dumps(message).encode() + b"\n"


class Lifelines:
    """The connections of this process, and what came over them.

    Messages are lists: ["value", x] to process 0, ["values", [x, …]] from it; ["failed", text] to it, and
    from it ["stopped", index, text], the first failure of all; text is None for a process that is gone.
    """

    def __init__(self, name: str, index: int, count: int, lines: dict[int, socket.socket]):
        self._name, self.index, self.count, self._lines = name, index, count, lines
        self._changed, self._sending = threading.Condition(), threading.Lock()
        self._values = {other: collections.deque() for other in lines}
        self._left: set[int] = set()
        self._first: tuple[int, str | None] | None = None
        # Its main thread has failed; another one has, and this process is being ended for that; all are done.
        self._failing = self._ending = self._over = False
        for other, line in lines.items():
            threading.Thread(target=self._listen, args=(other, line), daemon=True).start()

    def exchange(self, value: Any, last: bool = False) -> list[Any]:
        """See `exchange`. After the `last` one nobody minds who ends."""
        if self.index:
            self._send(["value", value])
            self._wait(lambda: self._values[0])
            self._over = last
            return self._values[0].popleft()
        self._wait(lambda: all(self._values.values()))
        values = [value, *[self._values[other].popleft() for other in sorted(self._lines)]]
        self._over = last
        self._send(["values", values])
        return json.loads(json.dumps(values))  # as it arrives at the others

    def finish(self) -> None:
        """See `finish`."""
        self.exchange(None, last=True)

    def fail(self, text: str) -> tuple[int, str | None]:
        """Tells all that this process failed; the first failure of all: the index of its process, and its
        text."""
        with self._changed:
            self._failing, ending = True, self._ending
            self._changed.notify_all()
        if ending:
            self._wait(lambda: False)
        if self.index:
            self._send(["failed", text])
            self._wait(lambda: self._first, LEAVING)
        else:
            self._stop(0, text)
        return self._first or (self.index, text)

    def wait_for_failure(self, seconds: float) -> None:
        """Returns when another process is known to have failed, at the latest after so many seconds."""
        self._wait(lambda: self._first, seconds)

    def leave(self, code: int) -> None:
        """Ends this process; process 0, which the others lean on, as the last."""
        if not self.index:
            self._wait(lambda: len(self._left) == len(self._lines), LEAVING)
        _leave(code)

    def say(self, first: tuple[int, str | None]) -> None:
        """Prints why this process ends though it is in order itself."""
        index, text = first
        how = "is gone (killed, or its machine is)" if text is None else "has stopped with an error"
        startup.say(
            self._name,
            "error",
            f"process {index} of {self.count} {how}; start all again with the same line to go on from the "
            "last checkpoint",
        )

    def _send(self, message: Any) -> None:
        with self._sending:  # whole messages, whichever thread they come from
            for line in self._lines.values():
                with contextlib.suppress(OSError):  # whose end is gone is noticed by the thread that listens
                    line.sendall(_packed(message))

    def _wait(self, condition, seconds: float = float("inf")) -> None:
        until = time.monotonic() + seconds
        with self._changed:
            # In short pieces: a signal is handled between two of them.
            while not condition() and (left := until - time.monotonic()) > 0:
                self._changed.wait(min(left, 0.5))

    def _listen(self, other: int, line: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError):
            for received in line.makefile("rb"):
                kind, *content = json.loads(received)
                if kind == "failed":
                    self._stop(other, *content)
                elif kind == "stopped":
                    self._stop(*content)
                else:
                    with self._changed:
                        self._values[other].append(*content)
                        self._changed.notify_all()
        with self._changed:
            self._left.add(other)
            self._changed.notify_all()
        if not self._over:
            self._stop(other, None)

    def _stop(self, index: int, text: str | None) -> None:
        """The first failure of all is known: ends this process, unless its main thread is about to."""
        with self._changed:
            if self._first is not None:
                return
            self._first = (index, text)
            self._changed.notify_all()
        if not self.index:
            self._send(["stopped", index, text])
        if text is not None:
            # All may be about to fail alike, and then it is said once.
            self._wait(lambda: self._failing, ALIKE)
        with self._changed:
            self._ending = not self._failing
        if self._ending:
            self.say(self._first)
            if self.index:
                _leave(1)
            # Process 0 waits for the others to leave, and this thread has to hear of it.
            threading.Thread(target=self.leave, args=(1,), daemon=True).start()


_lifelines: Lifelines | None = None
_finished = False


def _end(name: str, error: BaseException) -> None:
    """Ends this process because of an error of its own, and so all others."""
    if _lifelines is None:
        _leave(_report(name, error))
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
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
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


def _leave(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
