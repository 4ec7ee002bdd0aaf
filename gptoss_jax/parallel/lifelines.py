"""Lifelines: the connections by which processes tell each other that they fail, and notice who is gone.

Process 0 holds a TCP connection to each of the others. Over it small values are exchanged without a device, a
process that fails says why, and the kernel closes it when a process is killed: so no process waits for one
that is gone.
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
from typing import Any

import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

from gptoss_jax import startup

# Seconds until a machine that went silent counts as gone; a process that ends is noticed at once.
SILENCE = 24
# Seconds for the others to leave first, to come when all have been started, and to fail in the same way.
LEAVING, COMING, ALIKE = 10, 60, 2


def connect(index: int, count: int) -> dict[int, socket.socket]:
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
        leave_at_once(code)

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
                leave_at_once(1)
            # Process 0 waits for the others to leave, and this thread has to hear of it.
            threading.Thread(target=self.leave, args=(1,), daemon=True).start()


def leave_at_once(code: int) -> None:
    """Ends this process without what runs at exit, which waits for the other processes."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
