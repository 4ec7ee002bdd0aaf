"""Computing in bfloat16 against float32 on CPU: python benchmarks/bfloat16.py.

A training step (batch 4 x 512, AdamW with clipping), prefill and decoding of the model of
train_vs_transformers.py, with 4 experts (6 layers) and 32 (3 layers). Trained parameters are float32 on both
sides. In prefill (128 tokens) and decoding (32 steps after it), parameters have the dtype of the computation;
a third side computes in float32 with parameters in bfloat16, as released checkpoints are loaded.

Shows milliseconds as medians (min–max), and the ratios to float32; writes the seconds of all rounds to
results/bfloat16.json.
"""

import functools
import statistics

import jax
from common import (
    Training,
    alternate,
    base_parser,
    milliseconds,
    previous_results,
    print_table,
    small_model,
    spread,
    today,
    write_json,
)
from decode_vs_transformers import random_prompts
from decoding import decode_seconds
from train_vs_transformers import model_sizes

import gptoss_jax as gx
from gptoss_jax.model.transformer import bind, init_params

# Experts, experts per token, layers.
SIZES, QUICK = ((4, 2, 6), (32, 4, 3)), ((4, 2, 2),)
# Dtypes of the parameters and of the computation.
SIDES = {
    "float32": ("float32", "float32"),
    "bfloat16": ("bfloat16", "bfloat16"),
    "bfloat16 parameters": ("bfloat16", "float32"),
}
PROMPT, NEW = 128, 33


def training_seconds(sizes: dict, shape: tuple[int, int], rounds: int) -> dict[str, list[float]]:
    """Returns the seconds of the steps in each dtype."""
    sides = {
        dtype: Training(small_model(**sizes, compute_dtype=dtype), *shape)
        for dtype in ("float32", "bfloat16")
    }
    for training in sides.values():
        training.step()
    return alternate({dtype: training.step for dtype, training in sides.items()}, rounds)


def generation_seconds(sizes: dict, prompts: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Returns the seconds of prefill, and of a decoding step, on each side."""
    rows, calls = random_prompts(prompts, PROMPT), {}
    for side, (stored, computed) in SIDES.items():
        config = small_model(**sizes, compute_dtype=computed, initializer_range=0.1)

        def create(config=config, stored=stored):
            return jax.tree.map(lambda x: x.astype(stored), init_params(config, jax.random.key(0)))

        model = bind(config, jax.jit(create)())
        for count in (1, NEW):
            params = gx.SamplingParams(max_new_tokens=count)
            calls[side, count] = functools.partial(gx.generate, model, rows, params)
    seconds = alternate(calls, rounds)
    steps = {
        side: [one / (NEW - 1) for one in decode_seconds(seconds[side, 1], seconds[side, NEW])]
        for side in SIDES
    }
    return {"prefill": {side: seconds[side, 1] for side in SIDES}, "decoding step": steps}


def main() -> None:
    parser = base_parser(__doc__, rounds=7)
    parser.add_argument("--experts", type=int, nargs="+", help="only these of 4 and 32")
    parser.add_argument("--only", choices=("training", "generation"), help="only this part")
    options = parser.parse_args()
    shape = (1, 64) if options.quick else (4, 512)
    found, table = [], []
    for experts, top_k, layers in QUICK if options.quick else SIZES:
        if options.experts and experts not in options.experts:
            continue
        sizes, measured = model_sizes(experts, top_k, layers), {}
        if options.only != "generation":
            measured["training step"] = training_seconds(sizes, shape, options.rounds)
        if options.only != "training":
            for prompts in (1, 4):
                parts = generation_seconds(sizes, prompts, options.rounds)
                measured |= {f"{name}, {prompts} x {PROMPT}": sides for name, sides in parts.items()}
        for name, sides in measured.items():
            result = {"date": today(), "experts": experts, "top_k": top_k, "layers": layers, "part": name}
            medians = {side: statistics.median(seconds) for side, seconds in sides.items()}
            ratios = {side: median / medians["float32"] for side, median in medians.items()}
            found.append(result | {"seconds": sides, "ratios": ratios})
            for side, seconds in sides.items():
                cells = f"{experts} top-{top_k}, {name}, {side}", milliseconds(spread(seconds))
                table.append((*cells, f"{ratios[side]:.2f}"))
    print_table(f"{options.rounds} rounds", ("", "ms", "of float32"), table)
    if not options.quick:
        keys = {(result["experts"], result["part"]) for result in found}
        old = previous_results("bfloat16")
        found += [result for result in old if (result["experts"], result["part"]) not in keys]
        found.sort(key=lambda result: result["experts"])
        print(write_json("bfloat16", {"rounds": options.rounds, "results": found}))


if __name__ == "__main__":
    main()
