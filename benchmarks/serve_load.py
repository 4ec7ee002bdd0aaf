"""A server under load: python benchmarks/serve_load.py.

Starts `gptoss serve` on a small model with random weights (6 layers of width 384, 4 experts top-2, vocabulary
4,096, float32) with 8 slots, and sends it greedy requests: random prompts of 128 tokens, answers of 128. Up
to 1, 4, 8 and 16 at a time, then at random times (Poisson). The peer is the engine itself: 8 prompts in one
call of `gx.generate` in another process: its decoding (the time of 129 tokens minus that of one), and all of
it, the prompts included, which the server has to read too. The two alternate, and each is stopped while the
other is measured. Longer answers to shorter prompts (--prompt 32 --new 256) show the server's own cost.

Shows p50, p90 and p99 of the time to the first token (TTFT), between events of a stream (ITL), and per token
after the first (TPOT), in ms; ratios of tokens/s at 8 to the engine's are medians of the rounds' ratios.
--cancel N sends N requests instead, most of which are closed at random times, and shows what is left of them
in the server. --url measures a server that runs already. Writes results/serve_load_PROMPT_NEW.json.
"""

import asyncio
import contextlib
import itertools
import os
import pathlib
import random
import re
import statistics
import tempfile
import urllib.parse

import serving
from decode_vs_transformers import make_commands, random_prompts
from workers import Worker

SLOTS, BUSIEST = 8, 16
CONCURRENCY = (1, 4, SLOTS, BUSIEST)
ENGINE = ("decoding", "with prompts")
# The most that a server's memory may grow in a run with --cancel, in MB.
MAX_GROWTH = 50


# Runs in the worker.


def engine(folder: str, prompt: int, new: int):
    import gptoss_jax as gx

    model, rows = gx.from_pretrained(folder), random_prompts(SLOTS, prompt)

    def generate(side, batch, count):
        return [
            one.tokens for one in gx.generate(model, rows[:batch], gx.SamplingParams(max_new_tokens=count))
        ]

    return make_commands(["engine"], [SLOTS], (1, new + 1), generate)


# Runs in the parent.


def engine_speed(worker: Worker, new: int) -> dict[str, float]:
    """Returns tokens/s of the engine with all slots in use: of its decoding, and with the prompts."""
    short, long = (worker.ask(f"engine {SLOTS} {count}") for count in (1, new + 1))
    return {"decoding": SLOTS * new / (long - short), "with prompts": SLOTS * (new + 1) / long}


