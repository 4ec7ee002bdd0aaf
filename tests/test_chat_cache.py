"""Conversations in the token cache and in batches: split by row, packed whole, weighted by target."""

import collections
import dataclasses
import json
import pathlib
import re

import numpy as np
import pytest
from helpers.data import shared_data

from gptoss_jax.config import DataConfig
from gptoss_jax.data.batches import PackedRows, held_out_batches, packed_lengths, train_batches, trained_pairs
from gptoss_jax.data.chat import make_examples
from gptoss_jax.data.chat_messages import harmony_messages
from gptoss_jax.data.chat_rows import read_conversation
from gptoss_jax.data.chat_statistics import statistics, summary
from gptoss_jax.data.harmony import Harmony
from gptoss_jax.data.token_cache import build_cache


def turns(count, words=1):
    """A conversation of `count` turns with thinking."""
    messages = []
    for i in range(count):
        answer = {"role": "assistant", "content": "So. " * words, "thinking": f"Think {i}."}
        messages += [{"role": "user", "content": f"What is {i}?"}, answer]
    return {"messages": messages}


ROWS = [turns(1 + i % 3) for i in range(20)]


@pytest.fixture
def make(tmp_path):
    """(rows or lines, settings) -> config and cache of a file with these rows."""

    def build(rows, report=None, **settings):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        fields = {"tokenizer": "bpe:300", "seq_len": 512, "batch_size": 2, "val_fraction": 0.2}
        config = DataConfig(source=f"chat:{path}", cache_dir=str(tmp_path / "cache"), **(fields | settings))
        return config, build_cache(config, report)

    return build


def documents(cache):
    return [slice(start, stop) for start, stop in zip(cache.offsets[:-1], cache.offsets[1:], strict=True)]


def test_examples_are_stored_with_weights_and_origins(make, tmp_path):
    config, cache = make(ROWS)
    harmony = Harmony(cache.tokenizer)
    expected = make_examples(harmony, [harmony_messages(read_conversation(row)) for row in ROWS])
    expected = [(row, example) for row, some in enumerate(expected, 1) for example in some]
    assert len(cache.offsets) - 1 == len(expected) == sum(1 + i % 3 for i in range(20))
    for document, (_, example) in zip(documents(cache), expected, strict=True):
        assert np.array_equal(cache.tokens[document], example.tokens)
        assert np.array_equal(cache.weights[document], example.weights)
    where = [cache.where(i) for i in range(len(expected))]
    assert where == [f"{tmp_path}/rows.jsonl:{row} turn {example.turn}" for row, example in expected]
    # All turns of a conversation are on one side.
    sides = collections.defaultdict(set)
    for (row, _), is_held_out in zip(expected, cache.held_out, strict=True):
        sides[row].add(bool(is_held_out))
    assert all(len(side) == 1 for side in sides.values())
    assert [row for row, side in sides.items() if True in side] == [3, 8, 16]
    # Opened again, and not shared with other settings.
    assert build_cache(config).folder == cache.folder
    for change in ({"train_on": "final"}, {"reasoning_effort": "low"}, {"val_fraction": 0.3}):
        other = build_cache(dataclasses.replace(config, **change))
        assert other.folder != cache.folder
    final = build_cache(dataclasses.replace(config, train_on="final"))
    assert len(final.offsets) == len(cache.offsets) and final.weights.sum() < cache.weights.sum()
    size = (cache.folder / "weights.bin").stat().st_size
    (cache.folder / "weights.bin").write_bytes(b"1" * (size - 1))
    with pytest.raises(ValueError, match="damaged"):
        build_cache(config)


def test_packed_rows_hold_whole_examples(make):
    config, cache = make(ROWS)
    longest = int(np.diff(cache.offsets).max()) - 1
    for held_out in (False, True):
        expected = collections.Counter()
        for i, document in enumerate(documents(cache)):
            if cache.held_out[i] == held_out:
                tokens, weights = cache.tokens[document], cache.weights[document]
                # A weight belongs to the token that is predicted.
                expected[tokens[:-1].tobytes(), tokens[1:].tobytes(), weights[1:].tobytes()] += 1
        for seq_len in (longest, longest + 7, 3 * longest):
            seen, used = collections.Counter(), 0
            for row in PackedRows(cache, held_out, seq_len):
                for segment in range(1, row["segment_ids"].max() + 1):
                    inside = row["segment_ids"] == segment
                    assert row["positions"][inside].tolist() == list(range(inside.sum()))
                    tokens, targets = (row[name][inside].astype(np.uint16) for name in ("tokens", "targets"))
                    weights = row["loss_weights"][inside].astype(np.uint8)
                    seen[tokens.tobytes(), targets.tobytes(), weights.tobytes()] += 1
                padding = row["segment_ids"] == 0
                assert not any(values[padding].any() for values in row.values())
                used += row["loss_weights"].sum()
            assert seen == expected
            assert used == cache.weights[np.repeat(cache.held_out, np.diff(cache.offsets)) == held_out].sum()
    batch = next(train_batches(cache, config, seed=0))
    assert batch["loss_weights"].dtype == np.float32 and set(np.unique(batch["loss_weights"])) == {0, 1}
    (first, *_) = held_out_batches(cache, config)
    assert first["loss_weights"].sum() > 0


