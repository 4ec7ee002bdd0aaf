"""Runs on conversations, chats with them, and runs whose vocabulary lacks Harmony's special tokens."""

import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest

from gptoss_jax.checkpoints.run_params import load_run
from gptoss_jax.cli import main
from gptoss_jax.cli.chat import Chat
from gptoss_jax.config import DataConfig, EvalConfig, ModelConfig, TrainConfig
from gptoss_jax.data import tokenizer_json
from gptoss_jax.data.batches import held_out_batches
from gptoss_jax.data.harmony import is_harmony
from gptoss_jax.data.token_cache import build_cache
from gptoss_jax.inference.chat import HarmonyConversation, PlainConversation
from gptoss_jax.terminal import format_count
from gptoss_jax.training import resume, setup
from gptoss_jax.training.loop import train
from gptoss_jax.training.metrics import read_metrics


@pytest.fixture
def make_config(tmp_path):
    def make(source, run_dir="run", **changes):
        model = ModelConfig(
            vocab_size=451, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=8,
            max_position_embeddings=256, rope_theta=10000.0, rope_scaling=None, compute_dtype="float32",
        )  # fmt: skip
        data = DataConfig(
            source=source, tokenizer="bpe:450", seq_len=128, batch_size=8, cache_dir=str(tmp_path / "cache")
        )
        settings = dict(
            model=model, data=data, steps=2, run_dir=str(tmp_path / run_dir),
            eval=EvalConfig(every=2, batches=2, sample_tokens=3),
        )  # fmt: skip
        return TrainConfig(**(settings | changes))

    return make


