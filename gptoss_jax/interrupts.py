"""Ctrl-C and SIGTERM in the process of a command. Standard library only.

Python runs a signal's handler only between bytecodes of the main thread: a call into C++, such as XLA's
compiler, may take minutes, and an exception that the handler raises in a callback of C++ code is lost or
taken for another error. So a signal ends the process at once, without an exception, except where a block says
what it needs: time to remove its files (`cleanup`), or to finish (`patient`).
"""

import contextlib
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

from gptoss_jax import status

INTERRUPTED, TERMINATED = 130, 143
STDERR = 2
# What happened, by exit code.
ENDINGS = {INTERRUPTED: "interrupted", TERMINATED: "terminated"}
CODES = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: TERMINATED}
CLEANUP_SECONDS = 3.0
HANDLER_SECONDS = 1.0  # until the main thread counts as busy in a call that does not return
FLUSH_SECONDS = 0.5


class Interrupts:
    """Handles SIGINT and SIGTERM for the rest of the process; `install` it before slow imports.

    A thread reads the signals from Python's wakeup file descriptor, so it learns of them even while the main
    thread is in C++ code.
    """

    current: "Interrupts | None" = None

    def __init__(self, name: str) -> None:
        self._name = name
        self.note = ""  # what a signal means for the user, printed last
        self.last_note = ""  # the note when the exception was raised
        self.folder: str | os.PathLike | None = None  # of `cleanup`
        self.cleans_up = self.is_unwinding = False
        self.advice: str | None = None  # of `patient`
        self._asked = False  # the advice has been printed
        self._handled, self._leaving = threading.Event(), threading.Lock()
        self._terminal = _terminal_state()
        self._terminals = [number for number in (1, STDERR) if _is_terminal(number)]

    def install(self) -> None:
        """Starts handling signals, except those that are ignored, as in a background job of a shell."""
        reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in CODES:
            if signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL):
                signal.signal(number, self._handle)
        self._report_ignored, sys.unraisablehook = sys.unraisablehook, self._ignored
        os.register_at_fork(after_in_child=_uninstall)
        Interrupts.current = self
        threading.Thread(target=self._watch, args=(reader,), name="interrupts", daemon=True).start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, CODES)  # blocked by `startup.keep_memory`

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._handled.set()
        if self.advice is None and not self.cleans_up:
            self.leave(number)
        if self.is_unwinding:
            return  # a second Ctrl-C must not interrupt the cleanup, which is short
        self.is_unwinding, self.last_note = self.cleans_up, self.note
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(TERMINATED)

    def _ignored(self, found: "sys.UnraisableHookArgs") -> None:
        """Repeats the signal whose exception was lost, such as in a callback of a weak reference."""
        if not issubclass(found.exc_type, (KeyboardInterrupt, SystemExit)):
            self._report_ignored(found)
            return
        self.is_unwinding = False
        number = signal.SIGINT if issubclass(found.exc_type, KeyboardInterrupt) else signal.SIGTERM
        threading.Timer(0.05, os.kill, (os.getpid(), number)).start()

    def acknowledge(self) -> None:
        """Says that the owner of another handler has reacted to its signal."""
        self._handled.set()

    def _watch(self, reader: socket.socket) -> None:
        while received := reader.recv(64):
            for number in CODES.keys() & set(received):
                self._heard(number)

    def _heard(self, number: int) -> None:
        is_ours = signal.getsignal(number) == self._handle
        if self.advice is None and not self.cleans_up:
            if is_ours:
                self.leave(number)
            return
        if self.advice is None:
            # The exception ends the process, or it was lost.
            time.sleep(CLEANUP_SECONDS)
            if self.folder is not None:
                shutil.rmtree(self.folder, ignore_errors=True)
            self.leave(number)
        if self._handled.wait(HANDLER_SECONDS):
            self._handled.clear()
            self._asked = not is_ours  # its owner has printed something similar
        elif is_ours and number == signal.SIGTERM:
            self.leave(number)
        elif not self._asked:
            self._asked = True
            status.erase()
            _write(f"\n{self._name}: {self.advice}\n")
        elif number == signal.SIGINT:
            self.leave(number)

    def leave(self, number: int) -> NoReturn:
        """Ends the process: the terminal as it was, one line that says what happened, the exit code."""
        if not self._leaving.acquire(blocking=False):
            time.sleep(60)  # another thread is ending the process

        def tidy() -> None:
            status.erase()
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(AttributeError, OSError, ValueError):
                    stream.flush()

        # The interrupted thread may hold a lock of the streams, or their reader may be slow.
        tidying = threading.Thread(target=tidy, daemon=True)
        tidying.start()
        tidying.join(FLUSH_SECONDS)
        _restore_terminal(self._terminal, self._terminals)
        code = CODES[signal.Signals(number)]
        _write(ending(self._name, code, self.note, STDERR in self._terminals))
        os._exit(code)


