"""All measured figures of the docs: python benchmarks/figures.py [--run all] [--write] [--check].

Each table of measured or compiled figures in README.md and docs/ is made from a file in results/, between two
comments; other figures name their command or test. `--run` runs benchmarks on this machine, one after the
other, which write these files: names of BENCHMARKS, or `all`. Run nothing else meanwhile. One that fails is
reported, the others still run, and the exit code is 1. `--write` puts the tables into the pages. `--check`
exits with 1 if a page differs from the results. Without flags, the tables are printed.

`--python` and `--llamacpp-python` are the interpreters of environments with the peers: the first has this
package, `.[parity]` and peft; the second xllamacpp and gguf. Default: this one. The figures of the TPU
compiler are not measured here: scaling.py and tpu_compile.py compile them.
"""

import argparse
import dataclasses
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import figures_kernels
import figures_serving
import figures_speed
import page_blocks
from common import RESULTS

ROOT = pathlib.Path(__file__).parents[1]
TORCH, LLAMACPP = "torch", "llama.cpp"


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A script of this folder, and how `--run` runs it."""

    arguments: tuple[str, ...] = ()
    peer: str | None = None  # whose environment it needs


BENCHMARKS = {
    "train_vs_transformers": Benchmark(peer=TORCH),
    "optimizer": Benchmark(),
    "bfloat16": Benchmark(),
    "finetune": Benchmark(peer=TORCH),
    "decode_vs_transformers": Benchmark(peer=TORCH),
    "decode_limit": Benchmark(),
    "serve_vs_llamacpp": Benchmark(peer=LLAMACPP),
    "serve_load": Benchmark(),
    "serve_prefixes": Benchmark(),
    "sampling": Benchmark(),
    "kernels": Benchmark(),
    "experts": Benchmark(),
    "context": Benchmark(),
    "remat": Benchmark(),
    "compile_time": Benchmark(),
    "load": Benchmark(),
}
# Name of a generated part -> its results and the function of them that makes it.
PARTS: dict[str, tuple[tuple[str, ...], Callable[..., str]]] = {
    "speed": (("train_vs_transformers", "decode_vs_transformers"), figures_speed.speed),
    "training": (("train_vs_transformers",), figures_speed.training),
    "optimizer": (("optimizer",), figures_speed.optimizer),
    "bfloat16": (("bfloat16",), figures_speed.bfloat16),
    "fine-tuning": (("finetune",), figures_speed.fine_tuning),
    "packed-rows": (("finetune",), figures_speed.packed_rows),
    "decoding": (("decode_vs_transformers",), figures_speed.decoding),
    "decoding-limit": (("decode_limit",), figures_speed.decoding_limit),
    "llamacpp": (("serve_vs_llamacpp",), figures_serving.llamacpp),
    "load": (("serve_load_128_128",), figures_serving.load),
    "prefixes": (("serve_prefixes",), figures_serving.prefixes),
    "sampling": (("sampling",), figures_serving.sampling),
    "grouped-matmul": (("kernels",), figures_kernels.grouped_matmul),
    "attention": (("kernels",), figures_kernels.attention),
    "loss": (("kernels",), figures_kernels.loss),
    "experts": (("experts",), figures_speed.more_experts),
    "long-rows": (("context",), figures_speed.long_rows),
    "remat": (("remat",), figures_speed.remat),
    "compile-time": (("compile_time",), figures_speed.compile_time),
    "loading": (("load",), figures_serving.loading),
    "compiled-kernels": (("tpu_compile",), figures_kernels.compiled_kernels),
    "compiled-generation": (("tpu_compile",), figures_kernels.compiled_generation),
    "training-memory": (("scaling",), figures_kernels.training_memory),
    "fine-tuning-memory": (("scaling",), figures_kernels.fine_tuning_memory),
}


def make(name: str) -> str:
    """Returns the text of a generated part, which says so if there are no results yet.

    Raises ValueError for an unknown name.
    """
    if name not in PARTS:
        raise ValueError(f"figures: {name}: no such part; known: {', '.join(PARTS)}")
    files, function = PARTS[name]
    paths = [RESULTS / f"{file}.json" for file in files]
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        return f"*Not measured yet: no `benchmarks/results/{missing[0]}`.*"
    return function(*(json.loads(path.read_text(encoding="utf-8")) for path in paths))


def pages() -> Iterator[tuple[pathlib.Path, str]]:
    """Yields the path and text of each page with generated parts."""
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        text = path.read_text(encoding="utf-8")
        if page_blocks.written(text):
            yield path, text


def run(names: list[str], pythons: dict[str | None, str]) -> list[str]:
    """Runs benchmarks; returns the names of those that failed."""
    failed = []
    for name in names:
        benchmark, start = BENCHMARKS[name], time.monotonic()
        python = pythons[TORCH] if benchmark.peer == TORCH else sys.executable
        more = ("--peer-python", pythons[LLAMACPP]) if benchmark.peer == LLAMACPP else ()
        command = [python, str(pathlib.Path(__file__).with_name(f"{name}.py")), *benchmark.arguments, *more]
        print(f"\n{name}", flush=True)
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
        print(f"{name}: {time.monotonic() - start:.0f} s{', failed' * (name in failed)}", flush=True)
    return failed


def differing() -> list[str]:
    """Returns a line for each part of a page that is not what the results say."""
    return [
        f"{path.relative_to(ROOT)}: figures: {name} differ from benchmarks/results"
        for path, page in pages()
        for name, text in page_blocks.written(page).items()
        if text != make(name)
    ]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ["all", *BENCHMARKS]
    parser.add_argument("--run", nargs="+", choices=names, default=[], metavar="NAME", help=", ".join(names))
    parser.add_argument("--write", action="store_true", help="put the tables into the pages")
    parser.add_argument("--check", action="store_true", help="fail if a page differs from the results")
    for flag, what in (("--python", "torch, transformers, peft"), ("--llamacpp-python", "llama.cpp")):
        help_text = f"of an environment with {what} (default: this one)"
        parser.add_argument(flag, default=sys.executable, metavar="PYTHON", help=help_text)
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = make_parser().parse_args(arguments)
    names = list(BENCHMARKS) if "all" in options.run else options.run
    failed = run(names, {TORCH: options.python, LLAMACPP: options.llamacpp_python})
    for path, page in pages() if options.write else ():
        path.write_text(page_blocks.rewritten(page, make), encoding="utf-8")
    problems = differing() if options.check else []
    if failed:
        problems.append(f"failed: {', '.join(failed)}")
    if not (options.run or options.write or options.check):
        for path, page in pages():
            for name in page_blocks.written(page):
                print(f"{path.relative_to(ROOT)}, {name}\n\n{make(name)}\n")
    print(*problems, sep="\n", end="\n" if problems else "")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
