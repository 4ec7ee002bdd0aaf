"""Evaluation of text: windows, and losses against plain loops over the model and against training."""

import dataclasses
import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptoss_jax.checkpoints.export import save_pretrained
from gptoss_jax.checkpoints.run import Checkpoints
from gptoss_jax.cli import main
from gptoss_jax.config import DataConfig, ModelConfig, TrainConfig
from gptoss_jax.data.batches import held_out_batches
from gptoss_jax.data.sources import open_corpus, split
from gptoss_jax.data.token_cache import build_cache
from gptoss_jax.data.tokenizer import make_tokenizer
from gptoss_jax.evaluation.logprobs import token_logprobs
from gptoss_jax.evaluation.perplexity import TextSettings, evaluate_text
from gptoss_jax.model.transformer import bind, init_params
from gptoss_jax.training import losses
from gptoss_jax.training.step import make_eval_step

BYTES = make_tokenizer("bytes")
# Characters of one to four bytes.
TEXTS = ["the cat sat, é€\U0001f642", "aé", "a longer line, and then the end.\t", "\U0001f642"]
SIZES = [22, 3, 33, 4]


@pytest.fixture(scope="module")
def config(tiny_config) -> ModelConfig:
    return dataclasses.replace(tiny_config, vocab_size=263)


