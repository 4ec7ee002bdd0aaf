"""The package's layers, and the size limits of its files and functions.

A module imports from its own layer and the layers below, never from above and never in a cycle.
"""

import ast
import functools
import graphlib
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

import gptoss_jax

PACKAGE = pathlib.Path(__file__).parents[1] / "gptoss_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
# Bottom to top. Modules outside any folder are on top, except those in MODULES.
FOLDERS = ["config", "kernels", "parallel", "model", "data", "checkpoints", "inference", "training"]
FOLDERS += ["evaluation", "planning", "server", "cli"]
# Standard library only: below everything. `hardware` imports only `config`.
MODULES = dict.fromkeys(("host_memory", "interrupts", "startup", "status", "terminal", "version"), -1)
MODULES["hardware"] = FOLDERS.index("kernels")

# Imported inside a function, on first use: the checks of the kernels import every kernel, and the kernels'
# dispatchers ask `selection` which of them passed.
ALLOWED_CYCLES = {("gptoss_jax.kernels.selection", "gptoss_jax.kernels.check")}
# Modules that import from a private `_src` package: none of JAX, and this one of Orbax.
ALLOWED_PRIVATE = {"gptoss_jax/checkpoints/orbax_patches.py": "orbax.checkpoint._src"}

MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 80
MAX_POSITIONAL = 6
# Pallas passes references by position, one for each table, operand, result and scratch buffer.
REFERENCE_SUFFIXES = ("_ref", "_V")


def module_name(path: pathlib.Path) -> str:
    names = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


MODULE_NAMES = frozenset(map(module_name, FILES))


def layer_of(module: str) -> int:
    """Returns the layer of `gptoss_jax.<folder or module>…`, counted from the bottom."""
    name = module.split(".")[1] if "." in module else ""
    if name in MODULES:
        return MODULES[name]
    return FOLDERS.index(name) if name in FOLDERS else len(FOLDERS)


def imports_of(source: str, package: str) -> Iterator[str]:
    """Yields what a file of `package` imports, at module level or inside functions: the full name of a
    module of ours, `gptoss_jax.<name>` for a public name, else the module that is named."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            above = ".".join(parts) if (parts := parents[: len(parents) - node.level + 1]) else ""
            base = ".".join(filter(None, [above if node.level else "", node.module]))
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if full in MODULE_NAMES or base == "gptoss_jax" else base


def imports_from_above(source: str, module: str, package: str) -> list[str]:
    ours = {name for name in imports_of(source, package) if name.split(".")[0] == "gptoss_jax"}
    return sorted(name for name in ours if layer_of(name) > layer_of(module))


def package_of(path: pathlib.Path) -> str:
    module = module_name(path)
    return module if path.name == "__init__.py" else module.rpartition(".")[0]


def relative(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE.parent).as_posix()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_modules_import_only_from_their_layer_or_below(path):
    assert imports_from_above(path.read_text(), module_name(path), package_of(path)) == []


def test_every_folder_has_a_layer():
    folders = {path.relative_to(PACKAGE).parts[0] for path in FILES if path.parent != PACKAGE}
    assert folders == set(FOLDERS)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from gptoss_jax.training.step import Batch", ["gptoss_jax.training.step"]),
        ("import gptoss_jax.training.losses as l", ["gptoss_jax.training.losses"]),
        ("from gptoss_jax import inference, kernels", ["gptoss_jax.inference"]),
        ("from gptoss_jax import Transformer", ["gptoss_jax.Transformer"]),
        ("from .. import training", ["gptoss_jax.training"]),
        ("from ..data import sources", ["gptoss_jax.data.sources"]),
        ("def f():\n    from gptoss_jax.planning import plan", ["gptoss_jax.planning.plan"]),
        ("import jax\nfrom gptoss_jax.kernels import backend\nfrom gptoss_jax.model.moe import MoE", []),
    ],
)
def test_imports_from_above_are_detected(source, expected):
    assert imports_from_above(source, "gptoss_jax.model.some", "gptoss_jax.model") == expected


def find_cycle(imports: dict[str, set[str]]) -> list[str]:
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_modules_do_not_import_each_other_in_a_cycle():
    imports = {
        module: {
            name
            for name in imports_of(path.read_text(), package_of(path))
            if name in MODULE_NAMES - {module} and (module, name) not in ALLOWED_CYCLES
        }
        for module, path in zip(map(module_name, FILES), FILES, strict=True)
    }
    cycle = find_cycle(imports)
    assert not cycle, " -> ".join(cycle)


def test_cycles_are_detected():
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert set(find_cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}})) == {"a", "b", "c"}


def test_private_modules_of_jax_are_not_used():
    found = {
        (relative(path), name)
        for path in FILES
        for name in imports_of(path.read_text(), package_of(path))
        if "_src" in name.split(".")
    }
    attributes = {(relative(path), "jax._src") for path in FILES if "jax._src" in path.read_text()}
    found = {f"{path} uses {name}" for path, name in (found | attributes) - set(ALLOWED_PRIVATE.items())}
    assert not found, "; ".join(sorted(found))


def test_files_are_short():
    lengths = {relative(path): len(path.read_text().splitlines()) for path in FILES}
    found = [f"{path} has {n} lines" for path, n in lengths.items() if n > MAX_FILE_LINES]
    assert not found, f"at most {MAX_FILE_LINES} are allowed: " + "; ".join(found)


@functools.cache
def functions() -> list[tuple[str, ast.FunctionDef]]:
    """Returns every function of the package, nested ones too, with its file and line."""
    return [
        (f"{relative(path)}:{node.lineno} {node.name}", node)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def positional_parameters(function: ast.FunctionDef) -> list[str]:
    """Returns the names of what is passed by position, without `self`, `cls` and a kernel's references."""
    names = [argument.arg for argument in function.args.posonlyargs + function.args.args]
    return [name for name in names if name not in ("self", "cls") and not name.endswith(REFERENCE_SUFFIXES)]


