"""The floors of the package: a file imports from its own floor and from those below, never from above."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

import gptoss_jax

PACKAGE = pathlib.Path(__file__).parent.parent / "gptoss_jax"
# From the ground up; what lies in no folder is on top.
FLOORS = ["config", "kernels", "parallel", "model", "data", "checkpoints", "inference", "training"]
FLOORS += ["evaluation", "planning", "cli"]
FILES = sorted(PACKAGE.rglob("*.py"))


def floor_of(module: str) -> int:
    """The floor of `gptoss_jax.<folder>…`, counted from the ground."""
    first = module.split(".")[1] if "." in module else ""
    if first in ("startup", "terminal"):  # standard library only
        return -1
    if first == "hardware":  # imports only config
        return FLOORS.index("kernels")
    return FLOORS.index(first) if first in FLOORS else len(FLOORS)


def module_of(path: pathlib.Path) -> str:
    names = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def imported(source: str, package: str) -> set[str]:
    """The modules of ours that a file of `package` names in any import, inside of functions too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                above = ".".join(parts[: len(parts) - node.level + 1])
                base = f"{above}.{base}" if base else above
            # `from gptoss_jax import model` names the folder in its list.
            names |= {f"{base}.{alias.name}" for alias in node.names} if base == "gptoss_jax" else {base}
    return {name for name in names if name.split(".")[0] == "gptoss_jax"}


def broken_floors(source: str, module: str, package: str) -> list[str]:
    return sorted(name for name in imported(source, package) if floor_of(name) > floor_of(module))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_its_own_floor_or_those_below(path):
    module = module_of(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    assert broken_floors(path.read_text(), module, package) == []


def test_every_folder_has_a_floor():
    folders = {path.relative_to(PACKAGE).parts[0] for path in FILES if path.parent != PACKAGE}
    assert folders == set(FLOORS)


@pytest.mark.parametrize(
    ("source", "broken"),
    [
        ("from gptoss_jax.training.step import Batch", ["gptoss_jax.training.step"]),
        ("import gptoss_jax.training.losses as l", ["gptoss_jax.training.losses"]),
        ("from gptoss_jax import inference, kernels", ["gptoss_jax.inference"]),
        ("from gptoss_jax import Transformer", ["gptoss_jax.Transformer"]),
        ("from .. import training", ["gptoss_jax.training"]),
        ("from ..data import sources", ["gptoss_jax.data"]),
        ("def f():\n    from gptoss_jax.planning import plan", ["gptoss_jax.planning"]),
        ("import jax\nfrom gptoss_jax.kernels import x\nfrom gptoss_jax.model.moe import MoE", []),
    ],
)
def test_a_breach_is_seen(source, broken):
    assert broken_floors(source, "gptoss_jax.model.some", "gptoss_jax.model") == broken


def run(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", ["gptoss_jax", "gptoss_jax.config"])
def test_importing_these_imports_no_jax(name):
    code = f"import sys, {name}; print(sorted({{'jax', 'flax', 'optax'}} & set(sys.modules)))"
    assert gptoss_jax.__file__ is not None
    assert run(code) == "[]"


@pytest.mark.parametrize(
    "name",
    ["Completion", "ModelConfig", "SamplingParams", "Transformer", "from_pretrained", "generate", "train"],
)
def test_public_names(name):
    assert callable(getattr(gptoss_jax, name))
    assert name in dir(gptoss_jax)
