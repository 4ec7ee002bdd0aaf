"""The chat page: its file and headers, and the page in a headless Chromium against a scripted engine."""

import json
import random
import re
import time

import pytest
from helpers.browser import CHROMIUM, SECONDS, Browser
from helpers.live_server import live_server
from helpers.scripted_engine import ScriptedEngine, scripted_service, tiny_tokenizer
from starlette.testclient import TestClient

from gptoss_jax.data.harmony import Harmony
from gptoss_jax.server.app import create_app
from gptoss_jax.server.chat_page import content_security_policy
from gptoss_jax.server.lifecycle import LateApp
from gptoss_jax.server.service import Settings

MAX_BYTES = 25_000
TOKENIZER = tiny_tokenizer()
HARMONY = Harmony(TOKENIZER)
ASK = "<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>"
ANSWER = f"<|channel|>analysis<|message|>the quick fox{ASK}{FINAL}hello world<|return|>"
HARMFUL = """<img src=x onerror=window.harmed=1><script>window.harmed=1</script>
[a](javascript:window.harmed=2) [b](data:text/html,x) [c]( javascript:1) [d](/x) [e](https://example.com/a)

```html
</code></pre><iframe srcdoc=x>
```
"""
MARKDOWN = """# Title
A **bold** *word* of `a_b`

- one
  3. two
- three

```python
x < **y**

# z
```
2 * 3 * 4, a_b_c

| a | b |
|---|---|
| 1 | 2 |

---
> said
"""
ANSWERS = {
    "short": f"{FINAL}y<|return|>",
    "harmful": f"{FINAL}{HARMFUL}<|return|>",
    "markdown": f"{FINAL}{MARKDOWN}<|return|>",
    "long": FINAL + " ".join(f"fox {i}" for i in range(1, 400)),
}


def tokens_of(text: str) -> list[int]:
    """Encodes a text, with special tokens for their names."""
    special = TOKENIZER.special_tokens
    pieces = re.split(r"(<\|\w+\|>)", text)
    return [
        token
        for piece in pieces
        for token in ([special[piece]] if piece in special else TOKENIZER.encode(piece))
    ]


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


def test_page_is_there_while_the_model_loads():
    with TestClient(LateApp()) as client:
        assert client.get("/").text.startswith("<!doctype html>")
        assert client.get("/v1/models").status_code == 503


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


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    one = Browser(tmp_path_factory.mktemp("chromium"))
    yield one
    one.close()


@pytest.fixture(scope="module")
def engine():
    """Answers the keys of `ANSWERS`, and anything else with a thought and "hello world"."""

    def script(request):
        question = HARMONY.spelled_text(request.prompt).rsplit("<|message|>", 1)[1].removesuffix(ASK)
        return tokens_of(ANSWERS.get(question, ANSWER))

    return ScriptedEngine(script, step_seconds=0.005, cached_tokens=5)


@pytest.fixture(scope="module")
def service(engine):
    return scripted_service(engine, TOKENIZER)


@pytest.fixture(scope="module")
def address(service):
    with live_server(service) as url:
        yield url


@pytest.fixture
def page(browser, address):
    """The browser with an empty chat."""
    yield from fresh(browser, address)


def fresh(browser, url):
    browser.open(url)
    browser.wait_text("h1", "tiny")
    browser.evaluate("localStorage.clear(), sessionStorage.clear()")
    browser.reload()
    browser.wait_text("h1", "tiny")
    browser.problems.clear()
    yield browser
    assert browser.problems == []


def send(page, text):
    page.focus("#input")
    page.write(text)
    page.press("Enter")


def ask(page, text="fox"):
    """Sends a message and waits for the end of the answer."""
    count = page.evaluate("document.querySelectorAll('article').length")
    send(page, text)
    page.wait_for(f"document.querySelectorAll('article').length == {count + 2}")
    wait_idle(page)


def wait_idle(page):
    page.wait_for("document.querySelector('#send').ariaLabel == 'Send'")


def wait_until(condition):
    until = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def texts(page, selector="#log article"):
    found = f"[...document.querySelectorAll({selector!r})].map(node => node.textContent)"
    return page.evaluate(found)


def prompt_of(request):
    return HARMONY.spelled_text(request.prompt)