def test_functions_are_short():
    lengths = {name: node.end_lineno - node.lineno + 1 for name, node in functions()}
    found = [f"{name} has {n} lines" for name, n in lengths.items() if n > MAX_FUNCTION_LINES]
    assert not found, f"at most {MAX_FUNCTION_LINES} are allowed: " + "; ".join(found)


def test_functions_take_few_positional_parameters():
    counts = {name: len(positional_parameters(node)) for name, node in functions()}
    found = [f"{name} takes {n} parameters by position" for name, n in counts.items() if n > MAX_POSITIONAL]
    assert not found, f"at most {MAX_POSITIONAL} are allowed: " + "; ".join(found)


def unannotated(source: str) -> list[str]:
    """Returns the parameters and results without a type, of functions and methods but not of closures."""
    found = []
    for block in ast.walk(tree := ast.parse(source)):
        for node in block.body if isinstance(block, ast.ClassDef) or block is tree else ():
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                args = node.args
                every = [*args.posonlyargs, *args.args, args.vararg, *args.kwonlyargs, args.kwarg]
                names = [one.arg for one in every if one is not None and one.annotation is None]
                is_static = any(getattr(one, "id", "") == "staticmethod" for one in node.decorator_list)
                names = names[isinstance(block, ast.ClassDef) and not is_static :]
                result = ["return"] if node.returns is None and node.name != "__init__" else []
                found += [f"{node.name}: {name}" for name in (*names, *result)]
    return found


def test_signatures_have_types():
    found = [f"{relative(path)} {name}" for path in FILES for name in unannotated(path.read_text())]
    assert not found, "; ".join(found)


def test_a_missing_type_is_found():
    source = """
def one(a, b: int = 0, *c, **d): return lambda x: x
class Some:
    def __init__(self, e): pass
    def two(self, f: int) -> int:
        def closure(g): return g
        return closure(f)
"""
    assert unannotated(source) == ["one: a", "one: c", "one: d", "one: return", "__init__: e"]


def run_python(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", ["gptoss_jax", "gptoss_jax.config"])
def test_importing_the_package_or_config_does_not_import_jax(name):
    code = f"import sys, {name}; print(sorted({{'jax', 'flax', 'optax'}} & set(sys.modules)))"
    assert gptoss_jax.__file__ is not None
    assert run_python(code) == "[]"


@pytest.mark.parametrize(
    "name",
    [
        "Completion",
        "Engine",
        "ModelConfig",
        "SamplingParams",
        "Transformer",
        "from_pretrained",
        "generate",
        "train",
    ],
)
def test_public_names(name):
    assert callable(getattr(gptoss_jax, name))
    assert name in dir(gptoss_jax)