@pytest.fixture
def corpus(tmp_path):
    """(texts) -> a corpus with one document for each."""

    def make(texts):
        (tmp_path / "some.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return open_corpus(f"jsonl:{tmp_path}/some.jsonl")

    return make


@pytest.fixture(scope="module")
def brute_force(config, random_params, apply_model):
    """(texts, reach) -> -log p of all tokens, where the prediction of token t attends from `reach(t)` on."""

    def nats(texts, reach):
        rows, targets = [], []
        for text in texts:
            tokens = [256, *text.encode(), 256]
            rows += [tokens[reach(t) : t] for t in range(1, len(tokens))]
            targets += tokens[1:]
        tokens_BT, segment_ids_BT = np.zeros((2, len(rows), max(map(len, rows))), np.int32)
        for b, row in enumerate(rows):
            tokens_BT[b, : len(row)], segment_ids_BT[b, : len(row)] = row, 1
        logits_BTV = apply_model(config, random_params(config), tokens_BT, segment_ids_BT).astype(np.float64)
        last_BV = logits_BTV[np.arange(len(rows)), [len(row) - 1 for row in rows]]
        log_probs_BV = last_BV - np.log(np.sum(np.exp(last_BV), axis=1, keepdims=True))
        return -log_probs_BV[np.arange(len(rows)), targets]

    return nats


@given(st.integers(1, 60), st.integers(2, 20), st.data())
def test_windows_score_every_target_once_with_enough_context(pairs, context, data):
    stride = data.draw(st.integers(1, context))
    seen = []
    for start, length, scored in TextSettings(context, stride).windows(pairs):
        assert 1 <= scored <= length <= context
        for pair in range(start + length - scored, start + length):
            assert pair - start >= min(pair, context - stride)
            seen.append(pair)
    assert seen == list(range(pairs))


def test_windows_by_hand():
    assert TextSettings(6, 4).windows(13).tolist() == [[0, 6, 6], [4, 6, 4], [8, 5, 3]]
    assert TextSettings(6, 4).windows(3).tolist() == [[0, 3, 3]]
    assert TextSettings(3, 1).windows(5).tolist() == [[0, 3, 3], [1, 3, 1], [2, 3, 1]]


@pytest.mark.parametrize(
    ("context", "stride", "batch_size"), [(8, 8, 2), (8, 1, 64), (10, 4, 3), (64, None, None)]
)
def test_matches_plain_loops(config, random_params, corpus, brute_force, context, stride, batch_size):
    settings = TextSettings(context, stride, batch_size)
    stride = stride or context // 2

    def reach(t):
        # Token t is the target of pair t - 1.
        return max(0, -(-(t - context) // stride)) * stride

    expected = brute_force(TEXTS, reach)
    shown = []
    score = evaluate_text(
        bind(config, random_params(config)), BYTES, corpus(TEXTS), settings, lambda *now: shown.append(now)
    )
    # Every byte of each document, and eos.
    assert (score.documents, score.tokens, score.bytes) == (4, sum(SIZES) + 4, sum(SIZES))
    assert score.loss == pytest.approx(expected.mean(), rel=1e-6)
    assert score.perplexity == pytest.approx(math.exp(expected.mean()), rel=1e-5)
    assert score.bits_per_byte == pytest.approx(expected.sum() / math.log(2) / 62, rel=1e-6)
    assert (score.context, score.stride) == (context, stride)
    assert shown[-1] == (66, 66, score.loss)
    assert score.tokens_per_second == 66 / score.seconds


def test_stride_one_sees_a_whole_context(config, random_params, corpus, brute_force):
    text = TEXTS[2]
    score = evaluate_text(bind(config, random_params(config)), BYTES, corpus([text]), TextSettings(5, 1))
    assert score.loss == pytest.approx(brute_force([text], lambda t: max(0, t - 5)).mean(), rel=1e-6)


def test_max_tokens(config, random_params, corpus, brute_force):
    settings = TextSettings(8, 8, max_tokens=21)
    score = evaluate_text(bind(config, random_params(config)), BYTES, corpus(TEXTS), settings)
    expected = brute_force(TEXTS, lambda t: (t - 1) // 8 * 8)[:21]
    # The 21st byte is the third of four of a character.
    assert (score.documents, score.tokens, score.bytes) == (1, 21, 21)
    assert score.loss == pytest.approx(expected.mean(), rel=1e-6)
    settings = dataclasses.replace(settings, max_tokens=25)
    more = evaluate_text(bind(config, random_params(config)), BYTES, corpus(TEXTS), settings)
    # All of the first document with its eos, and two bytes of the second.
    assert (more.documents, more.tokens, more.bytes) == (2, 25, 24)


def test_matches_evaluation_during_training(config, random_params, tmp_path):
    words = np.random.default_rng(0).choice(["and", "thé", "a\n", "whale", "see"], (12, 40))
    (tmp_path / "all.txt").write_text("\n<|endoftext|>\n".join(" ".join(row) for row in words))
    data = DataConfig(
        source=f"text:{tmp_path}/all.txt", tokenizer="bytes", seq_len=32, batch_size=3, val_fraction=0.3,
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    cache = build_cache(data)
    step = make_eval_step(config)
    results = [step(random_params(config), batch) for batch in held_out_batches(cache, data)]
    nats, tokens = np.sum([(sums["loss"], weight) for sums, weight in results], axis=0, dtype=np.float64)
    held = [text for text, is_held in split(open_corpus(data.source).documents(), 0.3) if is_held]
    (tmp_path / "held.txt").write_text("\n<|endoftext|>\n".join(held))
    held_corpus = open_corpus(f"text:{tmp_path}/held.txt")
    score = evaluate_text(bind(config, random_params(config)), BYTES, held_corpus, TextSettings(32, 32))
    assert score.documents == len(held) > 1
    assert (score.tokens, score.bytes) == (tokens, cache.meta["held_out_bytes"])
    assert score.loss == pytest.approx(nats / tokens, rel=1e-6)
    expected = losses.bits_per_byte(nats, cache.meta["held_out_bytes"])
    assert score.bits_per_byte == pytest.approx(expected, rel=1e-6)


def test_token_logprobs_in_chunks(either_config, random_params, apply_model, monkeypatch):
    B, T, V = 3, 14, either_config.vocab_size
    # Chunks of two positions.
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 2 * B * V)
    params = random_params(either_config)
    tokens_BT, targets_BT = np.random.default_rng(0).integers(0, V, (2, B, T), np.int32)
    segment_ids_BT = np.repeat(np.array([[1, 1, 2, 2, 2, 3, 0]] * B, np.int32), 2, axis=1)
    logits_BTV = apply_model(either_config, params, tokens_BT, segment_ids_BT)
    best_BT = np.argmax(logits_BTV, axis=-1)
    targets_BT[:, ::3] = best_BT[:, ::3]
    batch = {"tokens": tokens_BT, "targets": targets_BT, "segment_ids": segment_ids_BT}
    lowered = token_logprobs.lower(either_config, params, batch)
    assert f"{B}x2x{V}xf32" in lowered.as_text() and f"{B}x{T}x{V}xf32" not in lowered.as_text()
    log_probs_BT, greedy_BT = lowered.compile()(params, batch)
    expected = np.take_along_axis(jax.nn.log_softmax(logits_BTV), targets_BT[..., None], -1)[..., 0]
    real = segment_ids_BT > 0
    np.testing.assert_allclose(np.asarray(log_probs_BT)[real], expected[real], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(greedy_BT)[real], (best_BT == targets_BT)[real])
    assert greedy_BT[:, ::3][real[:, ::3]].all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(context=1), "context is 1: must be 2 or more"),
        (dict(context=8, stride=9), "stride is 9: must be at most the context, 8"),
        (dict(stride=0), "stride is 0: must be 1 or more"),
        (dict(stride=193), "stride is 193: must be at most the context, 192"),
        (dict(context=193), "context is 193: must be at most the model's max_position_embeddings, 192"),
        (dict(batch_size=0), "batch_size is 0: must be 1 or more"),
        (dict(max_tokens=0), "max_tokens is 0: must be 1 or more"),
    ],
)
def test_invalid_settings(config, settings, words):
    with pytest.raises(ValueError) as caught:
        TextSettings(**settings).resolve(config)
    assert str(caught.value) == words


def test_invalid_text(config, random_params, corpus):
    with pytest.raises(ValueError, match="^data.source is .*: holds no text$"):
        evaluate_text(bind(config, random_params(config)), BYTES, corpus([" ", ""]), TextSettings(8))
    small = dataclasses.replace(config, vocab_size=255)
    with pytest.raises(ValueError, match="^token id is 256: must be below the model's vocab_size, 255$"):
        evaluate_text(bind(small, random_params(small)), BYTES, corpus(["a"]), TextSettings(8))


# The command.


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A Hugging Face folder with MXFP4 experts."""
    config = ModelConfig(
        vocab_size=263, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, head_dim=16, num_local_experts=5, num_experts_per_tok=2, sliding_window=4,
        max_position_embeddings=96, rope_scaling=None, initializer_range=0.3, compute_dtype="float32",
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "packed"
    save_pretrained(bind(config, init_params(config, jax.random.key(0))), folder, experts="mxfp4")
    BYTES.export(folder)
    return folder


@pytest.fixture(scope="module")
def run_folder(config, random_params, tmp_path_factory):
    """A run folder as written by train.py."""
    folder = tmp_path_factory.mktemp("runs")
    TrainConfig(model=config, data=DataConfig(seq_len=24), run_dir=str(folder)).save(folder / "config.json")
    BYTES.save(folder)
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, random_params(config), {"step": jnp.array(1)}, {"step": 1})
    checkpoints.close()
    return folder


@pytest.fixture
def text(tmp_path):
    (tmp_path / "some.txt").write_text(TEXTS[0] + "\n<|endoftext|>\n" + TEXTS[2])
    return f"text:{tmp_path}/some.txt"


def test_command_with_packed_experts(packed, text, tmp_path, capsys):
    written = tmp_path / "result.json"
    assert main.main(["eval", str(packed), "--source", text, "--json", str(written)]) == 0
    shown = capsys.readouterr()
    result = json.loads(written.read_text())
    assert (result["folder"], result["source"]) == (str(packed), text)
    assert (result["documents"], result["tokens"], result["bytes"]) == (2, 57, 55)
    # The whole context of the model; two short windows.
    assert (result["context"], result["stride"], result["batch_size"]) == (96, 48, 2)
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert result["bits_per_byte"] == pytest.approx(result["loss"] * 57 / 55 / math.log(2))
    assert result["tokens_per_second"] == pytest.approx(57 / result["seconds"])
    lines = shown.out.splitlines()
    assert lines[0] == f"loss           {result['loss']:.4f} nats per token"
    assert lines[2] == f"bits per byte  {result['bits_per_byte']:.4f}"
    assert lines[3:5] == [
        "text           57 tokens, 55 bytes, 2 documents",
        "windows        96 tokens, stride 48",
    ]
    assert len(lines) == 6 and shown.err == ""


def test_command_defaults_to_the_seq_len_of_a_run(run_folder, text, capsys):
    args = [
        "eval",
        str(run_folder),
        "--source",
        text,
        "--stride",
        "24",
        "--batch-size",
        "2",
        "--max-tokens",
        "9",
    ]
    assert main.main(args) == 0
    shown = capsys.readouterr().out
    assert "windows        24 tokens, stride 24\n" in shown and "9 tokens, 9 bytes, 1 document\n" in shown


def test_command_reports_skipped_records(run_folder, corpus, tmp_path, capsys):
    written = tmp_path / "result.json"
    source = corpus(["a", None, "b", None]).source
    assert main.main(["eval", str(run_folder), "--source", source, "--json", str(written)]) == 0
    assert "\nskipped        2 records whose field is null\n" in capsys.readouterr().out
    assert json.loads(written.read_text())["null_records"] == 2
    source = corpus(["a", "\ud800"]).source
    assert main.main(["eval", str(run_folder), "--source", source]) == 2
    message = f"{tmp_path}/some.jsonl:2: field 'text' holds '\\ud800', half of a surrogate pair"
    assert capsys.readouterr().err == f"gptoss: error: {message}\n"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "source is None: give --source, such as text:FILE, or --task"),
        (["--source", "stdlib", "--task", "a"], "task is ['a']: must be left out if there is a source"),
        (["--source", "stdlib", "--limit", "3"], "limit is 3: applies only to a task"),
        (["--task", "a", "--stride", "3"], "stride is 3: applies only to a source"),
        (["--task", "a", "--limit", "0"], "limit is 0: must be 1 or more"),
        (["--source", "stdlib", "--json", "/nowhere/a"], "json is '/nowhere/a': its folder does not exist"),
        (["--source", "text:/nowhere"], "data.source is 'text:/nowhere': no file matches /nowhere"),
        (["--source", "books:a"], "data.source is 'books:a': must be stdlib, text:GLOB, "),
        (["--source", "stdlib", "--context", "1"], "context is 1: must be 2 or more"),
        (["--source", "stdlib"], "nowhere: "),
    ],
)
def test_command_with_bad_arguments(args, words, capsys):
    assert main.main(["eval", "nowhere", *args]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"gptoss: error: {words}") and shown.err.count("\n") == 1
    assert shown.out == ""


def test_tasks_need_lm_eval(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main.main(["eval", "nowhere", "--task", "a"]) == 2
    expected = "gptoss: error: task is 'a': needs lm_eval; pip install 'gptoss-jax[eval]'\n"
    assert capsys.readouterr().err == expected
