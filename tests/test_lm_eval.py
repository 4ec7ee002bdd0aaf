"""The lm_eval adapter: log-likelihoods against the plain model, and tasks from files."""

import json
import math
import shutil

import jax
import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="pip install -e '.[eval]'")

import datasets  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # noqa: E402

from gptoss_jax.checkpoints.export import save_pretrained  # noqa: E402
from gptoss_jax.cli import main  # noqa: E402
from gptoss_jax.config import ModelConfig  # noqa: E402
from gptoss_jax.data.tokenizer import make_tokenizer  # noqa: E402
from gptoss_jax.evaluation.lm_eval import GptOss, evaluate_tasks  # noqa: E402
from gptoss_jax.evaluation.logprobs import token_logprobs  # noqa: E402
from gptoss_jax.inference.generate import generate  # noqa: E402
from gptoss_jax.inference.sampling_params import SamplingParams  # noqa: E402
from gptoss_jax.model.transformer import bind, init_params  # noqa: E402

BYTES = make_tokenizer("bytes")
BOS = BYTES.bos_id
PAIRS = [
    ("the cat", " sat"),
    ("", "é€"),
    ("a longer context than the others have", " and its end"),
    ("x", "y"),
]
CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""
GENERATION = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: ["{until}"]
  max_gen_toks: 9
metric_list:
  - metric: exact_match
"""


@pytest.fixture(scope="module")
def config():
    return ModelConfig(
        vocab_size=263, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, head_dim=16, num_local_experts=5, num_experts_per_tok=2, sliding_window=4,
        max_position_embeddings=64, rope_scaling=None, initializer_range=0.3, compute_dtype="float32",
    )  # fmt: skip


@pytest.fixture(scope="module")
def params(config):
    return init_params(config, jax.random.key(0))


@pytest.fixture(scope="module")
def complete(config, params):
    """(texts, max_new_tokens, stop tokens) -> the greedy continuation of each."""

    def tokens(texts, max_new_tokens, stop_tokens=()):
        sampling = SamplingParams(max_new_tokens=max_new_tokens, stop_tokens=stop_tokens)
        answers = generate(bind(config, params), [[BOS, *text.encode()] for text in texts], sampling)
        return [answer.tokens for answer in answers]

    return tokens


@pytest.fixture(scope="module")
def folder(config, params, tmp_path_factory):
    """A Hugging Face folder of a base model."""
    folder = tmp_path_factory.mktemp("models") / "base"
    save_pretrained(bind(config, params), folder, experts="float32")
    BYTES.export(folder)
    return folder


@pytest.fixture(scope="module")
def log_probs(config, params, apply_model):
    """(context tokens, tokens) -> the log-probability of each token, and whether it is the most likely
    one."""

    def score(before, tokens):
        row_BT = np.array([(before + tokens)[:-1]])
        logits_TV = apply_model(config, params, row_BT)[0].astype(np.float64)[len(before) - 1 :]
        log_probs_TV = logits_TV - np.log(np.exp(logits_TV).sum(axis=-1, keepdims=True))
        best = np.argmax(logits_TV, axis=-1)
        return log_probs_TV[np.arange(len(tokens)), tokens], best == tokens

    return score


def asked(kind, *arguments):
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_log_likelihoods_match_the_plain_model(folder, log_probs, batch_size):
    found = GptOss(str(folder), batch_size).loglikelihood(
        [asked("loglikelihood", *pair) for pair in PAIRS], True
    )
    for (before, after), (total, is_greedy) in zip(PAIRS, found, strict=True):
        scores, best = log_probs([BOS, *before.encode()], list(after.encode()))
        assert total == pytest.approx(scores.sum(), rel=1e-5)
        assert is_greedy == best.all()


def test_long_inputs_are_truncated_at_the_start(folder, log_probs):
    context, continuation = PAIRS[2]
    model = GptOss(str(folder), max_length=16)
    ((total, _),) = model.loglikelihood([asked("loglikelihood", context, continuation)], True)
    # Sixteen tokens are read: all but the last of the continuation, and the end of the context.
    tokens = list((context + continuation).encode())[-17:]
    count = len(continuation)
    assert total == pytest.approx(log_probs(tokens[:-count], tokens[-count:])[0].sum(), rel=1e-5)
    with pytest.raises(ValueError, match="tokens to score is 17: must be at most max_length, 16"):
        model.loglikelihood([asked("loglikelihood", "a", "b" * 17)], True)


def test_few_programs_are_compiled(folder):
    model = GptOss(str(folder), batch_size=2)
    token_logprobs.clear_cache()
    for longest in (3, 9, 31, 40, 62):
        texts = [asked("loglikelihood", "a" * length, "b") for length in range(1, longest)]
        model.loglikelihood(texts, True)
    # Rows of 32 and of 64 tokens.
    assert token_logprobs._cache_size() == 2


def test_is_greedy(complete, folder):
    (tokens,) = complete(["a"], 5)
    model = GptOss(str(folder))
    requests = [(None, [BOS, 97], tokens), (None, [BOS, 97], [*tokens[:4], (tokens[4] + 1) % 256])]
    assert [is_greedy for _, is_greedy in model._loglikelihood_tokens(requests, True)] == [True, False]


def test_rolling_log_likelihoods(folder, log_probs):
    texts = ["short", "a text that is far longer than the twelve tokens of a row", "é"]
    model = GptOss(str(folder), max_length=12)
    found = model.loglikelihood_rolling([asked("loglikelihood_rolling", text) for text in texts], True)
    for text, total in zip(texts, found, strict=True):
        windows = get_rolling_token_windows(list(text.encode()), BOS, 12, 1)
        scores = [log_probs(*make_disjoint_window(window))[0] for window in windows]
        assert sum(map(len, scores)) == len(text.encode())
        assert total == pytest.approx(np.concatenate(scores).sum(), rel=1e-5)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_answers_end_before_stop_strings(complete, folder, batch_size):
    prompts = ["one", "another prompt", "x"]
    tokens = complete(prompts, 12, [BOS])
    texts = [BYTES.decode([t for t in row if t < 257]) for row in tokens]
    # A character that occurs once in the first answer.
    until = next(c for c in texts[0] if c != "\ufffd" and texts[0].index(c) > 0)
    settings = {"until": [until], "max_gen_toks": 12}
    found = GptOss(str(folder), batch_size).generate_until(
        [asked("generate_until", prompt, settings) for prompt in prompts], True
    )
    assert found[0] == texts[0][: texts[0].index(until)]
    assert found == [text.split(until)[0] for text in texts]


def test_answers_end_at_every_stop_token(complete, folder, tmp_path):
    (tokens,) = complete(["one"], 12)
    text = next(token for token in tokens if token < 128)
    end = tokens.index(text)
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": [text, BOS]}))
    requests = [asked("generate_until", "one", {"until": [], "max_gen_toks": 12})]
    (found,) = GptOss(str(tmp_path / "model")).generate_until(requests, True)
    # The token is text, and counts as such in lm_eval's own adapters.
    assert found == BYTES.decode([token for token in tokens[: end + 1] if token < 257])


def test_the_default_number_of_tokens_leaves_room_for_the_question(config, folder):
    assert config.max_position_embeddings == 64
    model = GptOss(str(folder))
    prompt, sampling = model._prepare(3, "a question", {"until": [".", ""]})
    assert sampling == SamplingParams(max_new_tokens=32, seed=3, stop_tokens=[BOS], stop_strings=".")
    assert prompt == [BOS, *b"a question"]


def test_sampled_answers(folder):
    settings = {"do_sample": True, "temperature": 2.0, "top_k": 40, "max_gen_toks": 9, "until": []}
    requests = [asked("generate_until", prompt, settings) for prompt in ("a", "a", "b c", "a")]
    found = [GptOss(str(folder), batch_size).generate_until(requests, True) for batch_size in (None, 1, 3)]
    assert found[0] == found[1] == found[2]
    # Repeating a prompt asks for another answer.
    assert len({found[0][i] for i in (0, 1, 3)}) == 3


@pytest.fixture
def task(tmp_path, monkeypatch):
    """(template, rows, others) -> the YAML file of a task, with its data beside it; nothing is downloaded."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

    def make(template, rows, **others):
        data, file = tmp_path / "data.jsonl", tmp_path / "task.yaml"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        file.write_text(template.format(name="a_task_of_mine", data=data, **others))
        return str(file)

    return make


