"""A server over a real socket: clients that leave, write slowly or do not read, pings, and SIGTERM."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading

import httpx2 as httpx
import openai
import pytest
from helpers.live_server import live_server, wait_until
from helpers.scripted_engine import ScriptedEngine, scripted_service

from gptoss_jax.server.engine_thread import MAX_FAULTS
from gptoss_jax.server.service import Settings

# Never ends by itself.
LONG = {"model": "tiny", "prompt": "a", "max_tokens": 4000}


@pytest.fixture
def serve():
    """(settings, engine's arguments) -> the address of a server, and its engine and service."""
    with contextlib.ExitStack() as stack:

        def make(settings=Settings(), max_queue=256, script=None, **engine):  # noqa: B008
            scripted = ScriptedEngine(script or (lambda request: [70] * 5000), **engine)
            service = scripted_service(scripted, settings=settings, max_queue=max_queue)
            return stack.enter_context(live_server(service)), scripted, service

        yield make


def connect(address):
    host, port = address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def post(connection, body, path="/v1/completions", length=None):
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length or len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(serve, stream):
    address, engine, service = serve(step_seconds=0.005)
    with connect(address) as connection:
        post(connection, LONG | {"stream": stream, "n": 2})
        wait_until(lambda: engine.num_running == 2)
    wait_until(lambda: len(engine.cancelled) == 2)
    assert engine.num_running == 0
    # Seen within a few steps of the engine, not at the answer's end.
    assert engine.num_steps < 200
    wait_until(lambda: service.num_requests == 0 and service.engine.num_open == 0)


def test_a_client_that_leaves_the_queue(serve):
    address, engine, _ = serve(step_seconds=0.005, num_slots=1)
    with connect(address) as first, connect(address) as second:
        post(first, LONG)
        wait_until(lambda: engine.num_running == 1)
        post(second, LONG)
        wait_until(lambda: engine.num_waiting == 1)
        second.close()
        wait_until(lambda: engine.num_waiting == 0)
        assert engine.num_running == 1


def test_a_reader_that_stops_reading_stalls_nobody_and_is_cut_off(serve):
    address, engine, service = serve(Settings(send_timeout=0.5), num_slots=5, chunk=100)
    with socket.socket() as connection:
        # Little fits into the buffers.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = address.removeprefix("http://").split(":")
        connection.connect((host, int(port)))
        # About 1 MB of events.
        post(connection, LONG | {"stream": True, "n": 4, "logprobs": 0})
        wait_until(lambda: engine.num_running > 0)
        answer = httpx.post(f"{address}/v1/completions", json=LONG | {"max_tokens": 5}, timeout=60)
        assert answer.json()["usage"]["completion_tokens"] == 5
        wait_until(lambda: service.engine.num_open == 0)
        wait_until(lambda: service.num_requests == 0)


def test_a_body_that_comes_too_slowly(serve):
    address, _, _ = serve(Settings(body_timeout=0.2))
    with connect(address) as connection:
        post(connection, {}, length=1000)
        answer = b"".join(iter(lambda: connection.recv(4096), b"")).decode()
    assert answer.startswith("HTTP/1.1 408 ")
    assert "did not arrive within 0.2 s" in answer


def test_a_body_without_a_declared_length_is_cut_off(serve):
    address, _, _ = serve(Settings(max_body=1000))
    with connect(address) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head.encode() + b"400\r\n" + b" " * 1024 + b"\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_a_client_that_sends_too_much_gets_the_error(serve):
    address, _, _ = serve(Settings(max_body=1000))
    with connect(address) as connection:
        # Its whole body first, as many clients do.
        post(connection, LONG | {"prompt": "a" * 20_000_000})
        answer = b"".join(iter(lambda: connection.recv(4096), b"")).decode()
    assert answer.startswith("HTTP/1.1 413 ") and "request_too_large" in answer


def test_pings(serve):
    address, _, _ = serve(Settings(ping_interval=0.05), script=[70] * 2, chunk=1, step_seconds=0.2)
    with httpx.stream("POST", f"{address}/v1/completions", json=LONG | {"stream": True}) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert lines.count(": ping") >= 3
    assert sum(line.startswith("data: {") for line in lines) == 3
    assert lines[-1] == "data: [DONE]"


def test_many_clients_at_once(serve):
    address, engine, service = serve(script=lambda request: request.prompt[-1:] * 50)
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    found = {}

    def ask(token):
        fields = {"model": "tiny", "prompt": [token], "max_tokens": 50, "stream": token % 2 == 0}
        answer = client.completions.create(**fields)
        parts = answer if fields["stream"] else [answer]
        found[token] = "".join(part.choices[0].text for part in parts)

    threads = [threading.Thread(target=ask, args=(token,)) for token in range(60, 90)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tokenizer = service.tokenizer
    assert found == {token: tokenizer.decode([token] * 50) for token in range(60, 90)}
    wait_until(lambda: service.engine.num_open == 0)


def test_a_full_queue(serve):
    address, engine, _ = serve(step_seconds=0.01, num_slots=1, max_queue=2)
    with connect(address) as first, connect(address) as second:
        post(first, LONG)
        wait_until(lambda: engine.num_running == 1)
        post(second, LONG | {"n": 2})
        wait_until(lambda: engine.num_waiting == 2)
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(**LONG)
    assert caught.value.code == "queue_full"
    assert caught.value.response.headers["retry-after"] == "2"


SERVER = """
import sys, time
from gptoss_jax import startup
from helpers.scripted_engine import ScriptedEngine, scripted_service
from gptoss_jax.server import lifecycle
class Engine(ScriptedEngine):
    def step(self):
        if any(request.prompt == [0] for request in self._waiting):
            raise RuntimeError("out of memory")
        return super().step()
engine = Engine([70] * 5000, step_seconds=0.01, chunk=1)
bound = lifecycle.bind("127.0.0.1", 0)
drain, load_seconds = map(float, sys.argv[1:])
show_port = lambda service=None: print(bound.getsockname()[1], flush=True)
load = lambda: time.sleep(load_seconds) or scripted_service(engine)
on_ready = (lambda service: None) if load_seconds else show_port
def serve():
    if load_seconds:
        show_port()
    lifecycle.serve(load, bound, drain=drain, warmup=False, on_ready=on_ready)
    print("cancelled", len(engine.cancelled))
startup.leave(startup.run(serve, "server"))
"""


@pytest.fixture
def process():
    """(drain, load_seconds) -> a server in a process of its own, and its address."""
    started = []

    def start(drain, load_seconds=0):
        tests = pathlib.Path(__file__).parent
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), *sys.path])}
        command = [sys.executable, "-c", SERVER, str(drain), str(load_seconds)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
        return started[-1], f"http://127.0.0.1:{int(started[-1].stdout.readline())}"

    yield start
    for one in started:
        one.kill()
        one.wait()


def count(address, state):
    """Number of running or waiting requests, from the metrics."""
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith(f"vllm:num_requests_{state}")).split()[-1])


