"""Decoding speed against memory bandwidth: python benchmarks/decode_limit.py.

A decoding step must read the weights that its tokens use and the keys and values that they see, and does
little else, so bandwidth over bytes is the maximum of steps per second. Models: a small one (6 layers of
width 384, window 256, vocabulary 4,096) with 4 experts top-2 and with 32 experts top-4 in float32, and a
large one (4 layers of width 1,024, 32 experts top-4 of width 640: 1.0 GB of experts) in float32 and with
MXFP4 experts, 0.13 GB. 1, 4 and 16 prompts of 128 random tokens, greedy; decoding time is that of 129 new
tokens minus that of one. Experts are counted as the completions are routed: distinct ones per layer and step,
on average.

Bandwidth is measured in the same rounds, on all cores, by several readers: over 4 GiB, more than caches hold,
and over as many bytes as the model's weights in float32, which may fit in a cache. The limit uses the
fastest. A copy counts as a read and a write and can beat any read, because a core waits for what it reads; so
the share of the fastest read of 4 GiB is shown too.

Each model runs in a separate process, where generation and readers alternate. Shows tokens/s as medians
(min–max), and their shares of the limit; writes the seconds of all rounds to results/decode_limit.json.
"""

import dataclasses
import functools
import math
import os
import statistics

from workers import Worker

MEMORY = "4 GiB"
WEIGHTS = "weights' bytes"
COPY = "copy in threads"
SMALL_MODEL = {"num_hidden_layers": 6, "sliding_window": 256}
LARGE_MODEL = {
    "hidden_size": 1024,
    "intermediate_size": 640,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "sliding_window": 256,
}
MODELS = {
    "4 top-2": (SMALL_MODEL | {"num_local_experts": 4, "num_experts_per_tok": 2}, ("float32",)),
    "32 top-4": (SMALL_MODEL | {"num_local_experts": 32, "num_experts_per_tok": 4}, ("float32",)),
    "large": (LARGE_MODEL | {"num_local_experts": 32, "num_experts_per_tok": 4}, ("float32", "mxfp4")),
}
TINY_MODEL = {
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 128,
}
QUICK = {"small": (TINY_MODEL, ("float32", "mxfp4"))}
BATCHES = (1, 4, 16)


# Runs in the workers.