def test_answer_is_streamed_with_its_thoughts_folded(page, engine):
    ask(page)
    assert page.text("details > div") == ""
    assert re.fullmatch(r"Thought for \d\.\d s", page.text("summary"))
    assert page.text("article > .md") == "hello world"
    prompt = len(engine.requests[-1].prompt)
    shown = rf"\d+ tokens · [\d.]+ tokens/s · prompt {prompt}, 5 cached · seed \d+"
    assert re.fullmatch(shown, page.text("footer span"))
    page.click("summary")
    page.wait_text("details > div", "the quick fox")
    assert page.text("#status") == "Answer finished"


def test_speed_of_a_few_tokens_is_not_shown(page):
    # They come at once, which says nothing about it.
    ask(page, "short")
    assert re.fullmatch(r"\d tokens · prompt \d+, 5 cached · seed \d+", page.text("footer span"))


def test_long_answer_is_stopped_and_kept(page, engine):
    send(page, "long")
    page.wait_text("article > .md", "fox 3")
    page.press("Escape")
    page.wait_text("footer span", "stopped")
    kept = page.text("article > .md")
    assert kept.startswith("fox 1 fox 2 fox 3") and "fox 300" not in kept
    wait_until(lambda: engine.requests[-1] in engine.cancelled)
    ask(page)
    assert f"<|channel|>final<|message|>{kept.rstrip()}" in prompt_of(engine.requests[-1])


def test_answer_is_regenerated_and_message_edited(page, engine):
    ask(page, "first")
    ask(page, "second")
    count = len(engine.requests)
    page.click("button", "Regenerate")
    wait_until(lambda: len(engine.requests) > count)
    wait_idle(page)
    assert len(texts(page)) == 4
    assert engine.requests[-1].prompt == engine.requests[-2].prompt
    page.evaluate("document.querySelector('.user footer button:last-child').click()")
    page.wait_for("document.activeElement.ariaLabel == 'Edit the message'")
    page.write(" of all")
    page.press("Enter")
    page.wait_for("document.querySelectorAll('article').length == 2")
    wait_idle(page)
    assert texts(page, ".said") == ["first of all"]
    assert "second" not in prompt_of(engine.requests[-1])


def test_conversation_survives_a_reload_until_a_new_chat(page):
    ask(page)
    before = texts(page)
    send(page, "long")
    page.wait_text("article > .md", "fox 3")
    page.reload()
    page.wait_text("h1", "tiny")
    assert texts(page)[:2] == before
    assert "fox 1 fox 2" in page.text("article > .md") and "stopped" in page.text("footer span")
    page.click("#new")
    assert texts(page) == [] and page.text("#empty").startswith("What can I help with?")
    page.reload()
    page.wait_text("h1", "tiny")
    assert texts(page) == []