def test_a_broken_engine_ends_the_process(process):
    server, address = process(20)
    for _ in range(MAX_FAULTS):
        answer = httpx.post(f"{address}/v1/completions", json=LONG | {"prompt": [0]}, timeout=60)
        assert answer.status_code == 500
    assert server.wait(20) == 1


def test_sigterm_finishes_what_was_accepted(process):
    server, address = process(20)
    answers = []

    def ask(stream):
        answers.append(
            httpx.post(
                f"{address}/v1/completions", json=LONG | {"max_tokens": 60, "stream": stream}, timeout=60
            )
        )

    threads = [threading.Thread(target=ask, args=(i % 2 == 0,)) for i in range(6)]  # two of them wait
    for thread in threads:
        thread.start()
    wait_until(lambda: count(address, "running") + count(address, "waiting") + len(answers) == 6)
    server.send_signal(signal.SIGTERM)
    wait_until(lambda: httpx.get(f"{address}/health").status_code == 503)
    refused = httpx.post(f"{address}/v1/completions", json=LONG)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [200] * 6
    assert all('"finish_reason":"length"' in answer.text for answer in answers)
    assert server.wait(10) == 0
    assert server.stdout.read() == "cancelled 0\n"


def test_drain_has_an_end(process):
    server, address = process(0.2)
    with httpx.stream("POST", f"{address}/v1/completions", json=LONG | {"stream": True}) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: {")
        server.send_signal(signal.SIGTERM)
        last = [line for line in lines if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "unavailable_error"
    assert server.wait(10) == 0


def test_a_second_signal_stops_at_once(process):
    server, address = process(60)
    with connect(address) as connection:
        post(connection, LONG)
        wait_until(lambda: count(address, "running") == 1)
        server.send_signal(signal.SIGINT)
        wait_until(lambda: httpx.get(f"{address}/health").status_code == 503)
        server.send_signal(signal.SIGINT)
        assert server.wait(10) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_model_loads(process, number):
    server, address = process(60, load_seconds=60)
    with httpx.Client(transport=httpx.HTTPTransport(retries=9)) as client:
        health = client.get(f"{address}/health")
        answer = client.post(f"{address}/v1/completions", json=LONG)
    for one in (health, answer):
        assert (one.status_code, one.headers["retry-after"]) == (503, "5")
        assert one.json()["error"]["message"] == "The server is loading the model."
    server.send_signal(number)
    assert server.wait(10) == 130