def readers(nbytes: int, passes: int) -> dict:
    """Returns functions by name that move `nbytes` bytes `passes` times on all cores."""
    from concurrent.futures import ThreadPoolExecutor

    import jax
    import jax.numpy as jnp
    import numpy as np

    cores = len(os.sched_getaffinity(0))
    threads = ThreadPoolExecutor(cores)
    x, vector = jnp.ones(nbytes // 4096 * 1024, jnp.float32), jnp.ones(1024, jnp.float32)
    # Views of the same memory.
    parts = np.array_split(np.asarray(x), cores)
    halves = [part[: len(part) // 2] for part in parts]
    copies = [np.zeros_like(half) for half in halves]
    add, multiply = jax.jit(jnp.sum), jax.jit(lambda x, vector: x.reshape(-1, 1024) @ vector)
    once = {
        "XLA, sum": lambda: add(x).block_until_ready(),
        "XLA, product with a vector": lambda: multiply(x, vector).block_until_ready(),
        "sum in threads": lambda: list(threads.map(np.sum, parts)),
        "dot in threads": lambda: list(threads.map(lambda part: np.dot(part, part), parts)),
        COPY: lambda: list(threads.map(np.copyto, copies, halves)),
    }

    def repeated(function):
        for _ in range(passes):
            function()

    return {name: functools.partial(repeated, function) for name, function in once.items()}


def model(
    sizes: dict, forms: list[str], batches: list[int], prompt: int, new: int, rounds: int, memory: int
) -> dict:
    """Starts a worker for one model."""
    return {"measure": lambda: measure(sizes, forms, batches, prompt, new, rounds, memory)}


def measure(sizes, forms, batches, prompt, new, rounds, memory) -> dict:
    """Returns the bandwidth of each reader, and one row per weight format and number of prompts."""
    import jax
    import numpy as np
    from common import alternate, small_model
    from decoding import decode_seconds, mean_step_bytes, measured_experts

    import gptoss_jax as gx
    from gptoss_jax.model.transformer import bind, init_params, parameter_count

    # Large weights, so that greedy completions use many tokens of the vocabulary, and so many experts.
    plain = small_model(**sizes, initializer_range=0.1)
    weights = 4 * parameter_count(plain)
    moved = {MEMORY: (memory, 1), WEIGHTS: (weights, max(1, memory // (4 * weights)))}
    functions = {
        (place, name): function for place, much in moved.items() for name, function in readers(*much).items()
    }
    places = list(functions)
    rows = np.random.default_rng(0).integers(0, plain.vocab_size, (max(batches), prompt)).astype(np.int32)
    table = []
    for form in forms:
        config = dataclasses.replace(plain, expert_format="plain" if form == "float32" else form)
        params = jax.jit(functools.partial(init_params, config))(jax.random.key(0))
        model = bind(config, params)
        for batch in batches:
            calls = {
                count: functools.partial(
                    gx.generate, model, rows[:batch], gx.SamplingParams(max_new_tokens=count)
                )
                for count in (1, new)
            }
            completions = np.asarray([completion.tokens for completion in calls[new]()], np.int32)
            read = np.concatenate([rows[:batch], completions[:, :-1]], axis=1)
            experts = measured_experts(config, params, read, prompt)
            nbytes = mean_step_bytes(config, batch, prompt, new, experts)
            table.append({"form": form, "batch": batch, "experts_of_a_layer": experts, "step_bytes": nbytes})
            table[-1]["different_tokens"] = len(np.unique(completions))
            functions |= {(form, batch, count): call for count, call in calls.items()}
    seconds = alternate(functions, rounds)
    for row in table:
        short, long = (seconds[row["form"], row["batch"], count] for count in (1, new))
        row |= {"seconds_of_one_token": short, "seconds_of_the_others": decode_seconds(short, long)}
    bandwidth = {place: {} for place in moved}
    for place, name in places:
        bandwidth[place][name] = [math.prod(moved[place]) / one for one in seconds[place, name]]
    return {"weights": weights, "bandwidth": bandwidth, "rows": table}


# Runs in the parent.


def report(name: str, result: dict) -> list[tuple]:
    """Returns the rows of the table, and adds their figures to the result."""
    from common import percent, show, spread

    medians = {
        (place, reader): statistics.median(values)
        for place, readers in result["bandwidth"].items()
        for reader, values in readers.items()
    }
    fastest = max(medians, key=medians.get)
    reading = max((key for key in medians if key[0] == MEMORY and key[1] != COPY), key=medians.get)
    result["fastest"], result["fastest_read"] = (
        {"of": key[0], "reader": key[1], "bandwidth": medians[key]} for key in (fastest, reading)
    )
    for what, key in (("fastest", fastest), ("fastest read from memory", reading)):
        print(f"{name}: {what}: {medians[key] / 1e9:.1f} GB/s ({key[1]}, {key[0]})", flush=True)
    table = []
    for row in result["rows"]:
        tokens = row["batch"] * (result["new"] - 1)
        row["tokens_per_second"] = spread([tokens / one for one in row["seconds_of_the_others"]])
        row["limit"] = row["batch"] * medians[fastest] / row["step_bytes"]
        row["of_limit"] = row["tokens_per_second"]["median"] / row["limit"]
        row["of_reading"] = row["of_limit"] * medians[fastest] / medians[reading]
        table.append(
            (
                f"{name}, {row['form']}, batch {row['batch']}",
                f"{row['experts_of_a_layer']:.1f}",
                f"{row['step_bytes'] / 1e6:,.1f}",
                show(row["tokens_per_second"], 1),
                f"{row['limit']:,.1f}",
                percent(row["of_limit"]),
                percent(row["of_reading"]),
            )
        )
    return table


def bounds(results: list[dict]) -> list[dict]:
    from common import bounded

    found = []
    for result in results:
        speeds = {(row["form"], row["batch"]): row["tokens_per_second"]["median"] for row in result["rows"]}
        for row in result["rows"]:
            batch, title = row["batch"], f"{result['model']}, batch {row['batch']}"
            if row["form"] == "float32" and batch == 1:
                found.append(bounded(f"share of the limit, {title}", row["of_limit"], least=0.6))
            if row["form"] == "mxfp4":
                ratio = speeds["mxfp4", batch] / speeds["float32", batch]
                found.append(bounded(f"MXFP4 / float32, {title}", ratio, least=1))
    return found


def make_parser():
    from common import base_parser

    parser = base_parser(__doc__, rounds=5)
    parser.add_argument("--models", nargs="+", choices=MODELS, metavar="NAME", help=", ".join(MODELS))
    parser.add_argument(
        "--batches", type=int, nargs="+", default=BATCHES, help="numbers of prompts (default: 1 4 16)"
    )
    return parser


def main() -> None:
    # The parent only describes the hardware; the workers measure.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from common import previous_results, print_table, today, write_json

    options = make_parser().parse_args()
    quick, results, table = options.quick, [], []
    shape = {"batches": list(options.batches), "prompt": 128, "new": 129, "rounds": options.rounds}
    shape |= {"memory": 4 << 30}
    if quick:
        shape = {"batches": [2], "prompt": 8, "new": 33, "rounds": 2, "memory": 1 << 20}
    for name, (sizes, forms) in (QUICK if quick else MODELS).items():
        if options.models and name not in options.models:
            continue
        worker = Worker("decode_limit", "model", {"sizes": sizes, "forms": forms} | shape)
        found = {"date": today(), "model": name, "sizes": sizes}
        results.append(found | shape | worker.ask("measure"))
        worker.close()
        table += report(name, results[-1])
    print_table(
        f"Decoding, prompts of {shape['prompt']} tokens, {shape['new']} new ones, {shape['rounds']} rounds",
        ("model", "experts per layer", "MB per step", "tokens/s", "limit", "of the limit", "of reading"),
        table,
    )
    if quick:
        return
    bound_results = bounds(results)
    done = {result["model"] for result in results}
    results += [result for result in previous_results("decode_limit") if result["model"] not in done]
    results.sort(key=lambda result: list(MODELS).index(result["model"]))
    print(write_json("decode_limit", {"bounds": bound_results, "results": results}))


if __name__ == "__main__":
    main()
