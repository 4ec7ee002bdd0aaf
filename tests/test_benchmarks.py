"""The benchmarks: the GPU script runs through with toy sizes, and one failure does not stop the rest."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script():
    """Runs Python with these arguments in the folder of the benchmarks; returns what it did."""

    def run(*arguments):
        # One device, as on the machines that the script is for.
        environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        environment |= {"PYTHONPATH": str(FOLDER.parent), "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, cwd=FOLDER, env=environment, capture_output=True, text=True)

    return run


def test_gpu_smoke(script, tmp_path):
    out, before = tmp_path / "gpu.json", set((FOLDER / "results").iterdir())
    done = script("gpu.py", "--smoke", "--only", "peaks", "grouped", "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tokamax: needs a GPU" in done.stdout
    record = json.loads(out.read_text())
    assert record["failures"] == [] and record["settings"]["sections"] == ["peaks", "grouped"]
    assert record["hardware"]["platform"] == "cpu" and record["versions"]["jax"]
    assert record["peaks"]["matmul_flops"]["median"] > 0 and record["peaks"]["bandwidth"]["min"] > 0
    assert {row["form"] for row in record["grouped"]["rows"]} == {
        "triton",
        "XLA ragged_dot",
        "dense, one matrix",
    }
    for row in record["grouped"]["rows"]:
        assert 0 < row["seconds"]["min"] <= row["seconds"]["median"] <= row["seconds"]["max"]
    assert set((FOLDER / "results").iterdir()) == before


BROKEN = """
import sys
import gpu

def broken(run):
    raise ValueError("out of\\n luck")

gpu.SECTIONS = {"first": (broken, 5), "second": (lambda run: {"found": 7}, 5)}
sys.exit(gpu.main(["--smoke", "--out", sys.argv[1]]))
"""


def test_a_section_fails_alone(script, tmp_path):
    done = script("-c", BROKEN, tmp_path / "gpu.json")
    assert done.returncode == 1
    assert "failed: first: ValueError: out of luck" in done.stdout.splitlines()
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert record["failures"] == ["first: ValueError: out of luck"]
    assert record["first"] is None and record["second"] == {"found": 7}


def test_without_a_gpu_it_says_so(script):
    done = script("gpu.py", "--only", "peaks")
    assert done.returncode == 2
    assert "needs a GPU and there is 'cpu'" in done.stderr


NAMES = ["compile_time", "context", "experts", "kernels", "remat", "train_vs_transformers"]


@pytest.mark.parametrize("name", NAMES)
def test_help(name, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    words = module.make_parser().format_help()
    assert f"python benchmarks/{name}.py" in words and "--quick" in words
