"""The web application: routes, access, errors in OpenAI's shape, request ids, metrics, tokenization."""

import json
import logging

import openai
import pytest
from helpers.scripted_engine import ScriptedEngine, scripted_service, tiny_tokenizer
from starlette.testclient import TestClient

from gptoss_jax.server.app import create_app
from gptoss_jax.server.engine_thread import MAX_FAULTS
from gptoss_jax.server.service import Service, Settings

TOKENIZER = tiny_tokenizer()
BODY = {"model": "tiny", "prompt": "a", "max_tokens": 3}


@pytest.fixture
def client():
    """(settings, engine, fields of the service) -> a client of an application over a scripted engine."""
    clients = []

    def make(settings=Settings(), engine=None, **fields):  # noqa: B008
        engine = engine or ScriptedEngine([70] * 9)
        app = create_app(scripted_service(engine, TOKENIZER, settings=settings, **fields))
        clients.append(TestClient(app, base_url="http://localhost:8000"))
        return clients[-1].__enter__()

    yield make
    for one in clients:
        one.__exit__(None, None, None)


def service_of(client) -> Service:
    return client.app.state.service


def error_of(answer):
    """The error of a response, whose shape is checked."""
    body = answer.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


def test_health(client):
    one = client()
    assert one.get("/health").json() == {"status": "ok"}
    for state in ("loading", "draining"):
        service_of(one).state = state
        answer = one.get("/health")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        assert error_of(answer)["message"] == f"The server is {state}."
        assert one.post("/v1/completions", json=BODY).status_code == 503
        assert one.get("/v1/models").status_code == 200


def test_models(client):
    one = client()
    (card,) = one.get("/v1/models").json()["data"]
    assert card["id"] == "tiny" and card["max_model_len"] == 4096
    assert one.get("/v1/models/tiny").json() == card
    missing = one.get("/v1/models/other")
    assert (missing.status_code, error_of(missing)["code"]) == (404, "model_not_found")


def test_models_with_the_openai_client(client):
    api = openai.OpenAI(base_url="http://localhost:8000/v1", api_key="x", http_client=client(), max_retries=0)
    assert [model.id for model in api.models.list()] == ["tiny"]
    assert api.models.retrieve("tiny").owned_by == "gptoss-jax"
    with pytest.raises(openai.NotFoundError):
        api.models.retrieve("hf/other")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("GET", "/v1/models/", 404),
        ("POST", "/v1/models", 405),
        ("GET", "/v1/completions", 405),
        ("PUT", "/v1/completions", 405),
        ("OPTIONS", "/v1/completions", 405),
    ],
)
def test_routes_that_do_not_exist(client, method, path, status):
    answer = client().request(method, path)
    assert answer.status_code == status
    error_of(answer)


KEY = Settings(api_key="s3cret")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"Authorization": "Bearer s3cret"}, 200),
        ({"Authorization": "bearer  s3cret "}, 200),
        ({"X-Api-Key": "s3cret"}, 200),
        ({"Authorization": "Bearer s3cre"}, 401),
        ({"Authorization": "s3cret"}, 401),
        ({"Authorization": "Basic s3cret"}, 401),
        ({"X-Api-Key": "\u00e9"}, 401),
        ({"Authorization": "Bearer "}, 401),
    ],
)
def test_keys(client, headers, status):
    headers = {name: value.encode("latin-1") for name, value in headers.items()}
    for method, path in (("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/tokenizer_info")):
        assert client(KEY).request(method, path, headers=headers).status_code == status
    answer = client(KEY).post("/v1/completions", json=BODY, headers=headers)
    assert answer.status_code == status
    if status == 401:
        assert error_of(answer)["code"] == "invalid_api_key"
        assert "s3cret" not in answer.text


def test_everything_but_health_and_the_page_needs_the_key(client):
    one = client(KEY)
    paths = {route.path for route in one.app.routes}
    open_paths = {path for path in paths if one.get(path).status_code != 401}
    assert open_paths == {"/health", "/"}
    assert one.get("/nowhere").status_code == 401


