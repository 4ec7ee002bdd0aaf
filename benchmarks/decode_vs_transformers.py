"""Generation speed against transformers: python benchmarks/decode_vs_transformers.py.

A small model (6 layers of width 384, window 256, vocabulary 4,096) with 4 experts top-2 and with 32 experts
top-4, float32. Each side runs in a separate process on all cores and waits while the other is measured. Both
load the same checkpoint: random weights, large enough that greedy completions use many tokens, written by
`save_pretrained`. 1, 4 and 16 prompts of 128 random tokens; greedy completions of 1 and of 129 tokens.
Prefill is the time to the first token; decoding is the time of 129 tokens minus that of one.

The peer is `generate` of transformers with eager attention (its gpt-oss has no sdpa) and the best of its
expert implementations, chosen separately for prefill and decoding: a pilot measures `eager`, `grouped_mm` and
`batched_mm`, the last only if its copies of each prompt token's experts take at most a quarter of the memory.
A round measures both completions of each side for each number of prompts. First the tokens of both sides are
compared: how many are equal before a row's first difference.

Shows tokens/s as medians (min–max), and the ratio of the medians, ours over the peer's; writes the seconds of
all rounds and pilots to results/decode_vs_transformers.json. Needs pip install -e '.[parity]'.
"""

import functools
import itertools
import os
import pathlib
import statistics
import tempfile
import time

from workers import Worker

OURS = "gptoss_jax"
SIZES = ((4, 2), (32, 4))
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
BATCHES = (1, 4, 16)
# (Experts, prompts) -> minimum ratio of decoding speed to transformers.
TARGETS = {(4, 1): 2.2, (4, 4): 3.0, (32, 1): 2.0, (32, 4): 1.8}


# Runs in the workers. The torch side does not import jax.


def random_prompts(batch: int, prompt: int):
    import numpy as np

    return np.random.default_rng(0).integers(0, 4096, (batch, prompt)).astype(np.int32)


def make_commands(sides, batches, counts, generate) -> dict:
    """Returns the commands `SIDE BATCH COUNT`, the seconds of completions of COUNT tokens, and
    `SIDE BATCH tokens`, the longest completions."""

    def seconds(*arguments):
        start = time.perf_counter()
        generate(*arguments)
        return time.perf_counter() - start

    found = {}
    for side, batch in itertools.product(sides, batches):
        for count in counts:
            found[f"{side} {batch} {count}"] = functools.partial(seconds, side, batch, count)
        found[f"{side} {batch} tokens"] = functools.partial(generate, side, batch, max(counts))
    return found


def ours(folder: str, experts: int, top_k: int, layers: int, batches: list[int], prompt: int, new: int):
    """Starts our worker, which also writes the checkpoint."""
    import jax
    from common import small_model
    from train_vs_transformers import model_sizes

    import gptoss_jax as gx
    from gptoss_jax.model.transformer import bind, init_params

    config = small_model(**model_sizes(experts, top_k, layers), initializer_range=0.1)
    model = bind(config, jax.jit(lambda: init_params(config, jax.random.key(0)))())
    gx.save_pretrained(model, folder, experts="float32")
    rows = random_prompts(max(batches), prompt)

    def generate(side, batch, count):
        completions = gx.generate(model, rows[:batch], gx.SamplingParams(max_new_tokens=count))
        return [completion.tokens for completion in completions]

    return make_commands([OURS], batches, (1, new), generate)


def transformers(
    folder: str, experts: int, top_k: int, layers: int, batches: list[int], prompt: int, new: int
):
    import torch
    from transformers import GptOssForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = GptOssForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    # Copied from the mapped file into memory with huge pages.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    # No stop token.
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    rows = torch.as_tensor(random_prompts(max(batches), prompt)).long()

    def generate(implementation, batch, count):
        if model.config._experts_implementation != implementation:
            model.set_experts_implementation(implementation)
        tokens = model.generate(
            rows[:batch],
            attention_mask=torch.ones_like(rows[:batch]),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            use_cache=True,
        )
        return tokens[:, prompt:].tolist()

    return make_commands(IMPLEMENTATIONS, batches, (1, new), generate)


# Runs in the parent.


def usable_implementations(settings: dict, batch: int) -> list[str]:
    """Returns the expert implementations whose memory suffices: `batched_mm` copies the matrices of each
    token's experts."""
    copies = batch * settings["prompt"] * settings["top_k"] * 384 * 2 * 960 * 4
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return [name for name in IMPLEMENTATIONS if name != "batched_mm" or copies < memory / 4]


def same_before_difference(ours: list[list[int]], theirs: list[list[int]]) -> int:
    """Returns the number of equal tokens before the first difference, summed over rows."""
    pairs = (zip(a, b, strict=True) for a, b in zip(ours, theirs, strict=True))
    return sum(len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], row))) for row in pairs)


