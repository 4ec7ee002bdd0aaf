"""Epochs of a run, and the warning that conversations are repeated often."""

import dataclasses
import json

import numpy as np
import pytest

from gptoss_jax.config import DataConfig, TrainConfig
from gptoss_jax.data.batches import PackedRows
from gptoss_jax.data.epochs import describe_epochs
from gptoss_jax.data.token_cache import build_cache


@pytest.fixture
def config(tmp_path):
    rows = [{"prompt": f"{i}?", "completion": "word " * 9} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cache = str(tmp_path / "cache")
    data = DataConfig(f"chat:{tmp_path}/rows.jsonl", "bpe:300", seq_len=256, batch_size=4, cache_dir=cache)
    return TrainConfig(data=data, steps=300)


def test_epochs_are_steps_by_rows(config):
    cache = build_cache(config.data)
    rows = len(PackedRows(cache, False, 256))
    assert 20 < rows < 40
    few = dataclasses.replace(config, steps=rows // 4)
    assert describe_epochs(few, cache) == [
        f"{rows // 4} steps = {rows // 4 * 4 / rows:.2g} epochs of {rows} rows"
    ]
    line, warning = describe_epochs(config, cache)
    assert line == f"300 steps = {1200 / rows:.0f} epochs of {rows} rows"
    assert warning.startswith("warning: more than 5 epochs usually overfit")
    assert f"fewer --steps (3 epochs: {round(3 * rows / 4)}), a smaller" in warning


def test_text_is_not_warned_of(config, tmp_path):
    (tmp_path / "a.txt").write_text("one two\nthree " * 99)
    data = dataclasses.replace(config.data, source=f"text:{tmp_path}/a.txt", tokenizer="bytes")
    config = dataclasses.replace(config, data=data)
    cache = build_cache(data)
    assert np.sum(~cache.held_out) == 1
    assert len(describe_epochs(config, cache)) == 1