def test_errors_as_exceptions_of_the_openai_client(client):
    api = openai.OpenAI(
        base_url="http://localhost:8000/v1", api_key="x", http_client=client(KEY), max_retries=0
    )
    with pytest.raises(openai.AuthenticationError):
        api.models.list()
    api = openai.OpenAI(base_url="http://localhost:8000/v1", api_key="x", http_client=client(), max_retries=0)
    service_of(api._client).state = "draining"
    with pytest.raises(openai.InternalServerError) as caught:
        api.completions.create(**BODY)
    assert caught.value.status_code == 503


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost:8000", 200), ("LOCALHOST", 200), ("[::1]:80", 200), ("evil.com:8000", 403)],
)
def test_names_of_other_hosts_are_refused(client, host, status):
    one = client(Settings(allowed_hosts=("localhost", "[::1]")))
    answer = one.get("/v1/models", headers={"Host": host})
    assert answer.status_code == status


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_pages_of_other_origins(client, site):
    headers = {"Origin": "https://page.example", "Sec-Fetch-Site": site}
    plain, allowing = client(), client(Settings(cors_origins=("https://page.example",)))
    refused = plain.post("/v1/completions", json=BODY, headers=headers)
    assert refused.status_code == 403 and "access-control-allow-origin" not in refused.headers
    assert plain.get("/", headers=headers).status_code == 200
    answer = allowing.post("/v1/completions", json=BODY, headers=headers)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://page.example"
    asked = {
        **headers,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    assert allowing.options("/v1/completions", headers=asked).status_code == 200
    assert plain.options("/v1/completions", headers=asked).status_code == 403
    other = {**headers, "Origin": "https://other.example"}
    assert allowing.post("/v1/completions", json=BODY, headers=other).status_code == 403


@pytest.mark.parametrize(
    ("given", "is_kept"),
    [("abc-1:2", True), ("a" * 128, True), ("a" * 129, False), ("a b", False), ("\x1b", False)],
)
def test_request_ids(client, given, is_kept):
    answer = client().get("/health", headers={"x-request-id": given})
    found = answer.headers["x-request-id"]
    assert found == given if is_kept else found.startswith("req-")


def test_bodies_that_are_too_long(client):
    one = client(Settings(max_body=100))
    answer = one.post("/v1/completions", json=BODY | {"prompt": "a" * 200})
    assert (answer.status_code, error_of(answer)["code"]) == (413, "request_too_large")
    assert one.post("/v1/completions", json=BODY).status_code == 200


def test_long_bodies_are_parsed(client):
    answer = client().post("/v1/completions", json=BODY | {"user": "a" * 100_000})
    assert answer.status_code == 200


@pytest.fixture
def log(caplog, monkeypatch):
    """The server's log, even if another test of this process has run `gptoss serve`, which redirects it."""
    logger = logging.getLogger("gptoss_jax.server")
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(logger, "handlers", [])
    caplog.set_level(logging.INFO, logger.name)
    return caplog


def test_the_log_is_safe_to_print(client, log):
    one = client()
    one.post("/v1/%1B[2Jcompletions%0Aforged", json=BODY, headers={"x-request-id": "x\x1b[2J"})
    one.post("/v1/completions", json=BODY | {"\x1b]0;title\x07\n": 1})
    one.post("/v1/completions", json=BODY | {"\x1b]0;title\x07\n": 1})
    messages = [record.getMessage() for record in log.records]
    assert len(messages) == 4  # the unknown field is named once
    assert all(message.isprintable() for message in messages)


def test_metrics(client):
    one = client(engine=ScriptedEngine([70] * 9, cached_tokens=1))
    one.post("/v1/completions", json=BODY)
    one.post("/v1/completions", json=BODY | {"n": 0})
    text = one.get("/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    labels = '{engine="0",model_name="tiny"}'
    for name, value in {
        "vllm:prompt_tokens_total": 2,
        "vllm:generation_tokens_total": 3,
        "vllm:prefix_cache_queries_total": 2,
        "vllm:prefix_cache_hits_total": 1,
        "vllm:time_to_first_token_seconds_count": 1,
        "vllm:e2e_request_latency_seconds_count": 1,
        "vllm:num_requests_running": 0,
        "vllm:num_requests_waiting": 0,
    }.items():
        assert float(values[name + labels]) == value, name
    success = 'vllm:request_success_total{engine="0",finished_reason="length",model_name="tiny"}'
    assert float(values[success]) == 1
    assert float(values['http_requests_total{handler="/v1/completions",method="POST",status="4xx"}']) == 1


def test_unknown_methods_are_one_time_series(client):
    one = client()
    for i in range(5):
        one.request(f"METHOD{i}", "/health")
    lines = one.get("/metrics").text.splitlines()
    (counted,) = (line for line in lines if line.startswith("http_requests_total"))
    assert counted.endswith(" 5.0") and 'method="other"' in counted


def test_a_fault_of_the_engine(client, log):
    class Broken(ScriptedEngine):
        def step(self):
            raise RuntimeError("secret details")

    one = client(engine=Broken())
    for _ in range(MAX_FAULTS):
        assert one.get("/health").status_code == 200
        answer = one.post("/v1/completions", json=BODY)
        assert answer.status_code == 500 and "secret" not in answer.text
        error_of(answer)
        assert "secret details" in log.text
    assert one.get("/health").status_code == 503
    assert one.post("/v1/completions", json=BODY).status_code == 503


def test_a_fault_of_an_endpoint(client, monkeypatch, log):
    one = client()
    monkeypatch.setattr(service_of(one), "check_model", lambda fields: 1 / 0)
    answer = one.post("/v1/completions", json=BODY)
    assert answer.status_code == 500
    assert error_of(answer)["type"] == "server_error"
    assert "ZeroDivisionError" in log.text


def test_tokenize(client):
    one = client()
    answer = one.post("/tokenize", json={"prompt": "<|start|>the fox", "return_token_strs": True}).json()
    tokens = [TOKENIZER.bos_id, TOKENIZER.special_tokens["<|start|>"], *TOKENIZER.encode("the fox")]
    assert answer["tokens"] == tokens
    assert (answer["count"], answer["max_model_len"]) == (len(tokens), 4096)
    assert "".join(answer["token_strs"]) == "<|endoftext|><|start|>the fox"
    plain = {"prompt": "<|start|>", "add_special_tokens": False, "parse_special": False}
    assert one.post("/tokenize", json=plain).json()["tokens"] == TOKENIZER.encode("<|start|>")
    assert error_of(one.post("/tokenize", json={}))["param"] == "prompt"


def test_tokenize_a_chat(client):
    one = client(date="2026-01-02")
    messages = [{"role": "user", "content": "the fox"}]
    tokens = one.post("/tokenize", json={"messages": messages}).json()["tokens"]
    text = one.post("/detokenize", json={"tokens": tokens}).json()["prompt"]
    assert text.startswith("<|start|>system<|message|>")
    assert text.endswith("<|start|>user<|message|>the fox<|end|><|start|>assistant")
    bad = one.post("/tokenize", json={"messages": [{"role": "user"}]})
    assert error_of(bad)["param"] == "messages[0].content"


def test_detokenize(client):
    one = client()
    tokens = [TOKENIZER.special_tokens["<|start|>"], *TOKENIZER.encode("the fox"), 500]
    answer = one.post("/detokenize", json={"tokens": tokens}).json()
    assert answer == {"prompt": "<|start|>the fox<|reserved_500|>"}
    assert error_of(one.post("/detokenize", json={"tokens": [1, -1]}))["param"] == "tokens[1]"


def test_tokenizer_info(client):
    info = client().get("/tokenizer_info").json()
    assert info["bos_token"] == "<|endoftext|>" and info["eos_token"] == "<|return|>"
    assert info["special_tokens"] == TOKENIZER.special_tokens
    assert json.dumps(info)
