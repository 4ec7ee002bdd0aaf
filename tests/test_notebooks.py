"""The notebooks in `examples/`: what is stored, and, marked slow, each executed again with small sizes."""

import json
import os
import pathlib
import re
import runpy
import sys

import nbformat
import pytest
from flax import nnx
from helpers.scripted_engine import tiny_tokenizer
from helpers.xla_flags import FAST_COMPILE

import gptoss_jax as gx
from gptoss_jax.data.sources import open_corpus

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(path.name for path in EXAMPLES.glob("*.ipynb"))
script = runpy.run_path(str(EXAMPLES / "execute.py"))
execute, EXECUTED = script["execute"], script["EXECUTED"]

# What is smaller when tests execute a notebook.
SMALL = {
    "main.ipynb": {
        'open_corpus("stdlib")': 'open_corpus("text:corpus/*.txt")',
        'source="stdlib",': 'source="text:corpus/*.txt",',
        'source="stdlib-chat"': 'source="chat:chat.jsonl"',
        "VOCAB_SIZE = 4096": "VOCAB_SIZE = 512",
        "hidden_size=192": "hidden_size=32",
        "intermediate_size=256": "intermediate_size=32",
        "num_hidden_layers=4": "num_hidden_layers=2",
        "head_dim=48": "head_dim=16",
        "STEPS = 450": "STEPS = 6",
        "SFT_STEPS = 220": "SFT_STEPS = 4",
        "batch_size=8": "batch_size=2",
        "NEW_TOKENS = 90": "NEW_TOKENS = 8",
        "length, count = 256, 24": "length, count = 256, 2",
        "max_new_tokens=40": "max_new_tokens=8",
    },
    "chat_20b.ipynb": {"max_new_tokens=1024": "max_new_tokens=16"},
    "qlora_20b.ipynb": {
        "batch_size=1)": 'batch_size=1, tokenizer=f"file:{MODEL}/tokenizer.json", seq_len=2048)',
        "steps=30,": "steps=2,\n    model=dataclasses.replace("
        'gx.ModelConfig.from_hf(MODEL), expert_format="mxfp4", lora=preset.model.lora),',
        "max_new_tokens=200": "max_new_tokens=16",
    },
}

ABSOLUTE_PATH = re.compile(r"(?<![\w.:/])/(tmp|root|home|Users|work|content|var|mnt)/")
MAX_BYTES = 1_500_000


def read(name):
    return nbformat.read(EXAMPLES / name, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def text_of(notebook):
    """All text of the outputs, without pictures."""
    data = [
        output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs(notebook)
    ]
    return "\n".join(data)


def assert_executed(notebook):
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    # No warnings, neither as a stream nor in one.
    assert not [output.text for output in outputs(notebook) if output.get("name") == "stderr"]
    assert not ABSOLUTE_PATH.search(text_of(notebook))


def test_all_notebooks_are_listed():
    readme = (EXAMPLES / "README.md").read_text()
    assert {*re.findall(r"\((\w+\.ipynb)\)", readme)} == {*NOTEBOOKS} and len(NOTEBOOKS) == 4


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_is_valid(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert (EXAMPLES / name).stat().st_size < MAX_BYTES
    assert notebook.cells[0].source.startswith("# ")
    # Links between notebooks lead somewhere.
    text = "".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert {*re.findall(r"\(([\w.]+\.ipynb)\)", text)} <= {*NOTEBOOKS}


@pytest.mark.parametrize("name", EXECUTED)
def test_stored_outputs_are_those_of_the_sources(name):
    notebook = read(name)
    assert_executed(notebook)
    stale = f"{name} has changed since it was executed; run: python examples/execute.py"
    assert notebook.metadata.get("executed_sources") == script["sources_digest"](notebook), stale


@pytest.mark.parametrize("name", sorted({*NOTEBOOKS} - {*EXECUTED}))
def test_others_have_no_outputs_and_say_why(name):
    notebook = read(name)
    assert not outputs(notebook) and all(cell.execution_count is None for cell in code_cells(notebook))
    assert "stored without outputs" in "".join(cell.source for cell in notebook.cells[:2])


@pytest.mark.parametrize("name", SMALL)
def test_small_sizes_replace_code_that_is_there(name):
    code = "\n".join(cell.source for cell in code_cells(read(name)))
    assert [old for old in SMALL[name] if code.count(old) != 1] == []


@pytest.fixture
def kernel(monkeypatch):
    """The environment of the kernels: one device, this Python's `gptoss` command."""
    monkeypatch.setenv("XLA_FLAGS", FAST_COMPILE)
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"])
    # transformers, which main.ipynb uses where it is installed, asks for ipywidgets.
    monkeypatch.setenv("PYTHONWARNINGS", "ignore:IProgress not found")
    return monkeypatch


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    """A small random chat model in the format of gpt-oss-20b, with a tokenizer."""
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = tiny_tokenizer()
    tokenizer.save(folder / "tokenizer")
    config = gx.ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=16,
    )
    model = gx.Transformer(config, rngs=nnx.Rngs(0))
    gx.save_pretrained(model, folder / "model", experts="mxfp4", tokenizer=folder / "tokenizer")
    return folder / "model"


@pytest.mark.slow
def test_main_and_serve(kernel, tmp_path):
    # A few files that define functions, the first one with heapq's.
    texts = [text for text in open_corpus("stdlib").documents() if "\ndef " in text]
    texts.sort(key=lambda text: "\ndef heappush(" not in text)
    (tmp_path / "corpus").mkdir()
    for number, text in enumerate(texts[:60]):
        (tmp_path / "corpus" / f"{number:02}.txt").write_text(text, encoding="utf-8")
    rows = [{"question": f"What does `f{number}` do?", "answer": "Return a number."} for number in range(80)]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")

    notebook = execute(EXAMPLES / "main.ipynb", tmp_path, SMALL["main.ipynb"])
    assert_executed(notebook)
    pictures = [output for output in outputs(notebook) if "image/png" in output.get("data", {})]
    assert len(pictures) == 11
    text = text_of(notebook)
    assert "step 6/6" in text and "step 4/4" in text and "step 1/6" not in text
    assert re.search(r"float32 .* differ by [0-9.]+e-0[6-9]|float32 .* differ by 0.0e\+00", text)
    # What main has trained is served.
    notebook = execute(EXAMPLES / "serve.ipynb", tmp_path)
    assert_executed(notebook)
    text = text_of(notebook)
    assert "runs/notebook/sft" in text and "the same answers alone: True" in text and "exit code 0" in text


@pytest.mark.slow
def test_chat_20b(kernel, chat_folder, tmp_path):
    kernel.setenv("GPTOSS_JAX_MODEL", str(chat_folder))
    notebook = execute(EXAMPLES / "chat_20b.ipynb", tmp_path, SMALL["chat_20b.ipynb"])
    text = text_of(notebook)
    assert "fits" in text and "The capital of France is" in text
    assert text.count("[") >= 2  # two turns, each with a part


@pytest.mark.slow
def test_qlora_20b(kernel, chat_folder, tmp_path):
    kernel.setenv("GPTOSS_JAX_MODEL", str(chat_folder))
    notebook = execute(EXAMPLES / "qlora_20b.ipynb", tmp_path, SMALL["qlora_20b.ipynb"])
    text = text_of(notebook)
    assert "parameters are trained" in text and "experts packed in MXFP4" in text and "step 2/2" in text
    peft = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert peft["r"] == 8 and (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    merged = gx.ModelConfig.from_hf(tmp_path / "merged")
    assert merged.hidden_size == 64 and merged.lora is None
