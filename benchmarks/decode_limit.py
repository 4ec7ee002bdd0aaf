"""Decoding against the memory's bandwidth: python benchmarks/decode_limit.py.

A step of decoding must read the weights that its tokens are multiplied with and the keys and values that
they see, and does little else: bandwidth over bytes is the most steps a second. Models: a student's
notebook (6 layers of width 384, window 256, vocabulary 4,096) with 4 experts top-2 and 32 experts top-4 in
float32, and a large one (4 layers of width 1,024, 32 experts top-4 of width 640: 1.0 GB of experts) in
float32 and with experts packed in MXFP4, 0.13 GB. 1, 4 and 16 prompts of 128 random tokens, greedy answers;
decoding is what 128 further tokens take longer than the first. Experts count where the answers' own routing
goes to them: how many different ones of a layer in a step, on average.

The bandwidth is measured in the same rounds, on all cores: several readers over 4 GiB, more than caches
hold, and over as many bytes as the model's weights in float32, which they may hold; the limit takes the
fastest of all. A copy counts as a read and a write, and can be faster than any read, since a core waits for
what it reads; so the share of the fastest read of 4 GiB is shown too.

Each model in a process of its own, its answers and the readers alternately. Shown: tokens/s as median
(least–most), and their shares. Writes every round's seconds to results/decode_limit.json.
"""

import dataclasses
import functools
import json
import math
import os
import statistics

from workers import Worker

MEMORY = "4 GiB"
WEIGHTS = "weights' bytes"
COPY = "copy in threads"
NOTEBOOK = {"num_hidden_layers": 6, "sliding_window": 256}
LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 640,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "sliding_window": 256,
}
MODELS = {
    "4 top-2": (NOTEBOOK | {"num_local_experts": 4, "num_experts_per_tok": 2}, ("float32",)),
    "32 top-4": (NOTEBOOK | {"num_local_experts": 32, "num_experts_per_tok": 4}, ("float32",)),
    "large": (LARGE | {"num_local_experts": 32, "num_experts_per_tok": 4}, ("float32", "mxfp4")),
}
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 128,
}
QUICK = {"small": (SMALL, ("float32", "mxfp4"))}
BATCHES = (1, 4, 16)


# What runs in the workers.


def readers(nbytes: int, passes: int) -> dict:
    """Name -> a function that moves `passes` times so many bytes through the cores."""
    from concurrent.futures import ThreadPoolExecutor

    import jax
    import jax.numpy as jnp
    import numpy as np

    cores = len(os.sched_getaffinity(0))
    threads = ThreadPoolExecutor(cores)
    x, vector = jnp.ones(nbytes // 4096 * 1024, jnp.float32), jnp.ones(1024, jnp.float32)
    # The same memory.
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
    return {"measure": lambda: measure(sizes, forms, batches, prompt, new, rounds, memory)}


def measure(sizes, forms, batches, prompt, new, rounds, memory) -> dict:
    """Bytes/s of the readers by what they read, and a row for each form and number of prompts."""
    import jax
    import numpy as np
    from common import alternate, student_model
    from decoding import chosen_experts, longer, mean_step_bytes

    import gptoss_jax as gx
    from gptoss_jax.model.transformer import bind, init_params, parameter_count

    # Weights so large that greedy answers wander through the vocabulary, and so through the experts.
    plain = student_model(**sizes, initializer_range=0.1)
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
            answers = np.asarray([answer.tokens for answer in calls[new]()], np.int32)
            read = np.concatenate([rows[:batch], answers[:, :-1]], axis=1)
            experts = chosen_experts(config, params, read, prompt)
            nbytes = mean_step_bytes(config, batch, prompt, new, experts)
            table.append({"form": form, "batch": batch, "experts_of_a_layer": experts, "step_bytes": nbytes})
            table[-1]["different_tokens"] = len(np.unique(answers))
            functions |= {(form, batch, count): call for count, call in calls.items()}
    seconds = alternate(functions, rounds)
    for row in table:
        short, long = (seconds[row["form"], row["batch"], count] for count in (1, new))
        row |= {"seconds_of_one_token": short, "seconds_of_the_others": longer(short, long)}
    bandwidth = {place: {} for place in moved}
    for place, name in places:
        bandwidth[place][name] = [math.prod(moved[place]) / one for one in seconds[place, name]]
    return {"weights": weights, "bandwidth": bandwidth, "rows": table}


# What asks them.


def report(name: str, result: dict) -> list[tuple]:
    """Rows of the table, and the figures in them added to the result."""
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
    for what, key in (("moved", fastest), ("read from memory", reading)):
        print(f"{name}: {what} at most at {medians[key] / 1e9:.1f} GB/s ({key[1]}, {key[0]})", flush=True)
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
                found.append(bounded(f"packed over float32, {title}", ratio, least=1))
    return found


def earlier() -> list[dict]:
    """What the file has; a run of some models leaves the others' as they are."""
    from common import RESULTS

    file = RESULTS / "decode_limit.json"
    return json.loads(file.read_text(encoding="utf-8"))["results"] if file.exists() else []


def make_parser():
    from common import flags

    parser = flags(__doc__, rounds=5)
    parser.add_argument("--models", nargs="+", choices=MODELS, metavar="NAME", help=", ".join(MODELS))
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="default: 1 4 16")
    return parser


def main() -> None:
    # Only to say where this runs; the workers do the work.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from common import print_table, write_json

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
        results.append({"model": name, "sizes": sizes} | shape | worker.ask("measure"))
        worker.close()
        table += report(name, results[-1])
    print_table(
        f"Decoding, prompts of {shape['prompt']} tokens, answers of {shape['new']}, {shape['rounds']} rounds",
        ("model", "experts a layer", "MB a step", "tokens/s", "limit", "of the limit", "of reading"),
        table,
    )
    if quick:
        return
    kept = bounds(results)
    done = {result["model"] for result in results}
    results += [result for result in earlier() if result["model"] not in done]
    results.sort(key=lambda result: list(MODELS).index(result["model"]))
    print(write_json("decode_limit", {"bounds": kept, "results": results}))


if __name__ == "__main__":
    main()