async def measure(port: int, settings: dict, concurrency: int | None, rate: float | None, seed: int) -> dict:
    """Returns the figures of one load; `concurrency` None is Poisson arrivals at `rate` per second."""
    bodies = serving.random_bodies(settings["prompt"], settings["new"], seed)
    if concurrency is None:
        answers = await serving.poisson(port, bodies, rate, settings["requests"], seed)
    else:
        # A multiple of the clients, so that none is idle at the end for long.
        count = concurrency * max(settings["requests"] // concurrency, 1)
        answers = await serving.closed_loop(port, bodies, concurrency, count)
    return serving.figures(answers)


def loads(server: serving.Server, worker: Worker | None, settings: dict, rounds: int) -> dict:
    """Returns the figures of each load in each round, and the engine's tokens/s."""
    found, engine_speeds, seeds, rate = {}, [], itertools.count(), None
    asyncio.run(measure(server.port, settings, SLOTS, 0, next(seeds)))  # warms up, as does the engine's first
    if worker is not None:
        engine_speed(worker, settings["new"])
    for _ in range(rounds):
        for concurrency in (*settings["concurrency"], None):
            if concurrency == SLOTS and worker is not None:
                with server.stopped():
                    engine_speeds.append(engine_speed(worker, settings["new"]))
            figures = asyncio.run(measure(server.port, settings, concurrency, rate, next(seeds)))
            # Poisson arrivals are three quarters of what the server can do.
            rate = rate or (0.75 * figures["requests_per_second"] if concurrency == BUSIEST else None)
            clients = f"{concurrency} client{'s' * (concurrency != 1)}" if concurrency else ""
            name = clients or f"Poisson, {rate:.2f} per second"
            found.setdefault(name, []).append(figures)
    return {"loads": found, "engine_tokens_per_second": engine_speeds}


async def cancel_at_random(port: int, settings: dict, count: int, concurrency: int = 24) -> int:
    """Sends requests, closes three of four at random times; returns the number of complete answers."""
    rng, bodies, complete = random.Random(0), serving.random_bodies(settings["prompt"], settings["new"], 0), 0

    async def client(share):
        nonlocal complete
        for fields in itertools.islice(bodies, share):
            patience = rng.choice([None, 0.0, rng.uniform(0, 0.2), rng.uniform(0, 1)])
            with contextlib.suppress(asyncio.TimeoutError):
                answer = await asyncio.wait_for(serving.request(port, fields), patience)
                complete += answer.is_complete

    await asyncio.gather(*(client(count // concurrency) for _ in range(concurrency)))
    return complete


def gauges(server: serving.Server) -> dict[str, float]:
    """Returns the numbers of running and of waiting requests, and other gauges of the engine."""
    lines = re.findall(r"^vllm:(num_\w+|\w+_usage_\w+)\{[^}]*\} (\S+)$", server.get("/metrics"), re.M)
    return {name: float(value) for name, value in lines}


def cancel(server: serving.Server, settings: dict, count: int) -> dict:
    """Returns what cancelled requests leave behind: gauges, memory, and whether an answer has changed."""
    probe = serving.body(range(settings["prompt"]), settings["new"])
    before = asyncio.run(serving.request(server.port, probe)).tokens
    # Buffers and caches fill first.
    asyncio.run(cancel_at_random(server.port, settings, max(count // 5, 24)))
    memory = server.memory()
    complete = asyncio.run(cancel_at_random(server.port, settings, count))
    after = asyncio.run(serving.request(server.port, probe)).tokens
    growth = (server.memory() - memory) / 1e6
    found = {"requests": count, "complete": complete, "growth_mb": growth, "gauges": gauges(server)}
    return found | {"same_answer": before == after}


def show_loads(found: dict, rounds: int) -> None:
    from common import print_table, show, spread

    rows = []
    for name, results in found["loads"].items():
        medians = {key: statistics.median(one[key] for one in results) for key in results[0]}
        times = (
            " / ".join(f"{medians[f'{kind}_p{percentile}']:.0f}" for percentile in serving.PERCENTILES)
            for kind in ("ttft", "itl", "tpot")
        )
        rows.append((name, show(spread([one["tokens_per_second"] for one in results]), 0), *times))
    for name in ENGINE if found["engine_tokens_per_second"] else ():
        speeds = [one[name] for one in found["engine_tokens_per_second"]]
        rows.append((f"engine, batch {SLOTS}, {name}", show(spread(speeds), 0), *[None] * 3))
    print_table(
        f"Load on gptoss serve, {rounds} rounds; p50 / p90 / p99 in ms",
        ("load", "tokens/s", "TTFT", "ITL", "TPOT"),
        rows,
    )


def ratio_to_engine(found: dict, name: str) -> float | None:
    """Returns the median ratio of tokens/s with a client for each slot to the engine's."""
    served = [one["tokens_per_second"] for one in found["loads"].get(f"{SLOTS} clients", [])]
    pairs = zip(served, found["engine_tokens_per_second"], strict=False)
    ratios = [ours / engines[name] for ours, engines in pairs]
    return statistics.median(ratios) if ratios else None


def make_parser():
    from common import base_parser

    parser = base_parser(__doc__, rounds=5)
    parser.add_argument("--cancel", type=int, metavar="N", help="send N requests and cancel most of them")
    parser.add_argument("--url", help="a server that runs already, such as http://127.0.0.1:8000")
    parser.add_argument("--requests", type=int, default=48, help="requests of a load (default: 48)")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt (default: 128)")
    parser.add_argument("--new", type=int, default=128, help="tokens of an answer (default: 128)")
    return parser


def main() -> None:
    # The parent is only a client.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from common import bounded, write_json

    options = make_parser().parse_args()
    quick, rounds = options.quick, 1 if options.quick else options.rounds
    settings = {"prompt": options.prompt, "new": options.new, "requests": options.requests, "layers": 6}
    settings |= {"prompt": 8, "new": 6, "requests": 8, "layers": 2} if quick else {}
    settings["concurrency"] = (SLOTS, BUSIEST) if quick else CONCURRENCY
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, worker = pathlib.Path(folder) / "checkpoint", None
        if options.url:
            server = serving.Server(urllib.parse.urlsplit(options.url).port)
        else:
            sizes = {"experts": 4, "top_k": 2, "layers": settings["layers"], "form": "float32"}
            Worker("serving", "write_checkpoint", {"folder": str(checkpoint)} | sizes).close()
            server = serving.gptoss_serve(checkpoint, SLOTS, 512)
        with contextlib.closing(server):
            if options.cancel or quick:
                found = cancel(server, settings, options.cancel or 48)
                print(f"{found}", flush=True)
                if not quick:
                    bounds = [bounded("growth of memory, MB", max(found["growth_mb"], 0), most=MAX_GROWTH)]
                    print(write_json("serve_load_cancel", {"settings": settings, "bounds": bounds} | found))
                    return
            if not options.url:
                shape = {"folder": str(checkpoint), "prompt": settings["prompt"], "new": settings["new"]}
                worker = Worker("serve_load", "engine", shape)
            found = loads(server, worker, settings, rounds)
            if worker is not None:
                worker.close()
    show_loads(found, rounds)
    ratios = {name: ratio_to_engine(found, name) for name in ENGINE}
    if None not in ratios.values():
        title = f"tokens/s of {SLOTS} clients / engine's batch {SLOTS}"
        bounds = [bounded(f"{title}, {name}", ratio, least=0.9) for name, ratio in ratios.items()]
        if not quick:
            name = f"serve_load_{settings['prompt']}_{settings['new']}"
            print(write_json(name, {"settings": settings, "rounds": rounds, "bounds": bounds} | found))


if __name__ == "__main__":
    main()
