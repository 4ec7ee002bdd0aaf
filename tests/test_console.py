"""Console output of a run, at a terminal and elsewhere."""

import io
import math
import re

import pytest

from gptoss_jax.training.console import Console


class Clock:
    """A clock that advances only when told to."""

    now = 0.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    encoding = "utf-8"

    def isatty(self):
        return True


def run_console(stream):
    clock = Clock()
    console = Console(stream=stream, clock=clock)
    console.message("[red]x[/red]")
    console.start(100, 1300)
    # The first step compiles for five minutes; the others take 2 s.
    for step in range(101, 112):
        clock.now += 300 if step == 101 else 2
        console.update(step, 4.314, 3950.4, 1.2e-3)
    console.evaluation(111, 3.5, "1.2500 bits per byte", is_best=True)
    console.sample("[bold]hi[/bold] \x1b[2J\nbye")
    console.sample("a", question="q\x1b\nr")
    console.stop()
    console.comparison({"gzip -9": 2.4, "xz -9": 2.1, "this model": 1.25})
    console.summary({"Parameters": "105.7M"}, 'gptoss generate runs/x --prompt "[a]"')


@pytest.mark.parametrize("force", ["", "1"])
def test_plain_output(monkeypatch, force):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", force)
    stream, plain = io.StringIO(), io.StringIO()
    run_console(stream)
    # Colors, but nothing that moves the cursor.
    text = stream.getvalue()
    assert ("\x1b[" in text) == bool(force)
    plain.write(re.sub(r"\x1b\[[0-9;]*m", "", text))
    stream = plain
    assert stream.getvalue().split("\n") == [
        "[red]x[/red]",
        "step 101/1300 · loss 4.31 · 3,950 tok/s · lr 1.2e-3 · left –",
        "step 106/1300 · loss 4.31 · 3,950 tok/s · lr 1.2e-3 · left 39:48",
        "step 111/1300 · loss 4.31 · 3,950 tok/s · lr 1.2e-3 · left 39:38",
        "step 111 · held-out loss 3.500 · 1.2500 bits per byte · best so far",
        "  │ [bold]hi[/bold] \\x1b[2J",
        "  │ bye",
        "  held-out question:",
        "  │ q\\x1b",
        "  │ r",
        "  the model's answer:",
        "  │ a",
        "",
        "  Bits per byte of held-out text (fewer is better)",
        "    gzip -9      2.400  ━━━━━━━━━━━━━━━━━━━━━━━━━━━━",
        "    xz -9        2.100  ━━━━━━━━━━━━━━━━━━━━━━━━━",
        "    this model   1.250  ━━━━━━━━━━━━━━━ best",
        "",
        "  Parameters   105.7M",
        "",
        '  Next: gptoss generate runs/x --prompt "[a]"',
        "",
    ]


def as_displayed(text):
    """The lines that a notebook shows: what comes after a carriage return overwrites the line."""
    return [re.sub(r".*\r(?=[^\n])", "", line) for line in text.split("\n")]


def test_notebook_replaces_progress_lines():
    stream = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})()
    run_console(stream)
    written = stream.getvalue()
    assert written.count(" tok/s") == 11 and "\x1b" not in written
    assert as_displayed(written)[:3] == [
        "[red]x[/red]",
        "step 111 · held-out loss 3.500 · 1.2500 bits per byte · best so far",
        "  │ [bold]hi[/bold] \\x1b[2J",
    ]


@pytest.mark.parametrize("total, shown", [(2, "step 2/2"), (3, "step 2/3")])
def test_notebook_keeps_the_last_progress_line(total, shown):
    stream, clock = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})(), Clock()
    console = Console(stream=stream, clock=clock)
    console.start(0, total)
    for step in (1, 2):
        clock.now += 5
        console.update(step, 1.0, 10.0, 0.0)
    console.stop()
    console.message("x")
    first, second, *rest = as_displayed(stream.getvalue())
    assert first.startswith(shown) and [second, *rest] == ["x", ""]


def test_plain_output_shows_the_last_step_and_unknown_numbers():
    stream, clock = io.StringIO(), Clock()
    console = Console(stream=stream, clock=clock)
    console.start(0, 2)
    for step in (1, 2):
        console.update(step, math.nan, 10.0, 0.0)
    console.stop()
    console.comparison({"gzip -9": None, "this model": None})
    lines = stream.getvalue().split("\n")
    assert lines[1] == "step 2/2 · loss – · 10 tok/s · lr 0 · left 0:00"
    assert lines[-2] == "    this model       –  "


def test_ascii_streams_do_not_fail():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    run_console(stream)
    written = stream.buffer.getvalue()
    assert b"  | bye" in written and b"====" in written and b" - lr 1.2e-3 - " in written


def test_quiet_prints_nothing(capsys):
    stream = Terminal()
    console = Console(quiet=True, stream=stream)
    console.start(0, 3)
    console.update(1, 1.0, 1.0, 1.0)
    console.message("x")
    console.sample("x")
    console.evaluation(1, 1.0, "1.0000 bits per byte", False)
    console.comparison({"gzip -9": 1.0})
    console.summary({"a": "b"}, "c")
    console.stop()
    assert stream.getvalue() == "" and capsys.readouterr().out == ""


def test_terminal_output(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    run_console(stream)
    text = stream.getvalue()
    assert "[red]x[/red]" in text and "[bold]hi[/bold] \\x1b[2J" in text
    assert "\x1b[2J" not in text
    # The cursor is visible again.
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_progress_fits_in_a_line(monkeypatch, width):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", str(width))
    stream, clock = Terminal(), Clock()
    console = Console(stream=stream, clock=clock)
    console.start(0, 1_000_000)
    clock.now += 12
    for step in (1, 123_456):
        console.update(step, 10.31, 12_203_950.0, 1.2e-3)
        clock.now += 600
    console.stop()
    # Each redraw returns to the start of the line.
    drawn = [
        re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).rstrip()
        for line in re.split("[\r\n]+", stream.getvalue())
    ]
    last = [line for line in drawn if line][-1]
    assert max(map(len, drawn)) <= width
    assert last.startswith("step 123456/1000000")
    assert ("left 1:11:01" in last) == (width >= 80)
    assert ("━" * 40 in last.replace("╸", "━").replace("╺", "━")) == (width == 200)
    assert any("compiling the first" in line for line in drawn) == (width >= 40)


def test_work_between_steps_is_named(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    stream, clock = Terminal(), Clock()
    console = Console(stream=stream, clock=clock)
    console.start(0, 9)
    console.update(1, 1.0, 10.0, 1e-3)
    with console.status("evaluating"):
        clock.now += 75
        console._progress.refresh()
    console.stop()
    assert "evaluating · 1:15" in stream.getvalue()
    assert stream.getvalue().rstrip().splitlines()[-1].count("evaluating") == 0