def test_error_is_shown_and_tried_again(page, service, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(service, "max_context", 10)
        ask(page)
    assert "context length is 10 tokens" in page.text(".error") and "start a new chat" in page.text(".error")
    page.click(".error button", "Try again")
    page.wait_text("article > .md", "hello world")
    assert page.text(".error") == ""
    # The browser reports the failed request itself.
    assert all("status of 400" in problem for problem in page.problems)
    page.problems.clear()


def test_nothing_in_an_answer_becomes_html(page):
    ask(page, "harmful")
    assert page.evaluate("window.harmed") is None
    assert page.evaluate("document.querySelectorAll('#log :is(img, script, iframe)').length") == 0
    links = "[...document.querySelectorAll('#log a')].map(link => [link.href, link.rel, link.textContent])"
    assert page.evaluate(links) == [["https://example.com/a", "noopener noreferrer", "e"]]
    shown = page.text("article > .md")
    assert "<img src=x onerror=window.harmed=1>" in shown and "[a](javascript:window.harmed=2)" in shown


def test_markdown(page):
    ask(page, "markdown")
    html = page.evaluate("[...document.querySelectorAll('article > .md')].at(-1).innerHTML")
    html = re.sub(r' (type|tabindex)="\w+"', "", html).replace("<button>Copy</button>", "")
    assert html == (
        "<h3>Title</h3><p>A <strong>bold</strong> <em>word</em> of <code>a_b</code></p>"
        '<div><ul><li>one<ol start="3"><li>two</li></ol></li><li>three</li></ul></div>'
        '<div class="block"><pre><code>x &lt; **y**\n\n# z</code></pre></div><p>2 * 3 * 4, a_b_c</p>'
        "<table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2</td></tr></table><hr>"
        "<blockquote>said</blockquote>"
    )


def test_no_markdown_breaks_the_page(page):
    rng = random.Random(0)
    pieces = [
        "**",
        "*",
        "_",
        "`",
        "```",
        "~~~",
        "\n",
        "\n\n",
        "  ",
        "- ",
        "1. ",
        "> ",
        "# ",
        "|",
        "|-|\n",
        "---",
    ]
    pieces += ["x", "[a](", ")", "http://x.y", "<b>", "\\", "é🦊", "\x00", "javascript:"]
    stored = [
        {"role": "assistant", "content": "".join(rng.choices(pieces, k=rng.randrange(40))), "reasoning": ""}
        for _ in range(300)
    ]
    stored.append({"role": "assistant", "content": "# " * 30_000 + "- " * 30_000, "reasoning": ""})
    page.evaluate(f"sessionStorage['gptoss.messages'] = {json.dumps(json.dumps(stored))}")
    page.reload()
    page.wait_text("h1", "tiny")
    assert len(texts(page)) == 301
    allowed = (
        "article, footer, span, button, div, details, summary, p, h3, ul, ol, li, blockquote, hr, pre, code"
    )
    allowed += ", strong, em, a, table, tr, th, td"
    assert page.evaluate(f"document.querySelectorAll('#log :not({allowed})').length") == 0


def test_settings_go_into_the_request(page, engine):
    ask(page)
    assert "Reasoning: medium" in prompt_of(engine.requests[-1])  # the server's
    page.evaluate("document.querySelector('#effort').value = 'high'")
    page.click("#set")
    for name, value in {"system": "hello", "temperature": "0.5", "top_p": "0.9", "seed": "7"}.items():
        page.focus(f"#{name}")
        page.write(value)
    page.focus("#max_tokens")
    page.write("9")
    page.click("dialog button", "Done")
    ask(page)
    request = engine.requests[-1]
    settings = request.params
    assert (settings.temperature, settings.top_p, settings.seed, settings.max_new_tokens) == (0.5, 0.9, 7, 9)
    assert "Reasoning: high" in prompt_of(request) and "# Instructions\n\nhello<|end|>" in prompt_of(request)
    assert "seed 7 · cut off" in page.text("footer span")


def test_keyboard_and_theme(page):
    page.evaluate("document.activeElement.blur()")
    page.press("/")
    page.write("one")
    page.press("Enter", shift=True)
    page.write("two")
    assert page.evaluate("document.querySelector('#input').value") == "one\ntwo"
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    page.click("#theme")
    dark = page.evaluate(background)
    assert light != dark
    page.reload()
    assert page.evaluate(background) == dark
    page.click("#theme")
    assert page.evaluate(background) == light


def test_key_is_asked_for_and_kept_in_the_tab(browser):
    settings = Settings(api_key="open sesame")
    engine = ScriptedEngine(tokens_of(ANSWER))
    with live_server(scripted_service(engine, TOKENIZER, settings=settings)) as url:
        browser.open(url)
        browser.wait_for("document.querySelector('dialog').open")
        assert "asks for an API key" in browser.text("#fault")
        assert browser.evaluate("document.activeElement.id") == "key"
        browser.write("open sesame")
        browser.click("dialog button", "Done")
        browser.wait_text("h1", "tiny")
        ask(browser)
        assert browser.text("article > .md") == "hello world"
        assert browser.evaluate("location.href") == url + "/"
        assert "sesame" in browser.evaluate("JSON.stringify(sessionStorage)")
        assert "sesame" not in browser.evaluate("JSON.stringify(localStorage)")
        assert all("status of 401" in problem for problem in browser.problems)


def test_text_of_a_base_model_is_continued(browser):
    engine = ScriptedEngine(tokens_of(" jumps over " * 40), step_seconds=0.005)
    with live_server(scripted_service(engine, TOKENIZER, harmony=None)) as url:
        for page in fresh(browser, url):
            value = "document.querySelector('#input').value"
            page.focus("#input")
            page.write("the fox")
            page.press("Enter", control=True)
            page.wait_for(f"{value}.includes('over')")
            page.press("Escape")
            page.wait_text("#note", "stopped")
            assert page.evaluate(value).startswith("the fox jumps over")
            page.click("#undo")
            assert page.evaluate(value) == "the fox"
            page.click("#send")
            page.wait_text("#note", "cached")
            assert page.evaluate(value).count("jumps over") == 40
            page.reload()
            page.wait_for(f"{value}.length > 400")
