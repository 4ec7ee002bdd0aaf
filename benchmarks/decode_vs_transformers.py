"""Answers of us and of transformers, alternately: python benchmarks/decode_vs_transformers.py.

The sizes of a student's notebook (6 layers of width 384, window 256, vocabulary 4,096) with 4 experts top-2
and 32 experts top-4, float32, all cores for each side, each in a process of its own; what does not have its
turn waits. Both have the same checkpoint: ours are random weights, large enough that greedy answers wander
through the vocabulary, and transformers loads the folder that `save_pretrained` made of them. 1, 4 and 16
prompts of 128 random tokens; greedy answers, of one token and of 129. Prefill: how long the first token
takes. Decoding: what the 128 further ones take longer.

transformers' `generate` with eager attention (its gpt-oss has no sdpa) and the best of its experts, prefill
and decoding apart: a pilot measures `eager`, `grouped_mm` and `batched_mm`, the last not where its copies of
each prompt token's experts would take more than a quarter of the memory. A round is both answers of each
side for each number of prompts. First each side's tokens are compared: how many are the same before a row's
first difference.

Shown: tokens/s as median (least–most), and the ratio of the medians, ours over the peer's. Writes every
round's seconds and the pilots' to results/decode_vs_transformers.json. Needs pip install -e '.[parity]'.
"""

import functools
import itertools
import json
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
# Experts and number of prompts -> what decoding is to be times transformers'.
TARGETS = {(4, 1): 2.2, (4, 4): 3.0, (32, 1): 2.0, (32, 4): 1.8}


# What runs in the workers. The torch side does not load jax, and this file and its settings are all it gets.


def random_prompts(batch: int, prompt: int):
    import numpy as np

    return np.random.default_rng(0).integers(0, 4096, (batch, prompt)).astype(np.int32)


def abilities(sides, batches, counts, generate) -> dict:
    """`SIDE BATCH COUNT` is the seconds of such answers, `SIDE BATCH tokens` are the longest of them."""

    def seconds(*arguments):
        began = time.perf_counter()
        generate(*arguments)
        return time.perf_counter() - began

    found = {}
    for side, batch in itertools.product(sides, batches):
        for count in counts:
            found[f"{side} {batch} {count}"] = functools.partial(seconds, side, batch, count)
        found[f"{side} {batch} tokens"] = functools.partial(generate, side, batch, max(counts))
    return found


def ours(folder: str, experts: int, top_k: int, layers: int, batches: list[int], prompt: int, new: int):
    """Writes the checkpoint, too."""
    import jax
    from common import student_model
    from train_vs_transformers import model_sizes

    import gptoss_jax as gx
    from gptoss_jax.model.transformer import bind, init_params

    config = student_model(**model_sizes(experts, top_k, layers), initializer_range=0.1)
    model = bind(config, jax.jit(lambda: init_params(config, jax.random.key(0)))())
    gx.save_pretrained(model, folder, experts="float32")
    rows = random_prompts(max(batches), prompt)

    def generate(side, batch, count):
        return gx.generate(model, rows[:batch], gx.SamplingParams(max_new_tokens=count))

    return abilities([OURS], batches, (1, new), generate)


def transformers(
    folder: str, experts: int, top_k: int, layers: int, batches: list[int], prompt: int, new: int
):
    import torch
    from transformers import GptOssForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = GptOssForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    # Into memory of its own, in huge pages, whatever the loader has mapped.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    # No token ends an answer.
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

    return abilities(IMPLEMENTATIONS, batches, (1, new), generate)


# What asks them.


def those_that_run(settings: dict, batch: int) -> list[str]:
    """`batched_mm` copies the matrices of each token's experts, the wider ones of a layer first."""
    copies = batch * settings["prompt"] * settings["top_k"] * 384 * 2 * 960 * 4
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return [name for name in IMPLEMENTATIONS if name != "batched_mm" or copies < memory / 4]


def same_before_difference(ours: list[list[int]], theirs: list[list[int]]) -> int:
    pairs = (zip(a, b, strict=True) for a, b in zip(ours, theirs, strict=True))
    return sum(len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], row))) for row in pairs)


