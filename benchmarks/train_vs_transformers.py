"""Training speed against transformers: python benchmarks/train_vs_transformers.py.

A small model (6 layers of width 384, window 256) with 4, 32 and 128 experts, batch 4 x 512, float32, AdamW
with clipping. Each side runs in a separate process on all cores and waits while the other is measured, after
two steps of warmup. A round is one step of each side and, in our process, a matmul of 2,048^3, the peak for
our useful operations. With 128 experts the sides do not fit in memory together: each turn starts a new
process, which builds the model, takes two steps of warmup and three measured ones; there are fewer rounds.

The peers are the `eager` and `grouped_mm` experts of transformers. Its `batched_mm` is left out: it copies
the matrices of each token's experts, 18 GB per layer at top-2 and 36 GB at top-4 without gradients, and the
machine has 24 GB.

Shows tokens/s as medians (min–max), and the ratio of the medians, ours over the peer's; writes the seconds of
all rounds to results/train_vs_transformers.json. Needs pip install -e '.[parity]'.
"""

import os
import statistics
import time

from workers import Worker

OURS = "gptoss_jax"
# Experts, experts per token, and True if each turn starts a new process.
SIZES = ((4, 2, False), (32, 4, False), (128, 4, True))
QUICK = ((4, 2, False), (8, 4, True))
IMPLEMENTATIONS = ("eager", "grouped_mm")
STEPS_PER_TURN = 3


# Runs in the workers. The torch side does not import jax.


def model_sizes(experts: int, top_k: int, layers: int) -> dict:
    """Returns the settings that have the same names on both sides."""
    return {
        "vocab_size": 4096,
        "hidden_size": 384,
        "intermediate_size": 960,
        "num_hidden_layers": layers,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_local_experts": experts,
        "num_experts_per_tok": top_k,
        "sliding_window": 256,
        "tie_word_embeddings": True,
    }


def seconds_of(action) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def ours(experts: int, top_k: int, layers: int, rows: int, length: int) -> dict:
    from common import Training, small_model, square_matmul

    from gptoss_jax.hardware import flops_per_token

    model = small_model(**model_sizes(experts, top_k, layers))
    training, multiply = Training(model, rows, length), square_matmul()
    multiply().block_until_ready()
    for _ in range(2):
        training.step()
    return {
        "step": lambda: seconds_of(lambda: training.step().block_until_ready()),
        "peak": lambda: 2 * 2048**3 / seconds_of(lambda: multiply().block_until_ready()),
        "flops": lambda: flops_per_token(model, length),
    }


def transformers(experts: int, top_k: int, layers: int, rows: int, length: int, implementation: str) -> dict:
    import numpy as np
    import torch
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    config = GptOssConfig(
        **model_sizes(experts, top_k, layers),
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        attn_implementation="eager",
        experts_implementation=implementation,
    )
    model = GptOssForCausalLM(config).float().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
    tokens = torch.as_tensor(np.random.default_rng(0).integers(0, config.vocab_size, (rows, length + 1)))

    def step():
        logits = model(tokens[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    for _ in range(2):
        step()
    return {"step": lambda: seconds_of(step)}


# Runs in the parent.


def measure(settings: dict, fresh: bool, rounds: int, peers: list[str]) -> dict:
    """Returns the seconds of the steps of each side, one list per round, and the peaks."""

    def start(name):
        if name == OURS:
            return Worker("train_vs_transformers", "ours", settings)
        return Worker("train_vs_transformers", "transformers", settings | {"implementation": name})

    names = (OURS, *peers)
    seconds, peaks, flops = {name: [] for name in names}, [], None
    workers = {} if fresh else {name: start(name) for name in names}
    for _ in range(rounds):
        for name in names:
            worker = start(name) if fresh else workers[name]
            if name == OURS:
                peaks.append(worker.ask("peak"))
                flops = worker.ask("flops")
            seconds[name].append([worker.ask("step") for _ in range(STEPS_PER_TURN if fresh else 1)])
            if fresh:
                worker.close()
    for worker in workers.values():
        worker.close()
    return settings | {"fresh": fresh, "flops_per_token": flops, "peaks": peaks, "seconds": seconds}


def report(result: dict) -> list[tuple]:
    """Returns the rows of the table, and adds their figures to the result."""
    from common import percent, show, spread

    tokens = result["rows"] * result["length"]
    speeds = {
        name: spread([tokens / one for turn in turns for one in turn])
        for name, turns in result["seconds"].items()
    }
    share = result["flops_per_token"] * speeds[OURS]["median"] / statistics.median(result["peaks"])
    ratios = {name: speeds[OURS]["median"] / speed["median"] for name, speed in speeds.items()}
    result |= {"tokens_per_second": speeds, "ratios": ratios, "of_peak": share}
    title = f"{result['experts']} top-{result['top_k']}"
    return [
        (f"{title}, {name}", show(speed, 0), f"{ratios[name]:.2f}", percent(share) if name == OURS else None)
        for name, speed in speeds.items()
    ]


def make_parser():
    from common import base_parser

    parser = base_parser(__doc__, rounds=7)
    parser.add_argument("--experts", type=int, nargs="+", help="only these of 4, 32 and 128")
    parser.add_argument(
        "--peers", nargs="+", default=IMPLEMENTATIONS, help="its implementations (default: eager grouped_mm)"
    )
    return parser


def main() -> None:
    # The parent only describes the hardware; the workers measure.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from common import previous_results, print_table, today, versions, write_json

    options = make_parser().parse_args()
    quick, results, table = options.quick, [], []
    rounds, shape = (2, (1, 64)) if quick else (options.rounds, (4, 512))
    for experts, top_k, fresh in QUICK if quick else SIZES:
        if options.experts and experts not in options.experts:
            continue
        settings = {"experts": experts, "top_k": top_k, "layers": 2 if quick else 6}
        settings |= {"rows": shape[0], "length": shape[1]}
        print(f"{experts} experts, top-{top_k}", flush=True)
        # A new process takes a minute to start.
        found = measure(settings, fresh, 1 + rounds // 5 if fresh else rounds, options.peers)
        results.append({"date": today()} | found)
        table += report(results[-1])
    print_table(
        f"Training, {shape[0]} x {shape[1]} tokens, {rounds} rounds",
        ("experts", "tokens/s", "ours / this", "our share of the matmul peak"),
        table,
    )
    if not quick:
        done = {result["experts"] for result in results}
        results += [
            result for result in previous_results("train_vs_transformers") if result["experts"] not in done
        ]
        results.sort(key=lambda result: result["experts"])
        record = {"versions": versions("torch", "transformers"), "rounds": rounds, "results": results}
        print(write_json("train_vs_transformers", record))


if __name__ == "__main__":
    main()
