"""What longer rows cost, float32 on CPU, one row: python benchmarks/context.py [--rounds N].

Attention alone, forward and all gradients, of a sliding layer (128 keys) and of a full one, from 512 to
16,384 tokens, and a training step of a small model with one layer of each kind (width 384, 8 experts,
top-2) up to 8,192: seconds, and the temporary memory that the compiler plans. A sliding layer is to cost
O(T): twice the tokens may take 2.15 times the time and memory, from 1,024 on. A full layer's products are
O(T^2), its memory is not: the compiled programs for 16,384 tokens are searched for arrays as large as T x
T, and there may be none.

Calls of one kind take turns over all lengths. Shown: median (least–most). Writes results/context.json.
"""

import itertools
import math
import re

import jax
import jax.numpy as jnp
from common import (
    Training,
    alternate,
    bounded,
    flags,
    milliseconds,
    print_table,
    spread,
    student_model,
    write_json,
)

from gptoss_jax import startup
from gptoss_jax.kernels.attention.api import AttentionSpec, attention

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
LONGEST_STEP = 8192
FROM, BOUND = 1024, 2.15
KINDS = {"sliding layer": 128, "full layer": None}
STEP = "training step"
N, K, H = 6, 2, 64


def attention_call(T: int, window: int | None):
    """The compiled program of attention's sum with a cotangent and its gradients, and a call of it."""
    shapes = ((1, T, N, H), (1, T, K, H), (1, T, K, H), (N,), (1, T, N, H))
    *arguments, g_BTNH = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))
    positions_BT = jnp.arange(T, dtype=jnp.int32)[None]

    def total(arguments, g_BTNH, positions_BT, segment_ids_BT):
        q, k, v, sinks = arguments
        where = segment_ids_BT, positions_BT
        return jnp.vdot(attention(q, k, v, *where, AttentionSpec(window), sinks_N=sinks), g_BTNH)

    inputs = (arguments, g_BTNH, positions_BT, jnp.ones_like(positions_BT))
    program = jax.jit(jax.value_and_grad(total)).lower(*inputs).compile()
    return program, lambda: program(*inputs)


def step_call(T: int):
    training = Training(student_model(num_local_experts=8, num_experts_per_tok=2), 1, T)
    return training.program, training.step


def large_arrays(program, T: int) -> list[str]:
    """Shapes in the optimised program of T x T numbers or more, however their axes are arranged."""
    shapes = set(re.findall(r"\b[a-z]+\d+\[[\d,]+\]|\bpred\[[\d,]+\]", program.as_text()))
    sizes = {shape: math.prod(map(int, re.findall(r"\d+", shape.partition("[")[2]))) for shape in shapes}
    return sorted(shape for shape, size in sizes.items() if size >= T * T)


def measure(kind: str, lengths: tuple[int, ...], rounds: int) -> list[dict]:
    """A row for each length."""
    made = {T: step_call(T) if kind == STEP else attention_call(T, KINDS[kind]) for T in lengths}
    seconds = alternate({T: call for T, (_, call) in made.items()}, rounds)
    return [
        {
            "kind": kind,
            "T": T,
            "seconds": spread(seconds[T]),
            "temporaries": program.memory_analysis().temp_size_in_bytes,
        }
        for T, (program, _) in made.items()
    ]


def with_ratios(rows: list[dict]) -> list[dict]:
    """Time and memory over those of half the length."""
    for row in rows:
        row["time_ratio"] = row["memory_ratio"] = None
    for short, row in itertools.pairwise(rows):
        row["time_ratio"] = row["seconds"]["median"] / short["seconds"]["median"]
        row["memory_ratio"] = row["temporaries"] / max(1, short["temporaries"])
    return rows


def make_parser():
    return flags(__doc__, rounds=5)


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
        bounds.append(bounded(f"Sliding layer, T doubled from {FROM} on, {what}, the worst", worst, BOUND))
    longest, large = LENGTHS[-1], {}
    for kind in (*KINDS, STEP):
        # Compiled, not run.
        program, _ = step_call(longest) if kind == STEP else attention_call(longest, KINDS[kind])
        large[kind] = large_arrays(program, longest)
        print(f"{kind}, T {longest}: arrays of T x T numbers or more: {', '.join(large[kind]) or 'none'}")
    if not options.quick:
        record = {"settings": {"rounds": options.rounds, "N": N, "K": K, "H": H}, "rows": rows}
        print(write_json("context", record | {"bounds": bounds, "arrays_of_T_x_T": large}))


if __name__ == "__main__":
    startup.keep_memory()
    main()
