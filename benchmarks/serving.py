"""Shared by the benchmarks of servers: a client of /v1/completions on asyncio, loads, their figures, servers.

TTFT is the time from sending a request to the first token of its answer, waiting included; ITL the time
between two events of a stream that have tokens; TPOT the mean time of a token after the first.
"""

import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Sequence

import numpy as np
from workers import MEMORY

HERE = pathlib.Path(__file__).parent
PERCENTILES = (50, 90, 99)


@dataclasses.dataclass
class Answer:
    """A request's times, and its tokens or their number."""

    sent: float
    arrivals: list[tuple[float, int]] = dataclasses.field(default_factory=list)  # time, number of tokens
    tokens: list[int] = dataclasses.field(default_factory=list)  # of servers that send ids
    is_complete: bool = False

    @property
    def num_tokens(self) -> int:
        return sum(count for _, count in self.arrivals)


def body(prompt: Sequence[int], new: int, **fields) -> dict:
    """Returns a greedy streaming request for exactly `new` tokens."""
    fixed = {"temperature": 0, "ignore_eos": True, "stream": True, "return_token_ids": True}
    return {"prompt": list(map(int, prompt)), "max_tokens": new, **fixed, **fields}


def random_bodies(prompt: int, new: int, seed: int, vocabulary: int = 4096) -> Iterator[dict]:
    """Yields endless requests with different random prompts, so that no prefix can be reused."""
    rng = np.random.default_rng(seed)
    while True:
        yield body(rng.integers(0, vocabulary, prompt), new)


async def request(port: int, fields: dict, see: Callable[[dict], None] = lambda event: None) -> Answer:
    """Sends a streaming request and reads the whole answer; `see` gets each event.

    Raises RuntimeError unless all tokens come.
    """
    answer = Answer(time.perf_counter())
    async for event in events(port, fields):
        if "error" in event:
            raise RuntimeError(f"the server answers {event}")
        see(event)
        for choice in event["choices"]:
            ids = choice.get("token_ids")
            count = bool(choice["text"]) if ids is None else len(ids)
            answer.tokens += ids or []
            if count:
                answer.arrivals.append((time.perf_counter(), count))
    answer.is_complete = True
    if answer.num_tokens != fields["max_tokens"]:
        raise RuntimeError(f"{answer.num_tokens} of {fields['max_tokens']} tokens came")
    return answer


async def events(port: int, fields: dict) -> AsyncIterator[dict]:
    """Yields the events of a stream. Closing the generator closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        content = json.dumps(fields).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        )
        writer.write(f"{head}Content-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode() + content)
        headers = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in headers.split(b"\r\n")[0]:
            raise RuntimeError(f"{headers.decode()}{(await reader.read()).decode()}")
        left = b""
        while size := int(await reader.readline(), 16):
            *lines, left = (left + (await reader.readexactly(size + 2))[:-2]).split(b"\n")
            for line in lines:
                if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
                    yield json.loads(line[6:])
    finally:
        writer.close()


async def closed_loop(port: int, bodies: Iterator[dict], concurrency: int, count: int) -> list[Answer]:
    """Sends `count` requests, the next one as soon as one of `concurrency` clients has its answer."""
    left, answers = itertools.islice(bodies, count), []

    async def client():
        for fields in left:
            answers.append(await request(port, fields))

    await asyncio.gather(*(client() for _ in range(min(concurrency, count))))
    return answers


async def poisson(port: int, bodies: Iterator[dict], rate: float, count: int, seed: int) -> list[Answer]:
    """Sends `count` requests at random times, `rate` per second on average, whatever is unanswered."""
    rng, tasks = random.Random(seed), []
    for fields in itertools.islice(bodies, count):
        tasks.append(asyncio.create_task(request(port, fields)))
        await asyncio.sleep(rng.expovariate(rate))
    return list(await asyncio.gather(*tasks))


def figures(answers: Sequence[Answer]) -> dict[str, float]:
    """Returns tokens/s and requests/s, and in milliseconds percentiles of TTFT, ITL and TPOT."""
    begin, end = min(one.sent for one in answers), max(one.arrivals[-1][0] for one in answers)
    tokens = sum(one.num_tokens for one in answers)
    times = {"ttft": [], "itl": [], "tpot": []}
    for one in answers:
        at = [moment for moment, _ in one.arrivals]
        times["ttft"].append(at[0] - one.sent)
        times["itl"] += np.diff(at).tolist()
        after_first = one.num_tokens - one.arrivals[0][1]
        times["tpot"] += [(at[-1] - at[0]) / after_first] if after_first else []
    found = {"tokens_per_second": tokens / (end - begin), "requests_per_second": len(answers) / (end - begin)}
    for name, values in times.items():
        for percentile in PERCENTILES if values else ():
            found[f"{name}_p{percentile}"] = 1e3 * float(np.percentile(values, percentile))
    return found


class Server:
    """A server that runs on this machine."""

    def __init__(self, port: int) -> None:
        self.port = port

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as response:
            return response.read().decode()

    def post(self, path: str, fields: dict) -> dict:
        """Returns the JSON answer to a request that does not stream."""
        headers = {"Content-Type": "application/json"}
        data = json.dumps(fields).encode()
        wanted = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, headers)
        with urllib.request.urlopen(wanted, timeout=600) as response:
            return json.loads(response.read())

    def close(self) -> None:
        """Leaves the server running."""


class OwnServer(Server):
    """A server in a process of its own, which can be stopped while others are measured."""

    def __init__(self, command: Sequence[str | os.PathLike], port: int) -> None:
        super().__init__(port)
        self._process = subprocess.Popen(
            list(map(str, command)),
            env=os.environ | {"GLIBC_TUNABLES": MEMORY, "JAX_PLATFORMS": "cpu"},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        )
        while not self._is_ready():
            if self._process.poll() is not None:
                raise RuntimeError(f"{' '.join(map(str, command))} exited with {self._process.returncode}")
            time.sleep(0.1)

    def _is_ready(self) -> bool:
        try:
            return bool(self.get("/health"))
        except OSError:  # also the 503 of a server that loads
            return False

    def memory(self) -> int:
        """Returns the bytes that the process has in memory."""
        status = pathlib.Path(f"/proc/{self._process.pid}/status").read_text(encoding="utf-8")
        return 1024 * int(status.partition("VmRSS:")[2].split()[0])

    @contextlib.contextmanager
    def stopped(self):
        """Keeps the process from running meanwhile: even an idle server may use a core."""
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.terminate()
        self._process.wait()


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


def gptoss_serve(folder: str | os.PathLike, slots: int, context: int, *more: str) -> OwnServer:
    """Starts `gptoss serve` with all programs compiled."""
    port = free_port()
    flags = ("--port", port, "--slots", slots, "--context", context, "--warmup", *more)
    return OwnServer([sys.executable, "-m", "gptoss_jax", "serve", folder, *flags], port)


def write_checkpoint(folder: str, experts: int, top_k: int, layers: int, form: str) -> None:
    """Writes a small model with random weights, large enough that greedy answers use many tokens."""
    import jax
    from common import small_model
    from train_vs_transformers import model_sizes

    import gptoss_jax as gx
    from gptoss_jax.data.tokenizer import make_tokenizer
    from gptoss_jax.model.transformer import bind, init_params

    config = small_model(**model_sizes(experts, top_k, layers), initializer_range=0.1)
    model = bind(config, jax.jit(lambda: init_params(config, jax.random.key(0)))())
    gx.save_pretrained(model, folder, experts=form)
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=6)) for _ in range(4000)]
    make_tokenizer("bpe:4096", lambda: iter([" ".join(words) * 2])).save(folder)
