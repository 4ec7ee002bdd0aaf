"""Speed and memory of reading released weights: python benchmarks/load.py [--folder DIR].

Makes a checkpoint of layers of gpt-oss-20b with random contents, about 3 GB in MXFP4, and loads it in
separate processes: packed as published, and dequantized to bfloat16. Peak memory is the maximum resident
memory of the process minus that before loading. The limit is a plain read of the same files into new memory
by Python. The variants alternate; medians are given.
"""

import argparse
import json
import math
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time

import ml_dtypes
import numpy as np

from gptoss_jax.config.paths import user_path

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
LAYERS, VOCABULARY = 6, 32768
REPEATS = 5

LOADER = """
import json, sys, time
import jax, jax.numpy as jnp
from gptoss_jax.checkpoints.load import load_pretrained
def status(name):
    lines = open("/proc/self/status", encoding="utf-8")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
jnp.zeros(8).block_until_ready()
import gptoss_jax.checkpoints.lazy_tensors
before = status("VmHWM")
start = time.perf_counter()
_, params, _ = load_pretrained(sys.argv[1], experts=sys.argv[2])
jax.block_until_ready(params)
seconds = time.perf_counter() - start
size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print(json.dumps({"seconds": seconds, "before": before, "peak": status("VmHWM"), "loaded": size}))
"""
READER = """
import json, pathlib, sys, time
start = time.perf_counter()
held = [path.read_bytes() for path in sorted(pathlib.Path(sys.argv[1]).glob("*.safetensors"))]
print(json.dumps({"seconds": time.perf_counter() - start}))
"""


def make_checkpoint(folder: pathlib.Path) -> int:
    """Writes the checkpoint; returns the bytes of its largest tensor."""
    from gptoss_jax.checkpoints.export import atomic_folder
    from gptoss_jax.checkpoints.mappings import HUGGINGFACE, expected_shapes
    from gptoss_jax.checkpoints.safetensors_io import NewTensor, write_tensors
    from gptoss_jax.config import ModelConfig

    config = ModelConfig(num_hidden_layers=LAYERS, vocab_size=VOCABULARY, expert_format="mxfp4")
    rng = np.random.default_rng(0)
    noise = {np.dtype(np.uint8): rng.integers(0, 256, 64 << 20, dtype=np.uint8)}
    noise[BFLOAT16] = (0.02 * rng.standard_normal(32 << 20, dtype=np.float32)).astype(BFLOAT16)
    tensors = []
    for name, shape in expected_shapes(config, HUGGINGFACE).items():
        kind = np.dtype(np.uint8) if name.endswith(("_blocks", "_scales")) else BFLOAT16

        def chunks(name=name, shape=shape, kind=kind):
            left = math.prod(shape)
            while left:
                part = noise[kind][: min(left, len(noise[kind]))]
                yield 110 + part % 10 if name.endswith("_scales") else part
                left -= len(part)

        tensors.append(NewTensor(name, kind, shape, chunks))
    with atomic_folder(folder, sum(tensor.nbytes for tensor in tensors)) as partial:
        write_tensors(partial, tensors)
        (partial / "config.json").write_text(json.dumps(config.to_hf("mxfp4")), encoding="utf-8")
    return max(tensor.nbytes for tensor in tensors)


def run(code: str, *arguments: str) -> dict:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, encoding="utf-8")
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout)


def settle(folder: pathlib.Path, size: int) -> None:
    """Reads the files into the page cache and touches the memory of a virtual machine, so that neither
    counts for the next reader."""
    for _ in range(2):
        # As much as the unpacked model takes.
        run(f"import numpy as np; np.ones({int(3.5 * size)}, np.uint8); print(0)")
    run(READER, str(folder))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", help="folder of the checkpoint, created if missing (default: a temporary one)"
    )
    parser.add_argument("--repeats", type=int, default=REPEATS, help=f"measured runs (default: {REPEATS})")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = user_path(options.folder or f"{temporary}/checkpoint", "folder")
        if not folder.exists():
            print(f"Writing {folder}")
            make_checkpoint(folder)
        from gptoss_jax.checkpoints.safetensors_io import map_folder

        tensors = map_folder(folder)
        size, largest = sum(t.nbytes for t in tensors.values()), max(t.nbytes for t in tensors.values())
        results: dict[str, list[dict]] = {"plain read": [], "mxfp4": [], "bfloat16": []}
        for _ in range(options.repeats):
            for name, runs in results.items():
                settle(folder, size)
                runs.append(
                    run(READER, str(folder)) if name == "plain read" else run(LOADER, str(folder), name)
                )
    plain = statistics.median(r["seconds"] for r in results["plain read"])
    print(f"\n{size / 1e9:.2f} GB on disk, largest tensor {largest / 1e6:,.0f} MB, {options.repeats} runs\n")
    print(f"{'':12}{'seconds':>18}{'of plain read':>15}{'loaded GB':>11}{'peak GB':>9}{'bound GB':>10}")
    rows = []
    for name, runs in results.items():
        seconds = sorted(r["seconds"] for r in runs)
        median = statistics.median(seconds)
        row = {"name": name, "seconds": median, "spread": [seconds[0], seconds[-1]], "speed": plain / median}
        line = f"{name:12}{median:8.2f} ({seconds[0]:.2f}–{seconds[-1]:.2f})"
        if "peak" in runs[0]:
            loaded, peak = runs[0]["loaded"], max(r["peak"] - r["before"] for r in runs)
            bound = 1.1 * loaded + largest
            row |= {"loaded": loaded, "peak": peak, "bound": bound, "unpacked_speed": loaded / median}
            line += f"{plain / median:14.2f}×{loaded / 1e9:11.2f}{peak / 1e9:9.2f}{bound / 1e9:10.2f}"
        rows.append(row)
        print(line)
    import jax

    hardware = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    record = {"date": time.strftime("%Y-%m-%d"), "jax": jax.__version__, "hardware": hardware, "bytes": size,
              "largest_tensor": largest, "rows": rows}  # fmt: skip
    path = pathlib.Path(__file__).parent / "results" / "load.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"\n{path}")


if __name__ == "__main__":
    main()
