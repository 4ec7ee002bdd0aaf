"""`gptoss inspect-data`: examples token by token, statistics, JSON."""

import io
import json

import numpy as np
import pytest

from gptoss_jax.cli import main
from gptoss_jax.cli.inspect_data import spelled
from gptoss_jax.data.tokenizer import make_tokenizer

PRESET = """
from gptoss_jax.config import DataConfig, TrainConfig
config = TrainConfig(data=DataConfig(source="chat:{0}/rows.jsonl", tokenizer="bpe:300", seq_len=256,
                                     val_fraction=0.3, cache_dir="{0}/cache"))
"""
ROWS = [
    *[{"prompt": f"What is {i}?", "completion": "A number."} for i in range(3)],
    {"prompt": "?", "completion": "no " * 300},
    {"prompt": "?", "answer": "lost"},
]


@pytest.fixture
def preset(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "preset.py").write_text(PRESET.format(tmp_path))
    return tmp_path / "preset.py"


def test_examples_and_statistics(preset, tmp_path, capsys):
    assert main.main(["inspect-data", str(preset), "--examples", "1", "--json", str(tmp_path / "o")]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert shown.startswith("rows: 4 of 5 used: 4 with pairs (prompt, completion)\n")
    _, _, after = shown.partition("\nshown: 0 to 0 of 3 training examples, numbered from 0\n\n")
    assert after.startswith(f"{tmp_path}/rows.jsonl:1 turn 1: ") and shown.count("turn 1") == 1
    assert "⟦<|channel|>│" in after and "│<|return|>⟧\n" in after and shown.count("⟦") == 1
    assert "\n1,000 steps = 8,000 epochs of 2 rows\nwarning: more than 5 epochs" in shown
    assert f"  {tmp_path}/rows.jsonl:5: its fields are prompt, answer: must be messages" in shown
    assert "examples longer than data.seq_len (256): 1, 1 left out; --data.overlong cut" in shown
    records = [json.loads(line) for line in (tmp_path / "o").read_text().splitlines()]
    assert [record["where"].rpartition(":")[2] for record in records] == [f"{i} turn 1" for i in (1, 2, 3, 4)]
    assert [record["used_tokens"] > 0 for record in records] == [True, True, True, False]
    tokenizer = make_tokenizer(f"file:{next(tmp_path.glob('cache/*/tokenizer.json'))}")
    for record, row in zip(records, ROWS, strict=False):
        assert len(record["tokens"]) == len(record["loss_weights"])
        pairs = zip(record["tokens"], record["loss_weights"], strict=True)
        assert tokenizer.decode([token for token, weight in pairs if weight]) == f"final{row['completion']}"
    arguments = ["--held-out", "--data.train-on", "all", "--steps", "1"]
    assert main.main(["inspect-data", str(preset), *arguments]) == 0
    shown = capsys.readouterr().out
    assert "rows.jsonl:3 turn 1" in shown and "\n1 step = 8 epochs of 2 rows\n" in shown
    assert main.main(["inspect-data", str(preset), "--first", "-1"]) == 2
    assert "first is -1: must be 0 or more" in capsys.readouterr().err
    assert main.main(["inspect-data", str(preset), "--first", "7"]) == 0
    shown = capsys.readouterr().out
    assert shown.endswith("shown: none of 3 training examples, numbered from 0 (--first 7, --examples 3)\n")
    assert main.main(["inspect-data", str(preset), "--json", str(tmp_path / "none" / "o")]) == 2
    assert f"--json is '{tmp_path}/none/o': its folder does not exist" in capsys.readouterr().err


def test_nothing_is_read_as_markup(tmp_path, capsys):
    folder = tmp_path / "[train]"
    folder.mkdir()
    rows = [*ROWS[:3], {"messages": [{"role": "[/INST]", "content": ":smile:"}]}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "preset.py").write_text(PRESET.format(folder))
    assert main.main(["inspect-data", str(folder / "preset.py")]) == 0
    shown = capsys.readouterr().out
    assert f"\n{folder}/rows.jsonl:1 turn 1: " in shown
    assert f"  {folder}/rows.jsonl:4: messages[0].role is '[/INST]': must be system" in shown


def test_text_is_shown_too(preset, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("one two\nthree " * 99)
    source = ["--data.source", f"text:{tmp_path}/a.txt", "--data.tokenizer", "bytes"]
    assert main.main(["inspect-data", str(preset), *source]) == 0
    shown = capsys.readouterr().out
    assert "\n\ndocument 0: " in shown and "<|endoftext|>⟦o│n│e│ │t│w│o│↵\n│t" in shown
    assert shown.startswith("documents: 2, 1 of them held out\n") and "steps = " in shown


def test_colors_and_other_encodings():
    tokenizer = make_tokenizer("bytes")
    tokens = np.frombuffer("é\n\x1bb".encode(), np.uint8)
    weights = np.array([0, 1, 1, 0, 0])
    text = spelled(tokenizer, tokens, weights, io.TextIOWrapper(io.BytesIO(), "utf-8"))
    assert text.plain == "\\xc3⟦\\xa9│↵\n⟧\\x1b│b"
    assert [span.style for span in text.spans] == ["dim", "bold green", "bold green", "dim", "dim"]
    text = spelled(tokenizer, tokens, weights, io.TextIOWrapper(io.BytesIO(), "ascii"))
    assert text.plain == "\\xc3[[\\xa9|\\n\n]]\\x1b|b"


def test_tokens_that_share_a_character_are_shown_together():
    tokenizer, file = make_tokenizer("bytes"), io.TextIOWrapper(io.BytesIO(), "utf-8")
    # The bytes of é, of 中, half of é before a letter, half at the end of the text, and half at the very end.
    tokens = [*"é中".encode(), 0xC3, ord("x"), 0xA9, 0xC3, tokenizer.eos_id, 0xE4, 0xB8]
    text = spelled(tokenizer, np.array(tokens), np.zeros(len(tokens), np.uint8), file)
    assert text.plain == "é│中│\\xc3│x│\\xa9│\\xc3│<|endoftext|>│\\xe4│\\xb8"
