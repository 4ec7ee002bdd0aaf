"""Serving speed against llama.cpp's server: python benchmarks/serve_vs_llamacpp.py --peer-python PYTHON.

A small model (6 layers of width 384, window 256, vocabulary 4,096) with 4 experts top-2 and with 32 experts
top-4, in float32 and with experts in MXFP4. Both servers have the same random weights, which `llamacpp.py`
copies from our checkpoint to GGUF, 8 slots and all cores. 1 and 8 clients send greedy requests over HTTP:
random prompts of 128 tokens, answers of 128. A round measures each number of clients on both sides; the
server that is not measured is stopped, because llama.cpp's spins. llama.cpp runs with its defaults: keys and
values in float16, and for MXFP4 activations in 8 bits. Ours computes in float32.

First both servers answer the same requests, llama.cpp with keys, values and attention in float32: how many
greedy tokens are equal before a row's first difference, and by how much log-probabilities differ before it.

Shows tokens/s as medians (min–max), and the median of the rounds' ratios, ours over llama.cpp's; writes
results/serve_vs_llamacpp.json. PYTHON is that of an environment with xllamacpp and gguf; default: this one.
"""

import asyncio
import contextlib
import itertools
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

import serving
from workers import Worker

SIZES, FORMS, CLIENTS = ((4, 2), (32, 4)), ("float32", "mxfp4"), (1, 8)
SLOTS, CONTEXT = 8, 512
OURS, PEER = "gptoss serve", "llama-server"
# Form -> minimum ratio of tokens/s with 8 clients.
TARGETS = {"float32": 1.3, "mxfp4": 1.0}
SCRIPT = serving.HERE / "llamacpp.py"


def llama_server(python: str, file: pathlib.Path, *more: str) -> serving.OwnServer:
    port, threads = serving.free_port(), len(os.sched_getaffinity(0))
    return serving.OwnServer([python, SCRIPT, "serve", file, port, SLOTS, CONTEXT, threads, *more], port)


def compare(ours: serving.Server, peer: serving.Server, settings: dict) -> dict:
    """Returns the number of equal greedy tokens before a row's first difference, the number of all, and the
    largest difference of log-probabilities before it."""
    bodies, same, differences = serving.random_bodies(settings["prompt"], settings["new"], seed=1), [], []
    for fields in itertools.islice(bodies, settings["checked"]):
        fields |= {"stream": False, "logprobs": 0}
        choice = ours.post("/v1/completions", fields)["choices"][0]
        mine = list(zip(choice["token_ids"], choice["logprobs"]["token_logprobs"], strict=True))
        wanted = {"n_predict": fields["max_tokens"], "n_probs": 1, "return_tokens": True}
        answer = peer.post("/completion", fields | wanted)
        found = [one["logprob"] for one in answer["completion_probabilities"]]
        theirs = list(zip(answer["tokens"], found, strict=True))
        pairs = list(
            itertools.takewhile(lambda pair: pair[0][0] == pair[1][0], zip(mine, theirs, strict=True))
        )
        same.append(len(pairs))
        differences += [abs(a[1] - b[1]) for a, b in pairs]
    return {
        "same_tokens": sum(same),
        "tokens": settings["checked"] * settings["new"],
        "largest_difference": max(differences, default=None),
    }


