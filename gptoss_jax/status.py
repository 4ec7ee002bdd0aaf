"""A line that says what a command is doing and for how long. Standard library only.

Only commands show it: `enable` turns it on. On a terminal it is redrawn in place and disappears at the end;
elsewhere, such as in a log file, a plain line is printed for what takes seconds, and again from time to time.
"""

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TextIO, TypeVar

from gptoss_jax.terminal import encodable, format_duration, format_si, has_colors, is_terminal, printable

Item = TypeVar("Item")
DELAY, REFRESH = 0.3, 0.2  # seconds until the line appears on a terminal, and between redraws
PLAIN_DELAY, PLAIN_INTERVAL = 1.5, 30.0  # the same elsewhere

_lock = threading.RLock()
_stack: list["Status"] = []  # the innermost is shown
_stream: Callable[[], TextIO] | None = None


def enable(stream: Callable[[], TextIO] | None) -> None:
    """Shows status lines on a stream; None shows none."""
    global _stream
    _stream = stream


def is_enabled() -> bool:
    return _stream is not None


class Status:
    """What is being done; see `status`."""

    def __init__(self, text: str) -> None:
        self._text, self._detail = text, ""
        self._began, self._done = time.monotonic(), threading.Event()
        self._next_plain, self._drawn = self._began + PLAIN_DELAY, ""

    def update(self, detail: str) -> None:
        """Sets the second half of the line, such as how much is done."""
        self._detail = detail

    def _line(self) -> str:
        parts = [self._text, self._detail, format_duration(time.monotonic() - self._began)]
        return printable(" · ".join(filter(None, parts))).replace("\n", " ")

    def run(self) -> None:
        """Redraws the line until the work is done."""
        if self._done.wait(DELAY):
            return
        while True:
            with _lock:
                if _stack and _stack[-1] is self and not self._done.is_set():
                    self._show()
            if self._done.wait(REFRESH):
                return

    def _show(self) -> None:
        file = _stream() if _stream is not None else None
        if file is None:
            return
        with contextlib.suppress(OSError, ValueError):  # the stream is closed, or its reader is gone
            if is_terminal(file):
                line = encodable(self._line(), file)[: shutil.get_terminal_size().columns - 1]
                if line == self._drawn:
                    return
                file.write(f"\r\x1b[2m{line}\x1b[0m\x1b[K" if has_colors(file) else f"\r{line}\x1b[K")
                self._drawn = line
            elif time.monotonic() >= self._next_plain:
                self._next_plain = time.monotonic() + PLAIN_INTERVAL
                file.write(encodable(self._line(), file) + "\n")
            file.flush()

    def erase(self) -> None:
        """Removes the line from the terminal; the next redraw shows it again."""
        if self._drawn and _stream is not None:
            with contextlib.suppress(OSError, ValueError):
                _stream().write("\r\x1b[K")
                _stream().flush()
        self._drawn = ""

    def finish(self) -> None:
        self._done.set()
        with _lock:
            self.erase()
            _stack.remove(self)


@contextlib.contextmanager
def status(text: str) -> Iterator[Status]:
    """Shows what the block does. A status inside it takes its place as long as it lasts."""
    shown = Status(text)
    with _lock:
        erase()
        _stack.append(shown)
    if _stream is not None:
        threading.Thread(target=shown.run, name="status", daemon=True).start()
    try:
        yield shown
    finally:
        shown.finish()


@contextlib.contextmanager
def download(text: str, hide_bars: Callable[[], object]) -> Iterator[None]:
    """Shows a status for a download whose client draws progress bars: on a terminal, only those."""
    if _stream is None:
        yield
    elif is_terminal(_stream()):
        silent = Status(text)
        with _lock:
            erase()
            _stack.append(silent)
        try:
            yield
        finally:
            silent.finish()
    else:
        hide_bars()
        with status(text):
            yield


def until_first(text: str, items: Iterable[Item]) -> Iterator[Item]:
    """Yields the items, with a status until the first one is there."""
    iterator = iter(items)
    with status(text):
        first = list(zip(range(1), iterator, strict=False))
    yield from (item for _, item in first)
    yield from iterator


def progress(done: int, total: int) -> None:
    """Says how many bytes of the current work are done."""
    with _lock:
        if _stack:
            _stack[-1].update(f"{format_si(done, 'B')} of {format_si(total, 'B')}")


def erase() -> None:
    """Clears the line on the terminal, so that something else can be printed."""
    with _lock:
        if _stack:
            _stack[-1].erase()
