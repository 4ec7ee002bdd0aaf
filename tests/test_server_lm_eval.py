"""lm_eval's local-completions against a server gives what `gptoss eval` gives."""

import json

import jax
import pytest

pytest.importorskip("lm_eval", reason="pip install -e '.[eval]'")
pytest.importorskip("tenacity", reason="pip install 'lm_eval[api]'")

import datasets  # noqa: E402
import lm_eval  # noqa: E402
from helpers.live_server import live_server  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from gptoss_jax.checkpoints.export import save_pretrained  # noqa: E402
from gptoss_jax.config import ModelConfig  # noqa: E402
from gptoss_jax.data.tokenizer import make_tokenizer  # noqa: E402
from gptoss_jax.evaluation.lm_eval import GptOss  # noqa: E402
from gptoss_jax.model.transformer import bind, init_params  # noqa: E402
from gptoss_jax.server.load import ServeConfig, load_service  # noqa: E402
from gptoss_jax.server.service import Settings  # noqa: E402

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
"""
CHOICE = 'doc_to_choice: "{{choices}}"\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n'
GENERATION = """
generation_kwargs:
  until: ["q"]
  max_gen_toks: 12
metric_list:
  - metric: exact_match
"""
ROLLING = "metric_list:\n  - metric: word_perplexity\n  - metric: bits_per_byte\n"
TASKS = {
    "multiple_choice": CHOICE,
    "generate_until": GENERATION,
    "loglikelihood_rolling": ROLLING,
}
ROWS = [
    {"question": "one and", "choices": [" two", " a", " x"], "answer": 0},
    {"question": "x", "choices": [" y", " zéz", " w"], "answer": 2},
    {"question": "a longer question", "choices": [" r", " s", "t"], "answer": 1},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face folder of a base model that reads bytes."""
    config = ModelConfig(
        vocab_size=263, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, head_dim=16, num_local_experts=5, num_experts_per_tok=2, sliding_window=4,
        max_position_embeddings=64, rope_scaling=None, initializer_range=0.3, compute_dtype="float32",
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "base"
    save_pretrained(bind(config, init_params(config, jax.random.key(0))), folder, experts="float32")
    make_tokenizer("bytes").export(folder)
    return folder


@pytest.fixture(scope="module")
def address(folder):
    service = load_service(ServeConfig(str(folder), slots=2, settings=Settings(prepend_bos=True)))
    service.state = "ready"
    with live_server(service) as address:
        yield address


def evaluated(model, file, **arguments):
    """The metrics of a task, and the raw answers to its requests."""
    # The tasks that come with lm_eval take thousands of files to read.
    manager = TaskManager(include_defaults=False)
    result = lm_eval.simple_evaluate(
        model, tasks=[file], bootstrap_iters=0, task_manager=manager, verbosity="ERROR", **arguments
    )
    (samples,) = result["samples"].values()
    (metrics,) = result["results"].values()
    return {k: v for k, v in metrics.items() if isinstance(v, float)}, [one["resps"] for one in samples]


@pytest.mark.parametrize(
    "kind",
    [
        "multiple_choice",
        pytest.param("generate_until", marks=pytest.mark.slow),
        pytest.param("loglikelihood_rolling", marks=pytest.mark.slow),
    ],
)
def test_a_server_scores_as_gptoss_eval_does(folder, address, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    data, file = tmp_path / "data.jsonl", tmp_path / "task.yaml"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    file.write_text(TASK.format(name=f"task_{kind}", data=data, kind=kind) + TASKS[kind])
    expected, local = evaluated(GptOss(str(folder)), str(file))
    arguments = {
        "model": "base",
        "base_url": f"{address}/v1/completions",
        "tokenizer_backend": "remote",
        "max_length": 63,
        "num_concurrent": 1,
    }
    found, remote = evaluated("local-completions", str(file), model_args=arguments)
    assert found == pytest.approx(expected, rel=1e-5)
    local, remote = jax.tree.leaves(local), jax.tree.leaves(remote)
    assert local == (remote if kind == "generate_until" else pytest.approx(remote, rel=1e-5))
    assert expected
