"""Every run has a picture: short ones, broken ones, and ones with more experts than pixels."""

import json

import numpy as np
import pytest

from gptoss_jax.config import ModelConfig, TrainConfig
from gptoss_jax.training.plots import draw_report, expert_load, smooth, typical_range


def png_size(path):
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")


def training_row(step, **changes):
    row = {"step": step, "loss": 8.0 / step, "learning_rate": 1e-3 * step, "grad_norm": 2.0, "mfu": None}
    return row | {"tokens_per_second": 100.0 + step, "skipped_steps": 0, "tokens_seen": 64 * step} | changes


NULLS = {"loss": None, "grad_norm": None, "tokens_per_second": None, "learning_rate": None}
LOAD = [[0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25]]
FINAL = {"step": 9, "val_loss": 2.0, "val_bits_per_byte": 1.2, "final": True}

CASES = {
    "no rows": [],
    "one row": [training_row(1, expert_load=LOAD)],
    "no evaluation": [training_row(step, mfu=0.4) for step in range(1, 10)],
    "only an evaluation": [{"step": 0, "val_loss": 8.0, "val_bits_per_byte": 5.0}],
    "only nulls": [
        training_row(1, **NULLS, expert_load=[[None, 0.5]]),
        {"step": 1, "val_loss": None, "val_bits_per_byte": None},
    ],
    "skipped steps": [
        training_row(1),
        training_row(2, **NULLS, skipped_steps=1),
        training_row(3, skipped_steps=1),
    ],
    "zeros": [training_row(step, loss=0.0, grad_norm=0.0, learning_rate=0.0) for step in (1, 2)],
    "complete": [
        *[training_row(step, expert_load=LOAD) for step in range(1, 10)],
        {"step": 9, "val_loss": 2.1, "val_bits_per_byte": 1.3},
        FINAL | {"gzip_bits_per_byte": 2.4, "xz_bits_per_byte": 2.1},
    ],
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", CASES)
def test_draws(tmp_path, case):
    # The name must not be read as a formula, and may hold characters that the font does not have.
    run_dir = tmp_path / "a_$\\frac$ 日本\n\x01"
    run_dir.mkdir()
    TrainConfig().save(run_dir / "config.json")
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CASES[case]))
    assert draw_report(run_dir) == run_dir / "report.png"
    assert png_size(run_dir / "report.png") == (1600, 1000)
    assert not list(run_dir.glob("*.tmp"))


@pytest.mark.parametrize(("layers", "experts"), [(1, 4), (36, 128)])
def test_draws_any_number_of_experts(tmp_path, layers, experts):
    model = ModelConfig(num_hidden_layers=layers, num_local_experts=experts)
    TrainConfig(model=model).save(tmp_path / "config.json")
    load = np.random.default_rng(0).dirichlet(np.ones(experts), size=layers).tolist()
    rows = [training_row(step, expert_load=load) for step in (5, 6)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert png_size(draw_report(tmp_path)) == (1600, 1000)


def test_a_missing_config_is_said(tmp_path):
    with pytest.raises(ValueError, match="config.json"):
        draw_report(tmp_path)


def test_expert_load_is_in_units_of_the_uniform_share():
    rows = [training_row(10, expert_load=LOAD), training_row(11), training_row(12, expert_load=LOAD[::-1])]
    steps, load, group_size = expert_load(rows)
    assert group_size == 1 and steps.tolist() == [10, 12]
    np.testing.assert_allclose(load[:, :, 0], [[0.4, 0.8, 1.2, 1.6], [1, 1, 1, 1]], rtol=1e-6)
    np.testing.assert_allclose(load[:, :, 1], load[::-1, :, 0])


def test_expert_load_keeps_the_least_even_where_pixels_are_few():
    given = np.full((36, 128), 1 / 128)
    given[35, 100] = 0.0
    given[0, 3] = 8 / 128
    _, load, group_size = expert_load([training_row(1, expert_load=given.tolist())])
    assert group_size == 12 and load.shape == (36, 11, 1)
    assert load[35, 8, 0] == 0.0 and load[0, 0, 0] == 8.0
    assert (load == 1).sum() == 36 * 11 - 2


def test_smoothing_looks_only_backward():
    noise = np.random.default_rng(0).normal(size=2000)
    # A later value changes nothing before it, so that the end of a series is like its middle.
    np.testing.assert_array_equal(smooth(np.append(noise[:-1], 1e6))[:-1], smooth(noise)[:-1])
    np.testing.assert_allclose(smooth(np.full(500, 3.0)), 3.0)
    middle, end = (np.std([smooth(row)[at] for row in noise.reshape(20, 100)]) for at in (50, -1))
    assert end < 1.6 * middle < 1.0


def test_smoothing_skips_unknown_values():
    shown = smooth(np.array([np.nan, 2.0, np.nan, 2.0, np.inf]))
    np.testing.assert_array_equal(shown, [np.nan, 2.0, 2.0, 2.0, 2.0])


def test_outliers_do_not_set_the_range():
    values = np.append(np.linspace(2, 4, 999), 900.0)
    low, high = typical_range(values, np.array([1.5, np.nan]))
    assert low == 1.5 and 3.9 < high < 4.0
    assert typical_range(np.array([np.nan]), np.empty(0)) is None