def measure(settings: dict, rounds: int, pilots: int) -> list[dict]:
    """For each number of prompts: the pilots, the peers that they chose, and each side's seconds by count."""
    from decoding import longer

    counts = (1, settings["new"])
    with tempfile.TemporaryDirectory() as folder:
        settings = settings | {"folder": str(pathlib.Path(folder) / "checkpoint")}
        us = Worker("decode_vs_transformers", "ours", settings)
        them = Worker("decode_vs_transformers", "transformers", settings)
    results = []
    for batch in settings["batches"]:
        pilot = {}
        for name in those_that_run(settings, batch):
            # The first call of each is not counted.
            calls = [[them.ask(f"{name} {batch} {count}") for count in counts] for _ in range(1 + pilots)]
            short, long = ([call[i] for call in calls[1:]] for i in (0, 1))
            pilot[name] = {"prefill": short, "decode": longer(short, long)}
        peers = {
            stage: min(pilot, key=lambda name: statistics.median(pilot[name][stage]))
            for stage in ("prefill", "decode")
        }
        answers = us.ask(f"{OURS} {batch} tokens"), them.ask(f"{peers['decode']} {batch} tokens")
        us.ask(f"{OURS} {batch} 1")
        results.append(
            {name: settings[name] for name in ("experts", "top_k", "layers", "prompt", "new")}
            | {"batch": batch, "same_tokens": same_before_difference(*answers), "pilot": pilot}
            | {"different_tokens_of_ours": len({token for row in answers[0] for token in row})}
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
    """Rows of the table, and the figures in them added to the result."""
    from common import show, spread
    from decoding import longer

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
                speeds.append(spread([batch * (new - 1) / one for one in longer(short, long)]))
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
        name = f"decoding over transformers, {result['experts']} experts, batch {result['batch']}"
        if least is not None:
            found.append(bounded(name, result["ratios"]["decode"], least=least))
    return found


def earlier() -> list[dict]:
    """What the file has; a run of some cases leaves the others' as they are."""
    from common import RESULTS

    file = RESULTS / "decode_vs_transformers.json"
    return json.loads(file.read_text(encoding="utf-8"))["results"] if file.exists() else []


def make_parser():
    from common import flags

    parser = flags(__doc__, rounds=7)
    parser.add_argument("--experts", type=int, nargs="+", help="only these of 4 and 32")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="default: 1 4 16")
    return parser


def main() -> None:
    # Only to say where this runs; the workers do the work.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from common import print_table, versions, write_json

    options = make_parser().parse_args()
    quick, results = options.quick, []
    rounds = 2 if quick else options.rounds
    shape = {"layers": 2, "batches": [2], "prompt": 8, "new": 5} if quick else {"layers": 6}
    shape = {"batches": list(options.batches), "prompt": 128, "new": 129} | shape
    for experts, top_k in SIZES[:1] if quick else SIZES:
        if options.experts and experts not in options.experts:
            continue
        print(f"{experts} experts, top-{top_k}", flush=True)
        results += measure({"experts": experts, "top_k": top_k} | shape, rounds, pilots=1 if quick else 2)
    table = [row for result in results for row in report(result)]
    print_table(
        f"Prompts of {shape['prompt']} tokens, answers of {shape['new']}, {rounds} rounds, tokens/s",
        ("experts", "ours", "transformers", "its experts", "ours / this"),
        table,
    )
    for result in results:
        asked = result["batch"] * result["new"]
        title = f"{result['experts']} experts, batch {result['batch']}"
        print(f"{title}: {result['same_tokens']} of {asked} greedy tokens are the same on both sides")
    if quick:
        return
    done = {(result["experts"], result["batch"]) for result in results}
    results += [result for result in earlier() if (result["experts"], result["batch"]) not in done]
    results.sort(key=lambda result: (result["experts"], result["batch"]))
    record = {"versions": versions("torch", "transformers"), "rounds": rounds, "bounds": bounds(results)}
    print(write_json("decode_vs_transformers", record | {"results": results}))


if __name__ == "__main__":
    main()
