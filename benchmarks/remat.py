"""Time and memory by rematerialization policy, float32 on CPU: python benchmarks/remat.py.

A training step of eight layers of width 384 (8 experts, top-2, batch 4 x 512), stacked and scanned, with
`model.remat` none, dots and block, alternating: seconds, and the temporary memory that the compiler plans.
Writes results/remat.json.
"""

import jax
from common import (
    Training,
    alternate,
    base_parser,
    keep_memory,
    milliseconds,
    print_table,
    small_model,
    spread,
    write_json,
)

POLICIES = ("none", "dots", "block")


def make_parser():
    return base_parser(__doc__, rounds=5)


def main() -> None:
    options = make_parser().parse_args()
    jax.config.update("jax_platforms", "cpu")
    layers, length = (2, 64) if options.quick else (8, 512)
    sizes = {"num_hidden_layers": layers, "num_local_experts": 8, "num_experts_per_tok": 2}
    runs = {
        policy: Training(small_model(**sizes, scan_layers=True, remat=policy), 4, length)
        for policy in POLICIES
    }
    seconds = alternate({policy: training.step for policy, training in runs.items()}, options.rounds)
    rows = [
        {
            "remat": policy,
            "seconds": spread(seconds[policy]),
            "temporaries": runs[policy].program.memory_analysis().temp_size_in_bytes,
        }
        for policy in POLICIES
    ]
    print_table(
        f"Training step of {layers} layers by model.remat",
        ("remat", "ms", "temporary MB"),
        [(row["remat"], milliseconds(row["seconds"]), f"{row['temporaries'] / 1e6:,.0f}") for row in rows],
    )
    if not options.quick:
        print(write_json("remat", {"settings": sizes | {"rounds": options.rounds}, "rows": rows}))


if __name__ == "__main__":
    keep_memory()
    main()
