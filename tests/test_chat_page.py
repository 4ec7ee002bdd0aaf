"""The chat page: its file and headers, and the page in a headless Chromium against a scripted engine."""

import re

from helpers.scripted_engine import ScriptedEngine, scripted_service
from starlette.testclient import TestClient

from gptoss_jax.server.app import create_app
from gptoss_jax.server.chat_page import content_security_policy
from gptoss_jax.server.service import Settings

MAX_BYTES = 25_000


def get_page(**headers):
    service = scripted_service(ScriptedEngine(), settings=Settings(api_key="secret"))
    with TestClient(create_app(service)) as client:
        return client.get("/", headers=headers)


def test_page_is_one_small_file_without_a_key():
    response = get_page()
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert len(response.content) <= MAX_BYTES
    # Nothing is loaded from elsewhere, and nothing becomes HTML.
    assert re.findall(r"(?:src|href)=\"(?!data:)[^\"]*|https?://[\w.]+|@import|url\(", response.text) == []
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", response.text)


def test_page_may_be_opened_by_a_link_of_another_site():
    assert get_page(**{"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}).status_code == 200


def test_policy_allows_only_the_script_and_style_of_the_page():
    policy = dict(rule.split(" ", 1) for rule in get_page().headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["form-action"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert re.fullmatch(r"'sha256-[\w+/]{43}='", policy["script-src"])
    html = "<style>a{}</style><script type=module>alert(1)</script>"
    # printf 'alert(1)' | openssl dgst -sha256 -binary | base64
    assert "script-src 'sha256-bhHHL3z2vDgxUt0W3dWQOrprscmda2Y5pLsLg4GF+pI='" in content_security_policy(html)
