"""Kernels, training and generation on one GPU, in under fourteen minutes: python benchmarks/gpu.py [--only
NAME ...] [--smoke].

Begins with `gptoss check` in a process of its own: the other sections then use the kernels that passed.
Prints medians (min–max) of at least five repetitions, next to the limit that the same run measures, and
writes results/gpu-DEVICE.json (with --only: gpu-DEVICE-NAMES.json). A section that fails is reported and
recorded, the others still run, and the exit code is 1. Optional peer: pip install tokamax. --smoke runs
everything with tiny sizes on CPU, to check that the script works; it writes results only to --out.
"""

import argparse
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

import jax
from common import hardware, print_table, show, versions, write_json
from gpu_generation import generation, released
from gpu_kernels import attention, grouped
from gpu_model import training
from gpu_run import REPETITIONS, Run

from gptoss_jax.config.paths import user_path

ROOT = pathlib.Path(__file__).parents[1]
CHECK, CHECK_SECONDS = "check", 120
TIMED_OUT = f"none after {CHECK_SECONDS} s"
# JAX has plugins for two versions of CUDA.
CUDA_PACKAGES = ("jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")


def check(run: Run) -> dict:
    """Returns the report of `gptoss check`; a kernel that fails, or a check that does not end, is a failure.

    The check has a process of its own, which must end before JAX starts here and takes the memory of the GPU.
    If a kernel crashes that process or hangs, the record it leaves turns the kernel off in this one.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "check.json")
        command = [sys.executable, "-m", "gptoss_jax", "check", "--json", str(path)]
        environment = os.environ | ({"JAX_PLATFORMS": "cpu"} if run.smoke else {})
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        try:
            limit = None if run.smoke else CHECK_SECONDS
            code = subprocess.run(command, env=environment, timeout=limit, check=False).returncode
        except subprocess.TimeoutExpired:
            code = TIMED_OUT
        report = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    if code:
        run.failures.append(f"{CHECK}: exit code {code}")
        print(f"failed: {run.failures[-1]}", flush=True)
    return report


def peaks(run: Run) -> dict:
    """Measures the limits for the other sections."""
    scaled = {
        "bfloat16 matmul, TFLOP/s": {k: v / 1e12 for k, v in run.peaks["matmul_flops"].items()},
        "memory, read + write, GB/s": {k: v / 1e9 for k, v in run.peaks["bandwidth"].items()},
    }
    print_table("Limits of the device", ("", "measured"), [(n, show(v, 1)) for n, v in scaled.items()])
    return run.peaks


# Name -> function and its time limit in seconds; it finishes what it has started. `check` comes first.
SECTIONS = {
    "peaks": (peaks, 30),
    "attention": (attention, 130),
    "grouped": (grouped, 110),
    "training": (training, 180),
    "generation": (generation, 90),
    "released": (released, 150),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=(CHECK, *SECTIONS),
        metavar="NAME",
        help=f"only these sections of {', '.join((CHECK, *SECTIONS))}",
    )
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on CPU")
    parser.add_argument("--out", help="the JSON file to write")
    options = parser.parse_args(arguments)
    run, names = Run(options.smoke), options.only or [CHECK, *SECTIONS]
    # Before JAX starts.
    is_gpu = "import jax, sys; sys.exit(jax.default_backend() != 'gpu')"
    if not options.smoke and subprocess.run([sys.executable, "-c", is_gpu], check=False).returncode:
        parser.error("needs a GPU that JAX finds; --smoke runs it on CPU")
    checked = run.attempt(CHECK, check, run) if CHECK in names else None
    if options.smoke:
        jax.config.update("jax_platforms", "cpu")
    else:
        # The default is three quarters; the larger model needs more.
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    slug = re.sub(r"[^a-z0-9]+", "-", jax.devices()[0].device_kind.lower()).strip("-")
    out = options.out and str(user_path(options.out, "out").with_suffix(".json"))
    if not out and not options.smoke:
        out = "-".join(["gpu", slug, *(options.only or ())])
    record = {
        "hardware": hardware(),
        "versions": versions(*CUDA_PACKAGES, "tokamax"),
    }
    record["settings"] = {"smoke": options.smoke, "sections": names, "repetitions": REPETITIONS}
    record |= {"seconds": {}, CHECK: checked, "failures": run.failures, "skipped": run.skipped}
    for name in (name for name in names if name != CHECK):
        print(f"\n{name}", flush=True)
        function, seconds = SECTIONS[name]
        # A smoke run must reach every line, however long compilation takes on CPU.
        run.start_clock(math.inf if options.smoke else seconds)
        start = time.monotonic()
        record[name] = run.attempt(name, function, run)
        record["seconds"][name] = time.monotonic() - start
        # Programs of a section hold memory.
        jax.clear_caches()
        # Every section measures the limits if "peaks" was not selected.
        record["peaks"] = run.__dict__.get("peaks")
        if out:
            write_json(out, record)
    if out:
        print(f"\n{write_json(out, record)}")
    return 1 if run.failures else 0


if __name__ == "__main__":
    sys.exit(main())