def ending(name: str, code: int, note: object, on_terminal: bool) -> str:
    """Returns the last line of a process that a signal ends: `NAME: interrupted: NOTE`."""
    # A terminal shows ^C, with the cursor behind it.
    line = "\n" if code == INTERRUPTED and on_terminal else ""
    return f"{line}{name}: {ENDINGS[code]}{f': {note}' if str(note) else ''}\n"


@contextlib.contextmanager
def patient(advice: str) -> Iterator[None]:
    """Lets a long call finish after Ctrl-C instead of ending the process.

    KeyboardInterrupt is raised when the call returns; until then `advice` says what happens next. A second
    Ctrl-C ends the process.
    """
    with _settings(advice=advice, cleans_up=False):
        yield


@contextlib.contextmanager
def cleanup(folder: str | os.PathLike | None = None) -> Iterator[None]:
    """Raises KeyboardInterrupt, or SystemExit for SIGTERM, in a block that has files to remove.

    The process ends a few seconds later even if the block is in a call that does not return; then `folder` is
    removed.
    """
    with _settings(cleans_up=True, advice=None, folder=folder):
        yield


@contextlib.contextmanager
def explain(note: str) -> Iterator[None]:
    """Says what it means for the user if a signal ends the process during the block."""
    with _settings(note=note):
        yield


@contextlib.contextmanager
def _settings(**values: Any) -> Iterator[None]:
    interrupts = Interrupts.current
    if interrupts is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {name: getattr(interrupts, name) for name in values}
    vars(interrupts).update(values)
    try:
        yield
    finally:
        vars(interrupts).update(before)


def acknowledge() -> None:
    """For the owner of a handler that takes the place of this module's: it has reacted to the signal."""
    if Interrupts.current is not None:
        Interrupts.current.acknowledge()


def leave_now(number: int) -> None:
    """Ends the process if it is that of a command; else raises KeyboardInterrupt."""
    if Interrupts.current is not None:
        Interrupts.current.leave(number)
    raise KeyboardInterrupt


def _uninstall() -> None:
    """In a forked process: signals have their default effect, and do not reach the thread of the parent."""
    Interrupts.current = None
    signal.set_wakeup_fd(-1)
    for number in CODES:
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)


def _write(text: str) -> None:
    """Writes to stderr without its Python object, which the interrupted thread may be in the middle of."""
    with contextlib.suppress(OSError):
        os.write(STDERR, text.encode("utf-8", "replace"))


def _terminal_state() -> list[Any] | None:
    """Returns the settings of the terminal, which line editing changes; None without one."""
    # The errors of termios are not OSErrors.
    with contextlib.suppress(Exception):
        import termios

        return termios.tcgetattr(sys.stdin.fileno())
    return None


def _is_terminal(number: int) -> bool:
    """Like `terminal.is_terminal`, for a file descriptor."""
    return os.isatty(number) and os.environ.get("TERM") not in ("dumb", "unknown")


def _restore_terminal(settings: list[Any] | None, terminals: list[int]) -> None:
    """Undoes line editing, and shows the cursor, which a progress bar may have hidden."""
    if settings is not None:
        import termios

        # In the background, the call would stop the process.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
        with contextlib.suppress(Exception):
            termios.tcsetattr(sys.stdin.fileno(), termios.TCSANOW, settings)
    for number in terminals[:1]:
        with contextlib.suppress(OSError):
            os.write(number, b"\x1b[?25h")
