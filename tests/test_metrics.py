"""The files of a run after a crash, and what a person gets to see of text that was made to do harm."""

import io
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.training.console import (
    Console,
    MetricsLog,
    format_count,
    format_duration,
    format_flops,
    format_rate,
    printable,
    read_metrics,
)


class Clock:
    """Time that passes when told to."""

    now = 0.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self):
        return True


def write_rows(run_dir, rows, last_step=-1):
    log = MetricsLog(run_dir, last_step)
    for row in rows:
        log.write(row)
    log.close()


ROWS = [
    {"step": 1, "loss": 8.1, "expert_load": [[0.25, 0.75]]},
    {"step": 2, "loss": 1 / 3},
    {"step": 2, "val_loss": 7.0, "final": False},
    {"step": 3, "loss": 6.5},
    {"step": 4, "loss": 6.25},
]


def test_resumed_file_is_that_of_an_uninterrupted_run(tmp_path):
    write_rows(tmp_path / "whole", ROWS)
    write_rows(tmp_path / "cut", ROWS[:4])
    with open(tmp_path / "cut" / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 4, "lo')
    assert read_metrics(tmp_path / "cut" / "metrics.jsonl") == ROWS[:4]
    write_rows(tmp_path / "cut", ROWS[3:], last_step=2)
    whole, cut = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "cut"))
    assert cut == whole
    assert not list(tmp_path.glob("*/*.tmp"))
    # Each start has an event file of its own, even within a second.
    assert len(list((tmp_path / "cut" / "tensorboard").iterdir())) == 2


def test_a_fresh_start_drops_what_was_there(tmp_path):
    write_rows(tmp_path, [{"step": 0, "val_loss": 9.0}, *ROWS])
    write_rows(tmp_path, [])
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_rows_are_there_before_closing(tmp_path):
    log = MetricsLog(tmp_path)
    log.write(ROWS[0])
    assert read_metrics(tmp_path / "metrics.jsonl") == ROWS[:1]
    log.close()
    log.close()


def test_values_are_strict_json_and_exact(tmp_path):
    loss = np.float32(0.1)
    row = {"step": jnp.int32(7), "loss": loss, "grad_norm": jnp.float32(jnp.nan), "mfu": -math.inf}
    write_rows(tmp_path, [row | {"expert_load": np.array([[0.5, math.nan]])}])

    def refuse(name):
        raise AssertionError(name)

    read = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert read == {
        "step": 7,
        "loss": float(loss),
        "grad_norm": None,
        "mfu": None,
        "expert_load": [[0.5, None]],
    }


def test_a_row_needs_a_step(tmp_path):
    log = MetricsLog(tmp_path)
    with pytest.raises(ValueError, match="step is None"):
        log.write({"loss": 1.0})
    log.close()


def test_a_bad_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, \n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(path)
    path.write_text('{"step": 1}\n{"step": 2}')
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]
    path.write_text("")
    assert read_metrics(path) == []


def test_tensorboard_tags(tmp_path):
    write_rows(tmp_path, [{"step": 3, "loss": 1.5, "val_loss": 2.5, "final": True, "expert_load": [[1.0]]}])
    (events,) = (tmp_path / "tensorboard").iterdir()
    content = events.read_bytes()
    assert b"train/loss" in content and b"eval/val_loss" in content
    assert b"expert_load" not in content and b"final" not in content


def test_formats():
    assert [format_count(n) for n in (950, 999_950, 105_722_880, 20_914_757_184, None)] == [
        "950", "1.0M", "105.7M", "20.9B", "–",
    ]  # fmt: skip
    assert [format_duration(s) for s in (5.4, 251.6, 3723, None)] == ["0:05", "4:12", "1:02:03", "–"]
    assert [format_flops(f) for f in (132.4e9, 999.9e9, 1.05e15)] == [
        "132 GFLOP/s", "1.00 TFLOP/s", "1.05 PFLOP/s",
    ]  # fmt: skip
    assert [format_rate(r) for r in (1.2e-3, 3e-4, 0.0, math.nan)] == ["1.2e-3", "3.0e-4", "0", "nan"]


def test_printable():
    assert (
        printable("a\tb\r\n\x1b[31m\x07\rc\x9b\ud800\u202e") == "a   b\n\\x1b[31m\\x07\\rc\\x9b\\ud800\\u202e"
    )
    assert printable("naïve 日本 👩\u200d🚀") == "naïve 日本 👩\u200d🚀"


def run_console(stream):
    clock = Clock()
    console = Console(stream=stream, clock=clock)
    console.message("[red]x[/red]")
    console.start(100, 1300)
    # The first step compiles for five minutes, the others take 2 s.
    for step in range(101, 112):
        clock.now += 300 if step == 101 else 2
        console.update(step, 4.314, 3950.4, 1.2e-3)
    console.evaluation(111, 3.5, 1.25, is_best=True)
    console.sample("[bold]hi[/bold] \x1b[2J\nbye")
    console.stop()
    console.comparison(gzip=2.4, xz=2.1, model=1.25)
    console.summary([("Parameters", "105.7M")], 'gptoss generate runs/x --prompt "[a]"')


def test_plain_output(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    run_console(stream)
    assert stream.getvalue().split("\n") == [
        "[red]x[/red]",
        "step 101/1300 · loss 4.31 · 3,950 tok/s · lr 1.2e-3 · left –",
        "step 106/1300 · loss 4.31 · 3,950 tok/s · lr 1.2e-3 · left 39:48",
        "step 111/1300 · loss 4.31 · 3,950 tok/s · lr 1.2e-3 · left 39:38",
        "step 111 · held-out loss 3.500 · 1.2500 bits per byte · best so far",
        "  │ [bold]hi[/bold] \\x1b[2J",
        "  │ bye",
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


def test_plain_output_shows_the_last_step_and_unknown_numbers():
    stream, clock = io.StringIO(), Clock()
    console = Console(stream=stream, clock=clock)
    console.start(0, 2)
    for step in (1, 2):
        console.update(step, math.nan, 10.0, 0.0)
    console.stop()
    console.comparison(gzip=None, xz=None, model=None)
    lines = stream.getvalue().split("\n")
    assert lines[1] == "step 2/2 · loss – · 10 tok/s · lr 0 · left 0:00"
    assert lines[-2] == "    this model       –  "


def test_ascii_streams_do_not_fail():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    run_console(stream)
    written = stream.buffer.getvalue()
    assert b"  ? bye" in written and b"====" in written


def test_quiet_prints_nothing(capsys):
    stream = Terminal()
    console = Console(quiet=True, stream=stream)
    console.start(0, 3)
    console.update(1, 1.0, 1.0, 1.0)
    console.message("x")
    console.sample("x")
    console.evaluation(1, 1.0, 1.0, False)
    console.comparison(gzip=1.0, xz=1.0, model=1.0)
    console.summary([("a", "b")], "c")
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
    # The cursor is back.
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_progress_fits_in_a_line(width):
    clock = Clock()
    console = Console(stream=io.StringIO(), clock=clock)
    console.start(0, 1_000_000)
    assert "compiling" in console._line(80).plain
    for step in (1, 123_456):
        clock.now += 1e5
        console.update(step, 10.31, 12_203_950.0, 1.2e-3)
    line = console._line(width).plain
    assert len(line) < width
    assert line.startswith("step 123456/1000000")
    assert ("left" in line) == (width >= 80)
    assert ("━" * 40 in line) == (width == 200)