def measure(settings: dict, rounds: int, pilots: int) -> list[dict]:
    """Returns for each number of prompts the pilots, the peers they select, and the seconds of each side."""
    from decoding import decode_seconds

    counts = (1, settings["new"])
    with tempfile.TemporaryDirectory() as folder:
        settings = settings | {"folder": str(pathlib.Path(folder) / "checkpoint")}
        us = Worker("decode_vs_transformers", "ours", settings)
        them = Worker("decode_vs_transformers", "transformers", settings)
    results = []
    for batch in settings["batches"]:
        pilot = {}
        for name in usable_implementations(settings, batch):
            # The first call of each is warmup.
            calls = [[them.ask(f"{name} {batch} {count}") for count in counts] for _ in range(1 + pilots)]
            short, long = ([call[i] for call in calls[1:]] for i in (0, 1))
            pilot[name] = {"prefill": short, "decode": decode_seconds(short, long)}
        peers = {
            stage: min(pilot, key=lambda name: statistics.median(pilot[name][stage]))
            for stage in ("prefill", "decode")
        }
        tokens = us.ask(f"{OURS} {batch} tokens"), them.ask(f"{peers['decode']} {batch} tokens")
        us.ask(f"{OURS} {batch} 1")
        results.append(
            {name: settings[name] for name in ("experts", "top_k", "layers", "prompt", "new")}
            | {"batch": batch, "same_tokens": same_before_difference(*tokens), "pilot": pilot}
            | {"different_tokens_of_ours": len({token for row in tokens[0] for token in row})}
            | {"peers": peers, "seconds": {OURS: {1: [], counts[1]: []}}}
        )
        results[-1]["seconds"] |= {name: {1: [], counts[1]: []} for name in sorted(set(peers.values()))}
    for _ in range(rounds):
        for result in results:
            for name, seconds in result["seconds"].items():
                worker = us if name == OURS else them
                for count in counts:
                    seconds[count].append(worker.ask(f"{name} {result['batch']} {count}"))
    for worker in (us, them):
        worker.close()
    return results


def report(result: dict) -> list[tuple]:
    """Returns the rows of the table, and adds their figures to the result."""
    from common import show, spread
    from decoding import decode_seconds

    batch, prompt, new = result["batch"], result["prompt"], result["new"]
    title, rows = f"{result['experts']} top-{result['top_k']}, batch {batch}", []
    result["tokens_per_second"], result["ratios"] = {}, {}
    for stage, peer in result["peers"].items():
        speeds = []
        for name in (OURS, peer):
            short, long = result["seconds"][name].values()
            if stage == "prefill":
                speeds.append(spread([batch * prompt / one for one in short]))
            else:
                speeds.append(spread([batch * (new - 1) / one for one in decode_seconds(short, long)]))
        ratio = speeds[0]["median"] / speeds[1]["median"]
        result["tokens_per_second"][stage] = dict(zip((OURS, peer), speeds, strict=True))
        result["ratios"][stage] = ratio
        shown = (show(speed, 1 if stage == "decode" else 0) for speed in speeds)
        rows.append((f"{title}, {stage}", *shown, peer, f"{ratio:.2f}"))
    return rows


def bounds(results: list[dict]) -> list[dict]:
    from common import bounded

    found = []
    for result in results:
        least = TARGETS.get((result["experts"], result["batch"]))
        name = f"decoding / transformers, {result['experts']} experts, batch {result['batch']}"
        if least is not None:
            found.append(bounded(name, result["ratios"]["decode"], least=least))
    return found


def make_parser():
    from common import base_parser

    parser = base_parser(__doc__, rounds=7)
    parser.add_argument("--experts", type=int, nargs="+", help="only these of 4 and 32")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=BATCHES, help="numbers of prompts (default: 1 4 16)"
    )
    return parser


def main() -> None:
    # The parent only describes the hardware; the workers measure.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from common import previous_results, print_table, today, versions, write_json

    options = make_parser().parse_args()
    quick, results = options.quick, []
    rounds = 2 if quick else options.rounds
    shape = {"layers": 2, "batches": [2], "prompt": 8, "new": 5} if quick else {"layers": 6}
    shape = {"batches": list(options.batches), "prompt": 128, "new": 129} | shape
    for experts, top_k in SIZES[:1] if quick else SIZES:
        if options.experts and experts not in options.experts:
            continue
        print(f"{experts} experts, top-{top_k}", flush=True)
        found = measure({"experts": experts, "top_k": top_k} | shape, rounds, pilots=1 if quick else 2)
        results += [{"date": today()} | result for result in found]
    table = [row for result in results for row in report(result)]
    print_table(
        f"Tokens/s, prompts of {shape['prompt']} tokens, {shape['new']} new ones, {rounds} rounds",
        ("experts", "ours", "transformers", "its implementation", "ratio"),
        table,
    )
    for result in results:
        total = result["batch"] * result["new"]
        title = f"{result['experts']} experts, batch {result['batch']}"
        print(f"{title}: {result['same_tokens']} of {total} greedy tokens are the same on both sides")
    if quick:
        return
    done = {(result["experts"], result["batch"]) for result in results}
    results += [
        result
        for result in previous_results("decode_vs_transformers")
        if (result["experts"], result["batch"]) not in done
    ]
    results.sort(key=lambda result: (result["experts"], result["batch"]))
    record = {"versions": versions("torch", "transformers"), "rounds": rounds, "bounds": bounds(results)}
    print(write_json("decode_vs_transformers", record | {"results": results}))


if __name__ == "__main__":
    main()
