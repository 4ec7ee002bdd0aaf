"""The benchmarks of the GPU and of decoding run with tiny sizes, a failed section does not stop the others,
and the bytes of a decoding step are counted right."""

import dataclasses
import importlib.util
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from helpers.xla_flags import FAST_COMPILE

from gptoss_jax.config import ModelConfig
from gptoss_jax.model.transformer import bind

FOLDER = pathlib.Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script():
    """Runs Python with these arguments in the folder of the benchmarks."""

    def run(*arguments):
        # One device, as on the machines that the scripts are for.
        environment = os.environ | {"XLA_FLAGS": FAST_COMPILE}
        environment |= {"PYTHONPATH": str(FOLDER.parent), "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, cwd=FOLDER, env=environment, capture_output=True, text=True)

    return run


@pytest.mark.slow
def test_gpu_smoke(script, tmp_path):
    out, before = tmp_path / "gpu.json", set((FOLDER / "results").iterdir())
    sections = ["peaks", "grouped", "generation", "released"]
    done = script("gpu.py", "--smoke", "--only", *sections, "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tokamax: needs a GPU" in done.stdout
    record = json.loads(out.read_text())
    assert record["failures"] == [] and record["settings"]["sections"] == sections
    assert record["hardware"]["platform"] == "cpu" and record["versions"]["jax"]
    assert record["peaks"]["matmul_flops"]["median"] > 0 and record["peaks"]["bandwidth"]["min"] > 0
    assert {row["form"] for row in record["grouped"]["rows"]} == {
        "triton",
        "XLA ragged_dot",
        "dense, one matrix",
    }
    for row in record["grouped"]["rows"]:
        assert 0 < row["seconds"]["min"] <= row["seconds"]["median"] <= row["seconds"]["max"]
    rows = [(row["model"], row["batch"]) for row in record["generation"]["rows"] + record["released"]["rows"]]
    assert rows == [(name, batch) for name in ("tiny", "tiny, packed", "tiny") for batch in (1, 2)]
    assert set((FOLDER / "results").iterdir()) == before


BROKEN = """
import sys
import gpu

def broken(run):
    raise ValueError("out of\\n luck")

gpu.SECTIONS = {"first": (broken, 5), "second": (lambda run: {"found": 7}, 5)}
sys.exit(gpu.main(["--smoke", "--only", "first", "second", "--out", sys.argv[1]]))
"""


def test_a_failed_section_does_not_stop_the_others(script, tmp_path):
    done = script("-c", BROKEN, tmp_path / "gpu.json")
    assert done.returncode == 1
    assert "failed: first: ValueError: out of luck" in done.stdout.splitlines()
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert record["failures"] == ["first: ValueError: out of luck"]
    assert record["first"] is None and record["second"] == {"found": 7}


def test_begins_with_the_check_of_the_kernels(module, monkeypatch, capsys, tmp_path):
    gpu, commands, codes = module("gpu"), [], iter([0, 1, None])

    def run(command, env, timeout, check):
        commands.append(command[1:-1])
        pathlib.Path(command[-1]).write_text('{"device": "here", "results": []}')
        if (code := next(codes)) is None:
            raise subprocess.TimeoutExpired(command, timeout)
        return types.SimpleNamespace(returncode=code)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(gpu, "SECTIONS", {"some": (lambda run: commands.append("some"), 5)})
    out = tmp_path / "gpu.json"
    assert gpu.main(["--smoke", "--out", str(out)]) == 0
    assert commands == [["-m", "gptoss_jax", "check", "--json"], "some"]
    assert json.loads(out.read_text())["check"] == {"device": "here", "results": []}
    for message in ("check: exit code 1", "check: exit code none after 120 s"):
        assert gpu.main(["--smoke", "--only", "check", "--out", str(out)]) == 1
        assert f"failed: {message}" in capsys.readouterr().out
        assert json.loads(out.read_text())["failures"] == [message]
    assert len(commands) == 4


def test_needs_a_gpu(script):
    done = script("gpu.py", "--only", "peaks")
    assert done.returncode == 2
    assert "needs a GPU that JAX finds; --smoke runs it on CPU" in done.stderr


@pytest.fixture
def module(monkeypatch):
    """Loads the module of a benchmark."""

    def load(name):
        monkeypatch.syspath_prepend(FOLDER)
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def test_a_restarted_benchmark_can_be_stopped(script):
    code = "import os, signal, common; common.keep_memory(); os.kill(os.getpid(), signal.SIGTERM); print(7)"
    done = script("-c", code)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "")


@pytest.mark.slow
def test_decode_limit_quick(script):
    before = set((FOLDER / "results").iterdir())
    done = script("decode_limit.py", "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "small, float32, batch 2" in done.stdout and "small, mxfp4, batch 2" in done.stdout
    assert "small: fastest: " in done.stdout
    assert set((FOLDER / "results").iterdir()) == before


@pytest.mark.slow
def test_sampling_quick(script):
    done = script("sampling.py", "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "300, 1, greedy" in done.stdout and "300, 8, top-k 50, top-p 0.9" in done.stdout


@pytest.mark.parity
def test_decode_vs_transformers_quick(script):
    pytest.importorskip("transformers", reason="the peer: pip install -e '.[parity]'")
    done = script("decode_vs_transformers.py", "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 top-2, batch 2, prefill" in done.stdout and "4 top-2, batch 2, decode" in done.stdout
    assert "4 experts, batch 2: 10 of 10 greedy tokens are the same on both sides" in done.stdout


@pytest.mark.slow
def test_serve_load_quick(script):
    done = script("serve_load.py", "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "'num_requests_running': 0.0, 'num_requests_waiting': 0.0" in done.stdout
    assert "'same_answer': True" in done.stdout
    assert "8 clients" in done.stdout and "Poisson, " in done.stdout
    assert "tokens/s of 8 clients / engine's batch 8, decoding: " in done.stdout


@pytest.mark.parity
def test_serve_vs_llamacpp_quick(script):
    for name in ("xllamacpp", "gguf"):
        pytest.importorskip(name, reason="the peer: pip install xllamacpp gguf")
    done = script("serve_vs_llamacpp.py", "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 top-2, mxfp4, 2 clients" in done.stdout
    assert "4 experts, float32: 12 of 12 greedy tokens are the same on both sides" in done.stdout


def test_figures_of_a_load(module):
    serving = module("serving")
    # Three tokens after 1 s, two more 0.5 s later; and one token after 3 s.
    answers = [serving.Answer(10.0, [(11.0, 3), (11.5, 2)]), serving.Answer(10.5, [(13.5, 1)])]
    found = serving.figures(answers)
    assert found["tokens_per_second"] == 6 / 3.5 and found["requests_per_second"] == 2 / 3.5
    assert (found["ttft_p50"], found["ttft_p90"]) == (2000, 2800)
    # Two tokens came 0.5 s after the first event.
    assert (found["itl_p50"], found["tpot_p99"]) == (500, 250)


def test_packed_experts_in_the_order_of_gguf(module, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", types.SimpleNamespace(GGUFWriter=None))
    values = np.arange(64).reshape(1, 1, 2, 32) % 16
    blocks = (values[..., ::2] | values[..., 1::2] << 4).astype(np.uint8)
    scales = np.array([[[120, 121]]], np.uint8)
    packed = module("llamacpp").pack_mxfp4(blocks, scales).reshape(2, 17)
    assert packed[:, 0].tolist() == [120, 121]
    nibbles = np.concatenate([packed[:, 1:] & 15, packed[:, 1:] >> 4], axis=1)
    np.testing.assert_array_equal(nibbles, values[0, 0])


@pytest.mark.parametrize(
    "form, itemsize, expected",
    [
        # Outside the experts: 2 layers of 768 in attention's matrices, 48 in its biases, 2 sinks, 165 in
        # the router and 64 in norms; the last norm's 32 and the head's 224: 2,350. Slots: 3 sequences of 6 in
        # the sliding layer and 10 in the full one, 8 values each: 384. Experts: 2 layers of 4, of 6,144 and
        # 160 in biases.
        ("plain", 4, 4 * (2350 + 384) + 8 * 4 * (6144 + 160)),
        ("mxfp4", 2, 2 * (2350 + 384) + 8 * (6144 // 2 + 6144 // 32 + 2 * 160)),
    ],
)
def test_bytes_of_a_step(module, form, itemsize, expected):
    config = ModelConfig(
        vocab_size=7,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        num_local_experts=5,
        num_experts_per_tok=2,
        sliding_window=6,
        expert_format=form,
    )
    assert (
        module("decoding").step_bytes(config, batch=3, context=10, experts=4, itemsize=itemsize) == expected
    )


def test_mean_bytes_of_a_completion(module, tiny_config):
    decoding = module("decoding")
    # Three tokens after a prompt of 5: the steps for the last two see 6 and 7.
    both = [decoding.step_bytes(tiny_config, 2, context, 3.5) for context in (6, 7)]
    assert decoding.mean_step_bytes(tiny_config, 2, prompt=5, new=3, experts=3.5) == sum(both) / 2
    # Two layers are full, 2 sequences, 2 heads of 8, keys and values, 4 bytes.
    assert both[1] - both[0] == 2 * 2 * 2 * 8 * 2 * 4


def test_experts_of_a_step(module, tiny_config, random_params):
    decoding, params = module("decoding"), random_params(tiny_config)
    config = dataclasses.replace(tiny_config, num_local_experts=4)
    assert decoding.expected_experts(config, 1) == 2 and decoding.expected_experts(config, 2) == 3
    rows = np.asarray([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]], np.int32)
    # The same row twice uses the experts of one row.
    assert decoding.measured_experts(tiny_config, params, rows[[0, 0]], prompt=3) == 2

    @jax.jit
    def load(tokens_BT):
        return bind(tiny_config, params).hidden_states(tokens_BT)[2]["load"]

    def experts_of_last_token(row_T):
        return np.asarray(load(row_T[None]) * len(row_T) - load(row_T[None, :-1]) * (len(row_T) - 1)) > 0.1

    union_LE = experts_of_last_token(rows[0]) | experts_of_last_token(rows[1])
    expected = union_LE.sum() / tiny_config.num_hidden_layers
    assert 2 < expected <= 4
    assert decoding.measured_experts(tiny_config, params, rows, prompt=4) == expected


def test_tokens_before_a_difference(module):
    same = module("decode_vs_transformers").same_before_difference
    assert same([[1, 2, 3], [4, 5, 6]], [[1, 2, 9], [7, 5, 6]]) == 2
    assert same([[1, 2, 3]], [[1, 2, 3]]) == 3


def test_packed_and_padded_rows_have_the_same_examples(module, tmp_path):
    finetune, file = module("finetune"), tmp_path / "rows.jsonl"
    rows = [{"instruction": f"Count to {i}.", "input": "", "output": "1 2 3 " * i} for i in range(1, 41)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    batches = finetune.batches_of(str(file), str(tmp_path / "cache"), rows=2, length=512, rounds=10)
    found = {kind: set() for kind in batches}
    for kind, batch in ((kind, batch) for kind, some in batches.items() for batch in some):
        segments = batch["segment_ids"]
        for row, segment in itertools.product(range(len(segments)), range(1, segments.max() + 1)):
            place = row, segments[row] == segment
            positions = batch["positions"][place].tolist()
            assert positions == list(range(len(positions)))
            example = [batch[name][place].tolist() for name in ("tokens", "targets", "loss_weights")]
            found[kind] |= {str(example)} if positions else set()
    assert found["packed"] == found["padded"] == found["padded to the longest"]
    # One of the 40 rows is held out.
    assert len(found["packed"]) == 39
    assert {batch["tokens"].shape for batch in batches["packed"]} == {(2, 512)}
    assert {batch["tokens"].shape for batch in batches["padded"]} == {(5, 512)}
    for batch in batches["padded to the longest"]:
        padding = batch["segment_ids"] == 0
        assert padding.shape[0] == 5 and padding.shape[1] % 64 == 0 and padding.sum(axis=1).min() < 64


NAMES = ["compile_time", "context", "decode_limit", "decode_vs_transformers", "experts", "kernels", "remat"]
NAMES += ["finetune", "sampling", "serve_load", "serve_vs_llamacpp", "train_vs_transformers"]


@pytest.mark.parametrize(
    "name", [*NAMES, "finetune", "sampling", "serve_load", "serve_vs_llamacpp", "train_vs_transformers"]
)
def test_help(name, module):
    text = module(name).make_parser().format_help()
    assert f"python benchmarks/{name}.py" in text and "--quick" in text