def load(server: serving.Server, settings: dict, clients: int, seed: int) -> dict:
    bodies = serving.random_bodies(settings["prompt"], settings["new"], seed)
    # A multiple of the clients, so that none is idle at the end for long.
    count = clients * max(settings["requests"] // clients, 1)
    return serving.figures(asyncio.run(serving.closed_loop(server.port, bodies, clients, count)))


def measure(settings: dict, python: str, rounds: int) -> list[dict]:
    """Returns for each number of clients the figures of both sides in each round."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        checkpoint, gguf = (pathlib.Path(folder) / name for name in ("checkpoint", "model.gguf"))
        sizes = {name: settings[name] for name in ("experts", "top_k", "layers", "form")}
        Worker("serving", "write_checkpoint", {"folder": str(checkpoint)} | sizes).close()
        subprocess.run([python, SCRIPT, "write", checkpoint, gguf], check=True)
        ours = stack.enter_context(contextlib.closing(serving.gptoss_serve(checkpoint, SLOTS, CONTEXT)))
        with contextlib.closing(llama_server(python, gguf, "exact")) as peer:
            compared = compare(ours, peer, settings)
        peer = stack.enter_context(contextlib.closing(llama_server(python, gguf)))
        sides, seeds = {OURS: (ours, peer), PEER: (peer, ours)}, itertools.count()
        results = [settings | compared | {"clients": clients} for clients in settings["clients"]]
        for result in results:
            result["figures"] = {OURS: [], PEER: []}
        for i in range(-1, rounds):  # the first warms up
            for result in results:
                seed = next(seeds)
                for name, (server, other) in sides.items():
                    with other.stopped():
                        figures = load(server, settings, result["clients"], seed)
                    if i >= 0:
                        result["figures"][name].append(figures)
    return results


def report(results: list[dict], rounds: int) -> list[dict]:
    """Prints the tables, adds the ratios to the results, and returns the bounds."""
    from common import bounded, print_table, show, spread

    speed, first, rows, bounds = "tokens_per_second", "ttft_p50", [], []
    for result in results:
        ours, peer = result["figures"].values()
        ratios = [a[speed] / b[speed] for a, b in zip(ours, peer, strict=True)]
        result["ratio"] = statistics.median(ratios)
        title = f"{result['experts']} top-{result['top_k']}, {result['form']}, {result['clients']} clients"
        speeds = (show(spread([one[speed] for one in side]), 0) for side in (ours, peer))
        waits = (show(spread([one[first] for one in side]), 0) for side in (ours, peer))
        rows.append((title, *speeds, f"{result['ratio']:.2f}", *waits))
        if result["clients"] == max(CLIENTS):
            bounds.append((f"{OURS} / {PEER}, {title}", result["ratio"], TARGETS[result["form"]]))
    print_table(
        f"{rounds} rounds",
        ("experts", f"tokens/s, {OURS}", PEER, "ratio", f"TTFT p50 in ms, {OURS}", PEER),
        rows,
    )
    lines = (
        f"{one['experts']} experts, {one['form']}: {one['same_tokens']} of {one['tokens']} greedy tokens are "
        f"the same on both sides; log-probabilities differ by at most {one['largest_difference'] or 0:.1e}"
        for one in results
    )
    print("\n".join(dict.fromkeys(lines)))
    return [bounded(name, ratio, least=least) for name, ratio, least in bounds]


def make_parser():
    from common import base_parser

    parser = base_parser(__doc__, rounds=5)
    parser.add_argument("--peer-python", default=sys.executable, metavar="PYTHON", help="of the environment")
    parser.add_argument("--experts", type=int, nargs="+", help="only these of 4 and 32")
    parser.add_argument("--requests", type=int, default=32, help="requests of a load (default: 32)")
    parser.add_argument("--forms", nargs="+", default=FORMS, help="default: float32 mxfp4")
    return parser


def main() -> None:
    # The parent is only a client.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from common import previous_results, today, write_json

    options = make_parser().parse_args()
    quick, rounds, results = options.quick, 1 if options.quick else options.rounds, []
    shape = {"layers": 2, "prompt": 8, "new": 6, "requests": 4, "checked": 2, "clients": [2]}
    full = {
        "layers": 6,
        "prompt": 128,
        "new": 128,
        "requests": options.requests,
        "checked": 4,
        "clients": list(CLIENTS),
    }
    version = "from importlib.metadata import version; print(version('xllamacpp'))"
    peer = subprocess.run(
        [options.peer_python, "-c", version], capture_output=True, encoding="utf-8", check=True
    )
    for (experts, top_k), form in itertools.product(SIZES[:1] if quick else SIZES, options.forms):
        if options.experts and experts not in options.experts:
            continue
        print(f"{experts} experts top-{top_k}, {form}", flush=True)
        settings = {"experts": experts, "top_k": top_k, "form": form} | (shape if quick else full)
        found = measure(settings, options.peer_python, rounds)
        results += [{"date": today()} | result for result in found]
    bounds = report(results, rounds)
    if not quick:
        done = {(result["experts"], result["form"]) for result in results}
        results += [
            result
            for result in previous_results("serve_vs_llamacpp")
            if (result["experts"], result["form"]) not in done
        ]
        results.sort(key=lambda result: (result["form"], result["experts"], result["clients"]))
        record = {"rounds": rounds, "bounds": bounds, "results": results, "xllamacpp": peer.stdout.strip()}
        print(write_json("serve_vs_llamacpp", record))


if __name__ == "__main__":
    main()
