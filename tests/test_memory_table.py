"""The table of memory in docs/comparison.md is what benchmarks/memory_table.py prints."""

import importlib.util
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("memory_table", ROOT / "benchmarks" / "memory_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def written(script):
    return script.written((ROOT / "docs" / "comparison.md").read_text(encoding="utf-8"))


def test_every_task_has_a_row(script, written):
    names = [line.split(" | ")[0].strip("| ") for line in written.splitlines()[2:]]
    assert names == [task.name for task in script.tasks()] and len(names) == 14


@pytest.mark.parametrize("name", ["20b: chat, 8,192 tokens", "20b: QLoRA"])
def test_a_row(script, written, name):
    (task,) = (task for task in script.tasks() if task.name == name)
    assert script.row(task) in written.splitlines()


@pytest.mark.slow
def test_the_table(script, written):
    assert script.table() == written
