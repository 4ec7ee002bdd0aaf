"""Kernels, training and generation on one GPU, in under twelve minutes: python benchmarks/gpu.py [--only NAME
...] [--smoke].

Prints medians (min–max) of at least five repetitions, next to the limit that the same run measures, and
writes results/gpu-DEVICE.json (with --only: gpu-DEVICE-NAMES.json). A section that fails is reported and
recorded, the others still run, and the exit code is 1. Optional peer: pip install tokamax. --smoke runs
everything with tiny sizes on CPU, to check that the script works; it writes results only to --out.
"""

import argparse
import math
import os
import re
import sys
import time

import jax
from common import hardware, print_table, show, versions, write_json
from gpu_generation import generation, released
from gpu_kernels import attention, grouped
from gpu_model import training
from gpu_run import REPETITIONS, Run

from gptoss_jax.config.paths import user_path


def peaks(run: Run) -> dict:
    """Measures the limits for the other sections."""
    scaled = {
        "bfloat16 matmul, TFLOP/s": {k: v / 1e12 for k, v in run.peaks["matmul_flops"].items()},
        "memory, read + write, GB/s": {k: v / 1e9 for k, v in run.peaks["bandwidth"].items()},
    }
    print_table("Limits of the device", ("", "measured"), [(n, show(v, 1)) for n, v in scaled.items()])
    return run.peaks


# Name -> function and its time limit in seconds; it finishes what it has started.
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
        choices=SECTIONS,
        metavar="NAME",
        help=f"only these sections of {', '.join(SECTIONS)}",
    )
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on CPU")
    parser.add_argument("--out", help="the JSON file to write")
    options = parser.parse_args(arguments)
    if options.smoke:
        jax.config.update("jax_platforms", "cpu")
    else:
        # The default is three quarters; the larger model needs more.
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
        if jax.default_backend() != "gpu":
            parser.error(f"needs a GPU and there is {jax.default_backend()!r}; --smoke runs it on CPU")
    run, names = Run(options.smoke), options.only or list(SECTIONS)
    slug = re.sub(r"[^a-z0-9]+", "-", jax.devices()[0].device_kind.lower()).strip("-")
    out = options.out and str(user_path(options.out, "out").with_suffix(".json"))
    if not out and not options.smoke:
        out = "-".join(["gpu", slug, *(options.only or ())])
    record = {
        "hardware": hardware(),
        "versions": versions("jax-cuda12-plugin", "nvidia-cudnn-cu12", "tokamax"),
    }
    record["settings"] = {"smoke": options.smoke, "sections": names, "repetitions": REPETITIONS}
    record["seconds"] = {}
    for name in names:
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
        record |= {"failures": run.failures, "skipped": run.skipped}
        if out:
            path = write_json(out, record)
    if out:
        print(f"\n{path}")
    return 1 if run.failures else 0


if __name__ == "__main__":
    sys.exit(main())
