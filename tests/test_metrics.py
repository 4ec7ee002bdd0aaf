"""metrics.jsonl after a crash and a restart, and the timing of steps."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.training import metrics
from gptoss_jax.training.metrics import MetricsLog, StepTimer, read_metrics


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


def test_step_timer_attributes_time(monkeypatch):
    now = 100.0
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now)
    timer = StepTimer()
    now += 6.0
    with timer.measure("other"):
        now += 50.0
    with timer.measure("data"):
        now += 2.0
    with timer.measure("logging"):
        now += 1.0
        timer.steps = 4
        # The interval ends inside of the block, whose rest belongs to the next one.
        assert timer.take() == {
            "seconds": 9.0, "step_seconds": 2.25, "data_wait_share": round(2 / 9, 6), "logging_share": 0.0,
        }  # fmt: skip
        now += 3.0
    now += 1.0
    timer.steps = 1
    assert timer.take() == {
        "seconds": 4.0, "step_seconds": 4.0, "data_wait_share": 0.0, "logging_share": 0.75,
    }  # fmt: skip
