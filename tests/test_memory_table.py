"""The tables of memory in docs/comparison.md and README.md are what benchmarks/memory_table.py prints."""

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
def test_the_tables(script, written):
    assert script.table() == written
    short = script.written((ROOT / "README.md").read_text(encoding="utf-8"), script.SHORT)
    assert short in (None, script.short_table())


def test_a_page_without_a_table(script):
    assert script.written("no table") is None
    assert script.written(f"a\n{script.SHORT}\n\n| b |\n\n{script.END}\nc", script.SHORT) == "| b |"
