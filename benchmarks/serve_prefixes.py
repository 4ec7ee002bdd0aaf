"""The second turn of a long conversation: python benchmarks/serve_prefixes.py.

Two servers with the same small model (6 layers of width 384, 32 experts top-4, window 256, vocabulary 4,096,
float32), one with `--prefix-reuse any` and one with `off`. A conversation is a random prompt of 2,000 tokens,
an answer of 32, and 40 more tokens. A round sends both turns of a new conversation to each server; the other
one is stopped meanwhile.

Shows the time to the first token of the second turn, its cached tokens, and how many answers are equal; the
ratio is the median of the rounds' ratios. Writes results/serve_prefixes.json.
"""

import asyncio
import contextlib
import os
import pathlib
import random
import statistics
import tempfile

import serving
from workers import Worker

MODES = ("any", "off")


def turn(server: serving.Server, prompt: list[int], new: int) -> tuple[serving.Answer, float, int]:
    """Returns an answer, the milliseconds to its first token, and the cached tokens."""
    usage = {}

    def keep(event):
        usage.update(event.get("usage") or {})

    fields = serving.body(prompt, new, stream_options={"include_usage": True})
    answer = asyncio.run(serving.request(server.port, fields, keep))
    first = 1e3 * (answer.arrivals[0][0] - answer.sent)
    return answer, first, usage["prompt_tokens_details"]["cached_tokens"]


def conversation(server: serving.Server, settings: dict, seed: int) -> dict:
    rng = random.Random(f"{seed}")  # of a text: the numbers 1 and -1 are the same seed
    prompt, more = (rng.choices(range(4096), k=settings[name]) for name in ("prompt", "more"))
    first, first_ms, _ = turn(server, prompt, settings["new"])
    second, second_ms, cached = turn(server, prompt + first.tokens + more, settings["new"])
    tokens = first.tokens + second.tokens
    return {"first_ms": first_ms, "second_ms": second_ms, "cached_tokens": cached, "tokens": tokens}


def measure(settings: dict, rounds: int) -> dict[str, list[dict]]:
    """Returns the conversations of each round with each server."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        checkpoint = pathlib.Path(folder) / "checkpoint"
        sizes = {"experts": settings["experts"], "top_k": 4, "layers": settings["layers"], "form": "float32"}
        Worker("serving", "write_checkpoint", {"folder": str(checkpoint)} | sizes).close()
        servers = {
            mode: stack.enter_context(
                contextlib.closing(serving.gptoss_serve(checkpoint, 2, 4096, "--prefix-reuse", mode))
            )
            for mode in MODES
        }
        found = {mode: [] for mode in MODES}
        for i in range(-1, rounds):  # the first compiles
            for mode, server in servers.items():
                (other,) = (one for name, one in servers.items() if name != mode)
                with other.stopped():
                    result = conversation(server, settings, seed=i)
                if i >= 0:
                    found[mode].append(result)
    return found


def main() -> None:
    # The parent is only a client.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from common import base_parser, bounded, print_table, show, spread, write_json

    options = base_parser(__doc__, rounds=7).parse_args()
    quick, rounds = options.quick, 1 if options.quick else options.rounds
    settings = {"prompt": 2000, "new": 32, "more": 40, "layers": 6, "experts": 32}
    settings |= {"prompt": 40, "new": 3, "more": 5, "layers": 2, "experts": 4} if quick else {}
    found = measure(settings, rounds)
    rows = []
    for mode, results in found.items():
        times = (show(spread([one[name] for one in results]), 0) for name in ("first_ms", "second_ms"))
        cached = {one["cached_tokens"] for one in results}
        rows.append((f"--prefix-reuse {mode}", *times, " ".join(map(str, sorted(cached)))))
    print_table(f"{rounds} rounds", ("server", "TTFT in ms, turn 1", "turn 2", "cached tokens"), rows)
    pairs = list(zip(*found.values(), strict=True))
    same = sum(a["tokens"] == b["tokens"] for a, b in pairs)
    print(f"{same} of {rounds} conversations have the same tokens with both")
    ratio = statistics.median(off["second_ms"] / reuse["second_ms"] for reuse, off in pairs)
    bounds = [bounded("TTFT of turn 2, off / any", ratio, least=10)]
    if not quick:
        for results in found.values():
            for one in results:
                del one["tokens"]
        record = {"rounds": rounds, "settings": settings, "same": same, "bounds": bounds}
        print(write_json("serve_prefixes", record | {"results": found}))


if __name__ == "__main__":
    main()
