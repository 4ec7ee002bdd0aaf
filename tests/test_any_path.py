"""Every command and setting that takes a path, with special characters in the folder's name."""

import io
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest
import tokenizers
from helpers.xla_flags import FAST_COMPILE

import gptoss_jax as gx
from gptoss_jax.cli import main
from gptoss_jax.data.tokenizer import load_tokenizer
from gptoss_jax.training.metrics import read_metrics

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[1]
NASTY = 'it\'s "a" [1-3] ~*?#% é{x}:\n$HOME'
PRESET = """
from gptoss_jax.config import *
config = TrainConfig(
    model=ModelConfig(
        vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=8,
        max_position_embeddings=96, rope_theta=10000.0, rope_scaling=None, compute_dtype="float32",
    ),
    data=DataConfig(seq_len=32, batch_size=4, val_fraction=0.2),
    optim=OptimConfig(schedule="wsd", warmup_steps=1, decay_fraction=0.2),
    eval=EvalConfig(every=4, batches=1, sample_tokens=4),
)
"""
TASK = """
task: nasty
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: ["a", "b"]
doc_to_target: 0
metric_list:
  - metric: acc
"""


def run(*command: object, **environment: str) -> str:
    """Runs a process in the parent of the folder with special characters; returns its stdout."""
    flags = f"--xla_force_host_platform_device_count=1 {FAST_COMPILE}"
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run([*map(str, command)], capture_output=True, encoding="utf-8", env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """The folder with special characters: a preset, text in three formats, a tokenizer, an lm_eval task."""
    folder = tmp_path_factory.mktemp("paths") / NASTY
    folder.mkdir()
    (folder / "preset.py").write_text(PRESET, "utf-8")
    stories = [f"story {i} of a nasty folder, " * (3 + i) for i in range(12)]
    (folder / "stories.txt").write_text("<|endoftext|>".join(stories), "utf-8")
    lines = [json.dumps({"text": story}) + "\n" for story in stories]
    (folder / "stories.jsonl").write_text("".join(lines), "utf-8")
    # lm_eval and datasets treat the file name in a task as a glob pattern.
    data = shutil.copy(folder / "stories.jsonl", folder.parent / "stories.jsonl")
    (folder / "task.yaml").write_text(TASK.format(data=json.dumps(str(data))), "utf-8")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["<|startoftext|>", "<|endoftext|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=special
    )
    tokenizer.train_from_iterator(stories, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def trained(folder) -> pathlib.Path:
    """A run that was started and then resumed with more steps; the command that it prints works."""
    train = [
        sys.executable, ROOT / "train.py", folder / "preset.py",
        "--data.source", f"text:{folder / 'stories.txt'}",
        "--data.tokenizer", f"file:{folder / 'tokenizer.json'}",
        "--data.cache-dir", folder / "cache",
        "--run-dir", folder / "run",
    ]  # fmt: skip
    run(*train, "--steps", 4)
    printed = run(*train, "--steps", 6)
    assert [row["step"] for row in read_metrics(folder / "run" / "metrics.jsonl")][-1] == 6
    assert {path.name for path in (folder / "run").iterdir()} >= {"config.json", "checkpoints", "report.png"}
    command = printed.split("Next: ")[1].strip()
    words = shlex.split(command)
    assert words[:3] == ["gptoss", "generate", str(folder / "run")]
    return folder / "run"


def test_generate(trained, capsys):
    assert main.main(["generate", str(trained), "--prompt", "story", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("story")


def test_chat(trained, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"story 1\n")))
    assert main.main(["chat", str(trained), "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.strip() != ""


def test_evaluate_text_and_tasks(trained, folder):
    text, task = ["--source", f"text:{folder / 'stories.txt'}"], ["--task", str(folder / "task.yaml")]
    for number, what in enumerate((text, [*task, "--limit", "2"])):
        result = folder / f"eval {number}.json"
        assert main.main(["eval", str(trained), *what, "--json", str(result)]) == 0
        assert json.loads(result.read_text("utf-8"))


def test_report_and_plan(trained, folder, capsys):
    assert main.main(["report", str(trained)]) == 0
    assert capsys.readouterr().out == f"{trained / 'report.png'}\n"
    chip = ["--chip", "h100", "--devices", "2", "--json", str(folder / "plan.json")]
    assert main.main(["plan", str(folder / "preset.py"), *chip]) == 0
    assert json.loads((folder / "plan.json").read_text("utf-8"))


def test_convert_load_and_train_from(trained, folder):
    out = folder / "out"
    assert main.main(["convert", str(trained), str(out)]) == 0
    model = gx.from_pretrained(out)
    gx.save_pretrained(model, folder / "saved")
    tokens = load_tokenizer(out).encode("story 1 of")
    kept = gx.from_pretrained(folder / "saved")
    assert gx.generate(model, [tokens]) == gx.generate(kept, [tokens])
    assert gx.ModelConfig.from_hf(out) == gx.ModelConfig.from_hf(folder / "saved" / "config.json")
    # In another folder, from a JSONL source, with a `~` that the shell did not expand.
    run(
        sys.executable, ROOT / "train.py", "~/preset.py", "--init-from", "~/out", "--steps", 2,
        "--data.source", "jsonl:~/stories.jsonl#text", "--data.tokenizer", "file:~/tokenizer.json",
        "--data.cache-dir=~/cache", "--run-dir=~/from out", "--eval.sample-tokens", 0, HOME=str(folder),
    )  # fmt: skip
    assert [row["step"] for row in read_metrics(folder / "from out" / "metrics.jsonl")][-1] == 2
    assert not (ROOT / "~").exists() and not pathlib.Path("~").exists()
