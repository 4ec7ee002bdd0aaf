"""`gptoss serve`: flags, what it loads, its banner, and a real process."""

import asyncio
import collections
import importlib.util
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import types

import httpx2 as httpx
import jax
import numpy as np
import pytest
from helpers.live_server import live_server, wait_until
from helpers.scripted_engine import ScriptedEngine, scripted_service

from gptoss_jax.cli import main
from gptoss_jax.cli.serve import Serve
from gptoss_jax.config import MeshConfig, ModelConfig
from gptoss_jax.model.transformer import bind, get_params, init_params
from gptoss_jax.parallel.mesh import make_mesh
from gptoss_jax.planning.inference import Workload
from gptoss_jax.server.load import (
    ServeConfig,
    default_name,
    fingerprint,
    load_service,
    max_slots,
    read_defaults,
    widen,
)
from gptoss_jax.server.service import Defaults, Settings


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--slots", "0"], "slots is 0: must be from 1 to"),
        (["--max-queue", "0"], "max_queue is 0: must be from 1 to"),
        (["--drain", "-1"], "drain is -1.0: must be 0 or more"),
        (["--max-body", "0"], "max_body is 0.0: must be above 0"),
        (["--port", "70000"], "port is 70000: must be from 0 to 65535"),
        (["--date", "today"], "date is 'today': must be YYYY-MM-DD"),
        (["--date", "2026-13-45"], "date is '2026-13-45': must be YYYY-MM-DD"),
        (
            ["--cors-origins", "example.com"],
            "cors_origins is 'example.com': must be like https://example.com",
        ),
        (["--cors-origins", "https://a.example/"], "cors_origins is 'https://a.example/': must be like"),
        (["--api-key", "a\nb"], "api_key is '…': must be printable ASCII"),
        (
            ["--host", "no.such.host.invalid"],
            "host is 'no.such.host.invalid' and port is 8000: cannot listen",
        ),
        (["--port", "0"], "x: no such folder"),
    ],
)
def test_bad_flags(flags, words, capsys, monkeypatch):
    monkeypatch.delenv("GPTOSS_API_KEY", raising=False)
    assert main.main(["serve", "x", *flags]) == 2
    shown = capsys.readouterr().err.removeprefix("loading x …\n")
    assert shown.startswith(f"gptoss: error: {words}") and shown.count("\n") == 1


