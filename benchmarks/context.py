"""Time and memory by row length, float32 on CPU, one row: python benchmarks/context.py [--rounds N].

Measures attention, forward and backward, of a sliding layer (128 keys) and a full layer with 512 to 16,384
tokens, and a training step of a small model with one layer of each kind (width 384, 8 experts, top-2) up to
8,192: seconds, and the temporary memory that the compiler plans. A sliding layer should cost O(T): from 1,024
tokens on, doubling the tokens may multiply time and memory by 2.15. A full layer computes O(T^2) scores, but
never stores them: the compiled programs for 16,384 tokens must have no array of T x T elements.

The lengths alternate. Shows medians (min–max); writes results/context.json.
"""

import itertools
import math
import re

import jax
import jax.numpy as jnp
from common import (
    Training,
    alternate,
    base_parser,
    bounded,
    keep_memory,
    milliseconds,
    print_table,
    small_model,
    spread,
    write_json,
)

from gptoss_jax.kernels.attention.api import AttentionSpec, attention

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
LONGEST_STEP = 8192
FROM, BOUND = 1024, 2.15
KINDS = {"sliding layer": 128, "full layer": None}
STEP = "training step"
N, K, H = 6, 2, 64


def attention_call(T: int, window: int | None):
    """Returns a compiled program of attention, forward and backward, and a function that calls it."""
    shapes = ((1, T, N, H), (1, T, K, H), (1, T, K, H), (N,), (1, T, N, H))
    *arguments, g_BTNH = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))
    positions_BT = jnp.arange(T, dtype=jnp.int32)[None]

    def total(arguments, g_BTNH, positions_BT, segment_ids_BT):
        q, k, v, sinks = arguments
        out_BTNH = attention(q, k, v, segment_ids_BT, positions_BT, AttentionSpec(window), sinks_N=sinks)
        return jnp.vdot(out_BTNH, g_BTNH)

    inputs = (arguments, g_BTNH, positions_BT, jnp.ones_like(positions_BT))
    program = jax.jit(jax.value_and_grad(total)).lower(*inputs).compile()
    return program, lambda: program(*inputs)


def step_call(T: int):
    training = Training(small_model(num_local_experts=8, num_experts_per_tok=2), 1, T)
    return training.program, training.step


def large_arrays(program, T: int) -> list[str]:
    """Returns the shapes in the optimized program with at least T x T elements, whatever their axes."""
    shapes = set(re.findall(r"\b[a-z]+\d+\[[\d,]+\]|\bpred\[[\d,]+\]", program.as_text()))
    sizes = {shape: math.prod(map(int, re.findall(r"\d+", shape.partition("[")[2]))) for shape in shapes}
    return sorted(shape for shape, size in sizes.items() if size >= T * T)


def measure(kind: str, lengths: tuple[int, ...], rounds: int) -> list[dict]:
    """Returns one row per length."""
    compiled = {T: step_call(T) if kind == STEP else attention_call(T, KINDS[kind]) for T in lengths}
    seconds = alternate({T: call for T, (_, call) in compiled.items()}, rounds)
    return [
        {
            "kind": kind,
            "T": T,
            "seconds": spread(seconds[T]),
            "temporaries": program.memory_analysis().temp_size_in_bytes,
        }
        for T, (program, _) in compiled.items()
    ]


def with_ratios(rows: list[dict]) -> list[dict]:
    """Adds to each row its time and memory over those of half the length."""
    for row in rows:
        row["time_ratio"] = row["memory_ratio"] = None
    for short, row in itertools.pairwise(rows):
        row["time_ratio"] = row["seconds"]["median"] / short["seconds"]["median"]
        row["memory_ratio"] = row["temporaries"] / max(1, short["temporaries"])
    return rows


def make_parser():
    return base_parser(__doc__, rounds=5)


def main() -> None:
    options = make_parser().parse_args()
    jax.config.update("jax_platforms", "cpu")
    lengths = LENGTHS[:3] if options.quick else LENGTHS
    short = lengths[:1] if options.quick else tuple(T for T in lengths if T <= LONGEST_STEP)
    rows, bounds = [], []
    for kind in (*KINDS, STEP):
        rows += with_ratios(measure(kind, short if kind == STEP else lengths, options.rounds))
        jax.clear_caches()
    print_table(
        f"Rows of T tokens: attention of {N} heads of {H}, and a step of two layers of width 384",
        ("kind, T", "ms", "/ half of T", "temporary MB", "/ half of T"),
        [
            (
                f"{row['kind']}, {row['T']}",
                milliseconds(row["seconds"]),
                row["time_ratio"] and f"{row['time_ratio']:.2f}",
                f"{row['temporaries'] / 1e6:,.1f}",
                row["memory_ratio"] and f"{row['memory_ratio']:.2f}",
            )
            for row in rows
        ],
    )
    sliding = [row for row in rows if row["kind"] == "sliding layer" and row["T"] > FROM]
    for name, what in (("time_ratio", "time"), ("memory_ratio", "memory")):
        worst = max(row[name] for row in sliding)
        bounds.append(
            bounded(f"Sliding layer, {what} ratio when T doubles, from {FROM} on, worst", worst, BOUND)
        )
    longest, large = LENGTHS[-1], {}
    for kind in (*KINDS, STEP):
        # Only compiled.
        program, _ = step_call(longest) if kind == STEP else attention_call(longest, KINDS[kind])
        large[kind] = large_arrays(program, longest)
        print(f"{kind}, T {longest}: arrays with T x T elements or more: {', '.join(large[kind]) or 'none'}")
    if not options.quick:
        record = {"settings": {"rounds": options.rounds, "N": N, "K": K, "H": H}, "rows": rows}
        print(write_json("context", record | {"bounds": bounds, "arrays_of_T_x_T": large}))


if __name__ == "__main__":
    keep_memory()
    main()