def test_a_task_of_choices_from_a_file(folder, log_probs, task, tmp_path, capfd):
    rows, right = [], 0
    for question, choices, answer in (
        ("one and", [" two", " a"], 0),
        ("x", [" y", " z", " w"], 2),
        ("q", [" r", " s"], 1),
    ):
        totals = [log_probs([BOS, *question.encode()], list(c.encode()))[0].sum() for c in choices]
        right += int(np.argmax(totals)) == answer
        rows.append({"question": question, "choices": choices, "answer": answer})
    # lm_eval inserts a space between question and choice.
    file = task(CHOICE + 'target_delimiter: ""\n', rows)
    written = tmp_path / "result.json"
    assert main.main(["eval", str(folder), "--task", file, "--json", str(written)]) == 0
    result = json.loads(written.read_text())
    assert result["results"]["a_task_of_mine"]["acc,none"] == pytest.approx(right / 3)
    assert "a_task_of_mine" in capfd.readouterr().out
    few = evaluate_tasks(str(folder), [file], limit=1, num_fewshot=2)
    assert few["n-samples"]["a_task_of_mine"]["effective"] == 1
    assert few["n-shot"] == {"a_task_of_mine": 2}


def test_a_task_of_answers_from_a_file(complete, folder, task):
    questions = ["one", "two and three"]
    tokens = complete(questions, 9, [BOS])
    texts = [BYTES.decode([t for t in row if t < 257]) for row in tokens]
    rows = [{"question": q, "answer": a} for q, a in zip(questions, (texts[0], "never"), strict=True)]
    found = evaluate_tasks(str(folder), [task(GENERATION, rows, until="never there")])
    assert found["results"]["a_task_of_mine"]["exact_match,none"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--task", "no_such_task_of_mine"],
            "task is 'no_such_task_of_mine': must be a YAML file, or a task",
        ),
        (["--task", "nowhere.yaml"], "task is 'nowhere.yaml': must be a YAML file, or a task"),
    ],
)
def test_unknown_tasks(folder, arguments, words, capsys):
    assert main.main(["eval", str(folder), *arguments]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"gptoss: error: {words}") and shown.count("\n") == 1


def test_unsupported_settings(folder):
    model = GptOss(str(folder))
    for settings, words in (
        ({"num_beams": 3}, r"generation_kwargs.num_beams is 3: is not supported"),
        ({"max_gen_toks": 64}, r"generation_kwargs.max_gen_toks is 64: must be from 1 to 63"),
    ):
        with pytest.raises(ValueError, match=words):
            model.generate_until([asked("generate_until", "a", settings)], True)
    with pytest.raises(
        ValueError, match="max_length is 65: must be at most the model's max_position_embeddings"
    ):
        GptOss(str(folder), max_length=65)
    assert math.isfinite(model.loglikelihood([asked("loglikelihood", "a", "b")], True)[0][0])
