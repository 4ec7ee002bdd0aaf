"""The status line."""

import io
import re
import time

import pytest

from gptoss_jax import status


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.fixture
def shown(monkeypatch):
    """Makes statuses appear at once on a terminal, and returns it."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    for name in ("DELAY", "REFRESH", "PLAIN_DELAY"):
        monkeypatch.setattr(status, name, 0.01)
    terminal = Terminal()
    status.enable(lambda: terminal)
    yield terminal
    status.enable(None)


def wait_for(stream, text):
    deadline = time.monotonic() + 20
    while text not in stream.getvalue() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert text in stream.getvalue()


def test_a_status_is_drawn_and_erased(shown):
    with status.status("loading x\x1b[2J"):
        status.progress(1_000_000, 2_000_000)
        wait_for(shown, "loading x\\x1b[2J · 1.00 MB")
    assert shown.getvalue().endswith("\r\x1b[K")
    lines = re.split(r"\r", re.sub(r"\x1b\[\d*[mK]", "", shown.getvalue()))
    assert max(map(len, lines)) < 40


def test_the_innermost_status_is_shown(shown):
    with status.status("outer"):
        wait_for(shown, "outer")
        with status.status("inner"):
            wait_for(shown, "inner")
        shown.truncate(0)
        wait_for(shown, "outer")
    assert "inner" not in shown.getvalue()


def test_without_a_terminal_there_are_plain_lines(shown):
    stream = io.StringIO()
    status.enable(lambda: stream)
    with status.status("compiling"):
        wait_for(stream, "\n")
        time.sleep(0.1)
    assert stream.getvalue() == "compiling · 0:00\n"


def test_nothing_is_shown_unless_a_command_asks_for_it(shown, capsys):
    status.enable(None)
    with status.status("compiling"):
        time.sleep(0.05)
    assert shown.getvalue() == "" and capsys.readouterr() == ("", "")


def test_a_download_keeps_the_bars_of_a_terminal(shown):
    hidden = []
    with status.status("loading"):
        wait_for(shown, "loading")
        with status.download("downloading x", lambda: hidden.append(1)):
            before = shown.getvalue()
            time.sleep(0.1)
            assert shown.getvalue() == before and hidden == []
    stream = io.StringIO()
    status.enable(lambda: stream)
    with status.download("downloading x", lambda: hidden.append(1)):
        wait_for(stream, "downloading x")
    assert hidden == [1]


def test_items_pass_through_until_first(shown):
    assert list(status.until_first("waiting", iter([1, 2, 3]))) == [1, 2, 3]
    assert list(status.until_first("waiting", [])) == []