def test_a_longer_example_is_left_out_or_cut(make):
    # Row 21 is held out.
    rows = [*ROWS, ROWS[0], turns(1, words=200), {"prompt": "q " * 500, "completion": "a"}]
    config, cache = make(rows)
    lengths = np.diff(cache.offsets) - 1
    assert lengths[-2:].min() > config.seq_len and not cache.held_out[-2:].any()
    assert packed_lengths(cache, config.seq_len, "skip")[-2:].tolist() == [0, 0]
    # Of the second nothing that is trained on would remain.
    assert packed_lengths(cache, config.seq_len, "cut")[-2:].tolist() == [config.seq_len, 0]
    cut = PackedRows(cache, False, config.seq_len, "cut")
    assert sum(row["segment_ids"][-1] == 1 and row["loss_weights"][-1] == 1 for row in cut) == 1
    found = statistics(cache, config)
    assert (found["overlong"], found["left_out"], found["examples"]) == (2, 2, len(lengths))
    lines = summary(cache, config)
    found = "examples longer than data.seq_len (512): 2"
    assert f"{found}, 2 left out; --data.overlong cut truncates them instead" in lines
    lines = summary(cache, dataclasses.replace(config, overlong="cut"))
    assert f"{found}, 1 truncated, 1 left out: no trained token is left" in lines
    shortest = int(lengths[~cache.held_out].min())
    expected = f"data.seq_len is 9: no training example fits; the shortest needs {shortest}"
    with pytest.raises(ValueError, match=expected):
        train_batches(cache, dataclasses.replace(config, seq_len=9), 0)
    with pytest.raises(ValueError, match="no held-out example fits"):
        held_out_batches(cache, dataclasses.replace(config, seq_len=9))
    # The shortest prompt of the user decides.
    needed = min(
        cache.weights[part].tolist().index(1) for part in np.array(documents(cache))[~cache.held_out]
    )
    expected = f"cut at that, no training example has a trained token; must be at least {needed}"
    for seq_len in (9, needed - 1):
        with pytest.raises(ValueError, match=expected):
            PackedRows(cache, False, seq_len, "cut")
    assert PackedRows(cache, False, needed, "cut")[0]["loss_weights"].sum() == 1
    # Nothing is cut, and the advice not given again.
    config, cache = make([*ROWS, rows[-1], ROWS[0]], overlong="cut")
    expected = "examples longer than data.seq_len (512): 1, 0 truncated, 1 left out: no trained token is left"
    assert expected in summary(cache, config)


def test_trained_pairs(make):
    config, cache = make([*ROWS, turns(1, words=200), {"prompt": "q " * 500, "completion": "a"}])
    whole = np.add.reduceat(cache.weights, cache.offsets[:-1], dtype=np.int64)
    assert np.array_equal(trained_pairs(cache, np.diff(cache.offsets) - 1), whole)
    for overlong in ("skip", "cut"):
        lengths = packed_lengths(cache, config.seq_len, overlong)
        rows = [*PackedRows(cache, False, config.seq_len, overlong)]
        trained = trained_pairs(cache, lengths)
        assert trained[~cache.held_out].sum() == sum(row["loss_weights"].sum() for row in rows)
        assert trained[-1] == 0 and (trained[-2] > 0) == (overlong == "cut")


