"""The web application: routes, access, errors in OpenAI's shape, request ids."""

import pytest
from helpers.scripted_engine import ScriptedEngine, scripted_service
from starlette.testclient import TestClient

from gptoss_jax.server.app import create_app
from gptoss_jax.server.service import Settings


@pytest.fixture
def client():
    """(settings, engine) -> a client of an application over a scripted engine."""
    clients = []

    def make(settings=Settings(), engine=None, **fields):  # noqa: B008
        app = create_app(scripted_service(engine or ScriptedEngine(), settings=settings, **fields))
        clients.append(TestClient(app, base_url="http://localhost"))
        return clients[-1].__enter__()

    yield make
    for one in clients:
        one.__exit__(None, None, None)


def test_health(client):
    assert client().get("/health").json() == {"status": "ok"}


def test_models(client):
    one = client()
    (card,) = one.get("/v1/models").json()["data"]
    assert card["id"] == "tiny" and card["max_model_len"] == 4096
    assert one.get("/v1/models/tiny").json() == card
    missing = one.get("/v1/models/other")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/nowhere", 404), ("POST", "/v1/models", 405)]
)
def test_routes_that_do_not_exist(client, method, path, status):
    answer = client().request(method, path)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