def test_a_run_on_conversations(make_config, apply_model, tmp_path, capsys):
    rows = [{"question": f"What is {i}?", "answer": f"It is {i}. " * 3} for i in range(40)] + [{"text": "x"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = make_config(f"chat:{tmp_path}/rows.jsonl")
    # As of a run that was killed before its first checkpoint.
    (tmp_path / "run").mkdir()
    config.save(tmp_path / "run" / "config.json")
    params = train(config).params
    shown = capsys.readouterr().out
    assert f"{tmp_path}/run has no checkpoint yet: starting at step 1\n" in shown
    assert "  rows: 40 of 41 used: 40 with pairs (question, answer)" in shown
    assert (tmp_path / "run" / "skipped.txt").read_text().startswith(f"{tmp_path}/rows.jsonl:41: its fields")
    assert re.search(r"\n  epochs 2 steps = [\d.]+ epochs of \d+ rows\n", shown)
    assert "skipped rows: 1 (unknown format 1)" in shown and "rows.jsonl:41: its fields are text" in shown
    # A held-out question is answered, and the run ends with the command that chats.
    assert (
        re.search(r"held-out question:\n  │ What is \d+\?\n  the model's answer:\n  │ ", shown)
        and "<|end|><|start|>assistant" not in shown
    )
    assert f"gptoss chat {tmp_path}/run" in shown and "held-out loss   " in shown
    assert "gzip" not in shown and "gzip_bits_per_byte" not in (tmp_path / "run/metrics.jsonl").read_text()
    # The validation loss is the mean over the trained tokens of the held-out rows.
    cache = build_cache(config.data)
    trained = format_count(cache.weights.sum() - cache.meta["chat"]["held_out_trained_tokens"])
    assert re.search(
        rf"tokens of bpe:\d+, {re.escape(trained)} of them trained on, \d+ examples? held out\n", shown
    )
    nats = weights = 0.0
    for batch in held_out_batches(cache, config.data):
        inputs = (batch[name] for name in ("tokens", "segment_ids", "positions"))
        log_probs = np.asarray(jax.nn.log_softmax(apply_model(config.model, params, *inputs)))
        log_probs = np.take_along_axis(log_probs, batch["targets"][..., None], -1)[..., 0]
        nats -= (log_probs * batch["loss_weights"]).sum()
        weights += batch["loss_weights"].sum()
    assert weights == cache.meta["chat"]["held_out_trained_tokens"] > 0
    (last,) = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if row.get("final")]
    np.testing.assert_allclose(last["val_loss"], nats / weights, rtol=1e-5)
    bits = float(nats) / np.log(2) / cache.meta["held_out_bytes"]
    np.testing.assert_allclose(last["val_bits_per_byte"], bits, rtol=1e-5)
    # The same loss from `gptoss eval`, of the same rows in a file.
    held_out = sorted({number for _, number, _ in cache.origins[cache.held_out].tolist()})
    lines = [json.dumps(rows[number - 1]) for number in held_out] + ['{"text": "x"}']
    (tmp_path / "held-out.jsonl").write_text("\n".join(lines))
    command = ["eval", str(tmp_path / "run"), "--source", f"chat:{tmp_path}/held-out.jsonl"]
    assert main.main([*command, "--json", str(tmp_path / "score.json")]) == 0
    shown, score = capsys.readouterr().out, json.loads((tmp_path / "score.json").read_text())
    np.testing.assert_allclose(score["loss"], last["val_loss"], rtol=1e-5)
    assert score["trained_tokens"] == weights and score["rows"] == score["examples"] == len(held_out)
    assert f"loss           {score['loss']:.4f} nats per trained token\n" in shown
    assert "skipped        1 (unknown format 1); gptoss inspect-data lists them\n" in shown
    assert main.main([*command, "--stride", "3"]) == 2
    assert "stride is 3: applies only to text" in capsys.readouterr().err
    assert main.main([*command, "--context", "9"]) == 2
    assert "context is 9: no example fits; the shortest needs " in capsys.readouterr().err
    # Its chat has no date, as its rows, and stops at the end of an answer.
    tokenizer = load_run(tmp_path / "run")[2]
    conversation = Chat(str(tmp_path / "run"))._conversation(tokenizer, print)
    assert isinstance(conversation, HarmonyConversation)
    assert "Current date" not in tokenizer.decode(conversation.prompt("What is 3?"))
    document = slice(cache.offsets[3], cache.offsets[4])
    prompt = conversation.prompt("What is 3?")
    assert cache.tokens[document][: len(prompt)].tolist() == prompt
    assert cache.weights[document].tolist().index(1) == len(prompt)
    assert tokenizer.special_tokens["<|return|>"] in conversation.params.stop_tokens
    adapted = Chat("base", adapter=str(tmp_path / "run"))._conversation(tokenizer, print)
    assert isinstance(adapted, HarmonyConversation) and adapted.prompt("?") == conversation.prompt("?")
    plain = Chat(str(tmp_path / "run"), plain=True)._conversation(tokenizer, print)
    assert isinstance(plain, PlainConversation)


def test_a_run_that_began_without_the_special_tokens_keeps_its_vocabulary(make_config, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("<|endoftext|>".join(f"one {i} two {i * i} " * 40 for i in range(20)))
    config = make_config(f"text:{text}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_json, "HARMONY_TOKENS", ())
        before = build_cache(config.data)
    shutil.rmtree(tmp_path / "cache")
    before.tokenizer.save(tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "4").mkdir(parents=True)
    resumed = setup.open_cache(config, print)
    assert not is_harmony(resumed.tokenizer)
    assert resume.describe_text(resumed) == resume.describe_text(before)
    assert np.array_equal(resumed.tokens, before.tokens)
    # A new run has them, and a chat with its base model is plain completion.
    config = dataclasses.replace(config, run_dir=str(tmp_path / "new"))
    cache = setup.open_cache(config, print)
    setup.write_run_dir(config, cache, is_new=True)
    tokenizer = cache.tokenizer
    assert is_harmony(tokenizer)
    assert isinstance(Chat(config.run_dir)._conversation(tokenizer, print), PlainConversation)