def test_skipped_rows_are_counted_and_listed(make):
    wizard = {"messages": [{"role": "wizard", "content": "x"}, {"role": "assistant", "content": "a"}]}
    untrained = {"prompt": "q", "completion": [{"role": "assistant", "content": "a", "train": False}]}
    pair = {"question": "q", "answer": "a"}
    lines, rows = [], [wizard, *ROWS, "{", *[wizard] * 9, untrained, pair, {"text": "x"}]
    config, cache = make(rows, lines.append)
    assert lines[0].startswith("Rendering chat:") and len(lines) == 2
    found = statistics(cache, config)
    assert found["skipped"] == {
        "unknown role": 10,
        "invalid JSON": 1,
        "nothing to train on": 1,
        "unknown format": 1,
    }
    assert found["formats"] == {"messages": 20, "pairs (question, answer)": 1} and found["rows"] == 34
    assert found["without_thinking"] == 1
    assert found["held_out_examples"] == int(cache.held_out.sum())
    assert found["trained_share"] == round(cache.weights.sum() / len(cache.tokens), 4)
    assert list(found["lengths"]) == ["0", "0.25", "0.5", "0.75", "0.95", "1"]
    shown = summary(cache, config)
    path, role = (
        config.source.removeprefix("chat:"),
        "messages[0].role is 'wizard': must be system, developer",
    )
    assert shown[0] == "rows: 21 of 34 used: 20 with messages, 1 with pairs (question, answer)"
    assert shown[2].startswith("skipped rows: 13 (unknown role 10, invalid JSON 1, nothing to train on 1, ")
    assert shown[3].startswith(f"  {path}:1: {role}") and shown[4].startswith(f"  {path}:22: not JSON")
    assert shown[13] == "  and 3 more"
    listed = (cache.folder / "skipped.txt").read_text().splitlines()
    assert len(listed) == 13 and listed[:10] == [line.strip() for line in shown[3:13]]
    assert listed[-2].startswith(f"{path}:32: has no token to train on") and shown[2].endswith("skipped.txt")
    # All of them are an error, also if the cache exists already.
    file = re.escape(str(cache.folder / "skipped.txt"))
    expected = f"^data.invalid_rows is 'fail': 13 of 34 rows cannot be used, listed in {file}; {path}:1: mess"
    with pytest.raises(ValueError, match=expected):
        build_cache(dataclasses.replace(config, invalid_rows="fail"))


def test_calls_that_are_left_out_are_counted(make):
    calls = [{"function": {"name": name}} for name in ("f", "g", "h")]
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": calls}]}
    config, cache = make([*ROWS, row, row])
    assert statistics(cache, config)["left_out_calls"] == 4
    assert "calls left out: 4, after the first one of a message without results" in summary(cache, config)
    config, cache = make(ROWS)
    assert statistics(cache, config)["left_out_calls"] == 0
    assert not any("calls" in line for line in summary(cache, config))


def test_rows_that_are_nested_too_deeply_are_skipped(make):
    schema = {}
    for _ in range(350):
        schema = {"type": "object", "properties": {"x": schema}}
    config, cache = make([*ROWS, ROWS[0] | {"tools": [{"name": "f", "parameters": schema}]}])
    assert statistics(cache, config)["skipped"] == {"invalid JSON": 1}
    assert "rows.jsonl:21: is nested too deeply" in "".join(summary(cache, config))


def test_sources_without_enough_rows(make):
    with pytest.raises(ValueError, match=r"has 1 rows that can be used, needs two.*rows.jsonl:2: its fields"):
        make([ROWS[0], {"text": "x"}])
    with pytest.raises(ValueError, match="has 0 rows that can be used"):
        make([])
    _, cache = make(ROWS[:2], val_fraction=0.01)
    assert cache.held_out.tolist() == [False, True, True]


def test_a_tokenizer_without_the_special_tokens(make, tmp_path):
    with pytest.raises(ValueError, match="data.tokenizer is 'bytes': a chat needs Harmony's special tokens"):
        make(ROWS, tokenizer="bytes")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_the_vocabulary_is_trained_without_held_out_rows(make):
    words = [chr(97 + i) * 4 for i in range(20)]
    rows = [{"prompt": "?", "completion": f" {word}" * 99} for word in words]
    _, cache = make(rows, tokenizer="bpe:400")
    is_word = [len(cache.tokenizer.encode(f" {word}")) < 4 for word in words]
    assert [i for i, known in enumerate(is_word, 1) if not known] == [3, 8, 16]


@pytest.mark.parametrize("name", ["gsm8k/test.jsonl", "instructions/instruction-data.json"])
def test_published_rows(harmony, tmp_path, name):
    path = shared_data(f"sft/{name}")
    config = DataConfig(
        source=f"chat:{path}", tokenizer="o200k_harmony", seq_len=256, batch_size=4, cache_dir=str(tmp_path)
    )
    cache = build_cache(config)
    found = statistics(cache, config)
    text = pathlib.Path(path).read_text()
    rows = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]
    assert found["rows"] == found["examples"] == len(rows) and found["skipped"] == {}
    answers = [row.get("answer", row.get("output")) for row in rows]
    for i in (0, 7, len(rows) - 1):
        document = documents(cache)[i]
        tokens, weights = cache.tokens[document], cache.weights[document]
        trained = tokens[weights > 0].tolist()
        # <|channel|>final<|message|>…<|return|>
        assert trained == [200005, 17196, 200008, *harmony.encode(answers[i]), 200002]
    total = 3 * len(rows) + sum(len(harmony.encode(answer)) + 1 for answer in answers)
    assert found["trained_tokens"] == total == int(cache.weights.sum())
    row = PackedRows(cache, held_out=True, seq_len=256)[0]
    targets = row["targets"][row["loss_weights"] > 0]
    assert set(targets[targets >= 200000].tolist()) == {200002, 200005, 200008}