def test_a_port_that_is_taken(capsys):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main.main(["serve", "x", "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert f"port is {port}: cannot listen there (address already in use); choose another --port" in error


def test_without_the_extra(capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    assert main.main(["serve", "x"]) == 2
    assert capsys.readouterr().err == (
        "gptoss: error: gptoss serve needs uvicorn: pip install 'gptoss-jax[serve]'\n"
    )


@pytest.mark.parametrize(
    ("host", "key", "hosts"),
    [
        ("127.0.0.1", None, ("localhost", "127.0.0.1", "[::1]")),
        ("localhost", None, ("localhost", "127.0.0.1", "[::1]")),
        ("127.0.0.1", "k", ()),
        ("0.0.0.0", None, ()),
    ],
)
def test_names_of_the_host(host, key, hosts, monkeypatch):
    monkeypatch.delenv("GPTOSS_API_KEY", raising=False)
    assert Serve("x", host=host, api_key=key)._settings().allowed_hosts == hosts


def test_the_key_of_the_environment(monkeypatch):
    monkeypatch.setenv("GPTOSS_API_KEY", "from the environment")
    assert Serve("x")._settings().api_key == "from the environment"
    assert Serve("x", api_key="given")._settings().api_key == "given"


def test_the_banner():
    service = scripted_service(ScriptedEngine(), model_id="a\x1b[2J")
    assert Serve("x")._banner(service, 80).splitlines() == [
        "model  a\\x1b[2J · chat model · 4,096 tokens · 4 slots",
        "page   http://127.0.0.1:80/",
        "API    http://127.0.0.1:80/v1",
        "key    none",
    ]
    assert "everyone who can reach this machine" in Serve("x", host="0.0.0.0")._banner(service, 80)
    service.settings = Settings(api_key="secret")
    last = Serve("x", host="::1")._banner(service, 80).splitlines()[1:]
    assert last == ["page   http://[::1]:80/", "API    http://[::1]:80/v1", "key    needed"]


@pytest.mark.parametrize(
    ("content", "defaults"),
    [
        (None, Defaults()),
        ({"do_sample": True, "eos_token_id": [3]}, Defaults()),
        ({"temperature": 0.6, "top_p": 0.9, "top_k": 20}, Defaults(0.6, 0.9, 20)),
        ({"temperature": 0, "top_k": 0, "top_p": None}, Defaults(0)),
    ],
)
def test_defaults_of_the_folder(tmp_path, content, defaults):
    if content is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(content))
    assert read_defaults(tmp_path) == defaults


@pytest.mark.parametrize("content", [{"temperature": -1}, {"top_p": 0}, {"top_p": 2}, {"top_k": "5"}])
def test_bad_defaults(tmp_path, content):
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"generation_config.json: {next(iter(content))} is"):
        read_defaults(tmp_path)


def test_names_of_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert default_name("hf:openai/gpt-oss-20b") == "openai/gpt-oss-20b"
    assert default_name("runs/a/") == "a"
    assert default_name(".") == tmp_path.name


def test_fingerprints_differ_with_the_weights(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    weights = folder / "model.safetensors"
    weights.write_bytes(bytes(300_000))
    first = fingerprint(folder, None, "float32")
    assert first == fingerprint(pathlib.Path(shutil.copytree(folder, tmp_path / "copy")), None, "float32")
    (folder / "notes.txt").write_text("no weights")
    assert first == fingerprint(folder, None, "float32") != fingerprint(folder, None, "bfloat16")
    assert first.startswith("fp_") and len(first) == 15
    data = bytearray(300_000)
    data[160_000] = 1
    weights.write_bytes(data)
    assert fingerprint(folder, None, "float32") != first


@pytest.fixture(scope="module")
def model_folder(hf_folder, tmp_path_factory):
    """A folder with weights and a tokenizer, of a base model."""
    folder = shutil.copytree(hf_folder("float32"), tmp_path_factory.mktemp("served") / "tiny")
    (folder / "tokenizer_name.txt").write_text("bytes\n")
    return folder


def test_a_service_of_a_folder(model_folder, monkeypatch):
    monkeypatch.setattr("gptoss_jax.checkpoints.load.from_pretrained", _model_with_bytes)
    service = load_service(ServeConfig(str(model_folder), slots=2, context=100, date="2026-01-02"))
    assert (service.model_id, service.max_context, service.harmony) == ("tiny", 100, None)
    assert service.engine.engine.num_slots == 2 and service.state == "loading"
    assert service.system_date() == "2026-01-02"
    with pytest.raises(ValueError, match="context is 1: must be from 2 to the model's"):
        load_service(ServeConfig(str(model_folder), context=1))


def _model_with_bytes(folder, adapter=None, mesh=None):
    """A model whose vocabulary has the bytes; the checkpoints of the tests are too small for it."""
    import jax

    from gptoss_jax.config import ModelConfig
    from gptoss_jax.model.transformer import bind, init_params

    config = ModelConfig(
        vocab_size=263, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, head_dim=16, num_local_experts=5, num_experts_per_tok=2, sliding_window=4,
        max_position_embeddings=128, rope_scaling=None, initializer_range=0.3, compute_dtype="float32",
    )  # fmt: skip
    return bind(config, init_params(config, jax.random.key(0)))


def test_narrow_weights_are_widened_once_on_cpu():
    config = ModelConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=3, num_experts_per_tok=2, expert_format="mxfp4",
    )  # fmt: skip

    def narrow(leaf):
        return leaf.astype("bfloat16") if leaf.dtype == "float32" else leaf

    params = jax.tree.map(narrow, init_params(config, jax.random.key(0)))
    model = bind(config, params)
    model.origin = "somewhere"
    widened = widen(model)
    types = {str(leaf.dtype) for leaf in jax.tree.leaves(get_params(widened))}
    assert widened.origin == "somewhere" and types <= {"float32", "uint8", "bfloat16"}
    assert widened.embedding.weight.get_value().dtype == "float32"
    tokens = np.arange(12, dtype=np.int32)[None]
    np.testing.assert_array_equal(widened(tokens), model(tokens))


def test_slots_that_fit_in_memory(monkeypatch):
    config = ModelConfig(compute_dtype="bfloat16")  # gpt-oss-20b: 3.22 GB for its whole context

    def slots(context, platform="gpu", mesh=None, **stats):
        device = types.SimpleNamespace(memory_stats=lambda: stats, device_kind="A GPU", platform=platform)
        monkeypatch.setattr(jax, "local_devices", lambda: [device])
        return max_slots(16, config, Workload(1, context), mesh)

    in_use = {"bytes_in_use": 14_000_000_000}
    assert slots(131072, bytes_limit=80_000_000_000, **in_use) == 6
    assert slots(131072, bytes_limit=16_000_000_000, **in_use) == 1
    assert slots(8192, bytes_limit=24_000_000_000, **in_use) == 9
    mesh = make_mesh(MeshConfig(tensor=8))
    assert slots(131072, "tpu", mesh, bytes_limit=16_900_000_000, bytes_in_use=2_000_000_000) == 7
    assert slots(131072) == 16  # unknown, as on CPU


@pytest.mark.slow
def test_requests_that_are_cancelled_leak_nothing(model_folder, monkeypatch):
    monkeypatch.setattr("gptoss_jax.checkpoints.load.from_pretrained", _model_with_bytes)
    service = load_service(ServeConfig(str(model_folder), slots=4, prefix_cache_bytes=1 << 20))
    service.state = "ready"
    rng, statuses = random.Random(0), collections.Counter()

    async def ask(client, room):
        body = {
            "prompt": [rng.randrange(256) for _ in range(rng.randrange(1, 60))],
            "max_tokens": rng.randrange(1, 40),
            "stream": rng.random() < 0.5,
            "n": rng.choice((1, 1, 2)),
            "ignore_eos": True,
        }
        async with room:
            try:
                async with asyncio.timeout(rng.choice((None, 0.01, 0.05))):
                    statuses[(await client.post("/v1/completions", json=body)).status_code] += 1
            except TimeoutError:
                statuses["left"] += 1

    async def ask_often(address, count):
        room = asyncio.Semaphore(12)
        async with httpx.AsyncClient(base_url=address, timeout=60) as client:
            await asyncio.gather(*(ask(client, room) for _ in range(count)))

    def resident_bytes():
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    with live_server(service) as address:
        asyncio.run(ask_often(address, 200))  # compiles, and fills the prefix cache
        before = resident_bytes()
        asyncio.run(ask_often(address, 1000))
        wait_until(lambda: service.engine.num_open == service.num_requests == 0)
        assert service.engine.num_running == service.engine.num_waiting == 0
        assert resident_bytes() - before < 50e6
        assert service.engine.engine.has_work is False
    assert set(statuses) == {200, "left"} and min(statuses.values()) > 100


@pytest.mark.slow
def test_the_command(tmp_path):
    from gptoss_jax.checkpoints.export import save_pretrained
    from gptoss_jax.data.tokenizer import make_tokenizer

    save_pretrained(_model_with_bytes(None), tmp_path / "tiny", experts="float32")
    make_tokenizer("bytes").export(tmp_path / "tiny")
    command = [sys.executable, "-m", "gptoss_jax", "serve", str(tmp_path / "tiny"), "--port", "0", "--warmup"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        banner = [server.stdout.readline().split() for _ in range(4)]
        assert banner[0][1:4] == ["tiny", "·", "base"]
        address = banner[1][1]
        assert httpx.get(f"{address}health").status_code == 200
        body = {"prompt": "ab", "max_tokens": 5, "temperature": 0, "ignore_eos": True}
        answers = [httpx.post(f"{address}v1/completions", json=body, timeout=60).json() for _ in range(2)]
        assert answers[0]["choices"] == answers[1]["choices"]
        assert answers[0]["usage"]["completion_tokens"] == 5
        server.send_signal(signal.SIGINT)
        assert server.wait(20) == 0
