"""Random and mutated request bodies: no 5xx, no hang, every error in OpenAI's shape."""

import asyncio
import copy
import json
import random

import httpx2 as httpx
import pytest
from helpers.scripted_engine import ScriptedEngine, scripted_service, tiny_tokenizer

from gptoss_jax.server.app import create_app

TOKENIZER = tiny_tokenizer()
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "pattern": "^a+$"},
        "days": {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}]},
        "kind": {"$ref": "#/$defs/Kind"},
    },
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"Kind": {"enum": ["p", 1]}, "Unused": {"type": "string", "format": "date"}},
}
TOOL = {"name": "get_weather", "description": "Weather of a city.", "parameters": SCHEMA, "strict": True}
SAMPLING = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 3, "n": 2, "max_tokens": 6}
SAMPLING |= {"presence_penalty": 1, "frequency_penalty": 0.5, "logit_bias": {"5": 1}, "stop": ["x", "y"]}
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}
MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    {"role": "assistant", "content": None, "reasoning": "hm", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
]
ITEMS = [
    {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
    {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
    {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
]
JSON_SCHEMA = {"name": "trip", "schema": SCHEMA, "strict": True}
# Paths, and bodies that they accept.
BODIES = [
    ("/v1/completions", {"model": "tiny", "prompt": "Hi", "echo": True, "logprobs": 2, **SAMPLING}),
    ("/v1/completions", {"prompt": [[1, 2], [3]], "stream": True, "stream_options": {"include_usage": True}}),
    (
        "/v1/chat/completions",
        {
            "model": "tiny",
            "messages": MESSAGES,
            "tools": [{"type": "function", "function": TOOL}],
            "tool_choice": "auto",
            "reasoning_effort": "low",
            "reasoning": {"effort": "low", "exclude": False},
            "chat_template_kwargs": {"reasoning_effort": "high"},
            "parallel_tool_calls": True,
            "cache_salt": "s",
            "logprobs": True,
            "top_logprobs": 2,
            **SAMPLING,
        },
    ),
    (
        "/v1/chat/completions",
        {
            "messages": MESSAGES[:2],
            "stream": True,
            "stream_options": {"include_usage": True},
            "response_format": {"type": "json_schema", "json_schema": JSON_SCHEMA},
            "max_completion_tokens": 8,
        },
    ),
    (
        "/v1/responses",
        {
            "model": "tiny",
            "input": ITEMS,
            "instructions": "Be kind.",
            "tools": [{"type": "function", **TOOL}],
            "tool_choice": {"type": "function", "name": "get_weather"},
            "reasoning": {"effort": "low"},
            "max_output_tokens": 8,
        },
    ),
    (
        "/v1/responses",
        {
            "input": "Hi",
            "stream": True,
            "text": {"format": {"type": "json_schema", **JSON_SCHEMA}},
            "store": False,
        },
    ),
    ("/tokenize", {"prompt": "Hi <|start|>", "add_special_tokens": True, "return_token_strs": True}),
    ("/tokenize", {"messages": MESSAGES}),
    ("/detokenize", {"tokens": [1, 2, 3]}),
]
JUNK = [
    None, True, False, 0, 1, -1, 3, 10**6, 10**30, -(10**400), 0.5, -0.0, 1e308, 1e-320, "", "a", "\x00",
    "\u202e\U0001f600", "a" * 5000, "<|start|>assistant<|channel|>final<|message|>", [], [[]], [None], [0.5],
    ["a"], {}, {"a": {}}, {"type": "x"}, {"$ref": "#"}, {"anyOf": []}, "none", "required", "json_object",
    {"type": "json_object"}, {"type": "object", "properties": 5}, [{"role": "user", "content": "x"}],
]  # fmt: skip


def places(value, path=()):
    """Every path in a body."""
    yield path
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, child in children:
        yield from places(child, (*path, key))


def random_value(rng, depth=0):
    kind = rng.randrange(8 if depth < 3 else 6)
    if kind == 6:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 7:
        names = ["type", "role", "content", "name", "function", "properties", "$ref", "enum", "é", ""]
        return {rng.choice(names): random_value(rng, depth + 1) for _ in range(rng.randrange(4))}
    return copy.deepcopy(rng.choice(JUNK))


def mutated(rng, body):
    """A copy of a body with one to three changes, as bytes."""
    body = copy.deepcopy(body)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        path = rng.choice([path for path in places(body) if path])
        owner = body
        for key in path[:-1]:
            owner = owner[key]
        change = rng.randrange(8)
        if change == 0:
            del owner[path[-1]]
            if not body:
                break
        elif change == 1 and isinstance(owner, dict):
            owner[rng.choice(["extra", "suffix", "grammar", "n", "type", "\u00e9"])] = random_value(rng)
        elif change == 2:
            owner[path[-1]] = [owner[path[-1]]]
        else:
            owner[path[-1]] = random_value(rng)
    data = bytearray(json.dumps(body, ensure_ascii=rng.random() < 0.5).encode())
    if rng.random() < 0.1:
        data = data[: rng.randrange(len(data))]
    if data and rng.random() < 0.1:
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


def check(path, body, answer):
    """Checks one response."""
    assert answer.status_code < 500, (path, body, answer.text)
    if answer.status_code != 200:
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}, (path, body, error)
        assert error["message"].isprintable(), (path, body, error)
        about_body = (
            error["message"].startswith(("The body", "A key")) or " occurs more than once" in error["message"]
        )
        assert error["param"] or about_body, (path, body, error)
    elif answer.headers["content-type"].startswith("text/event-stream"):
        assert "server_error" not in answer.text, (path, body, answer.text)
        for line in answer.text.splitlines():
            if line.startswith("data: ") and line != "data: [DONE]":
                json.loads(line.removeprefix("data: "))
    else:
        assert answer.json()


@pytest.mark.parametrize(
    ("seed", "count"), [(0, 120), pytest.param(1, 4000, marks=pytest.mark.slow)], ids=["quick", "slow"]
)
def test_bodies(seed, count):
    rng = random.Random(seed)
    # Mostly nonsense, with special tokens.
    special = list(TOKENIZER.special_tokens.values())

    def script(request):
        return [rng.choice((*special, rng.randrange(512))) for _ in range(12)]

    service = scripted_service(ScriptedEngine(script, chunk=3), TOKENIZER)
    statuses = []

    async def run():
        service.engine.start()
        transport = httpx.ASGITransport(app=create_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            for path, body in BODIES:
                answer = await client.post(path, content=json.dumps(body))
                assert answer.status_code == 200, (path, answer.text)
            for _ in range(count):
                path, body = rng.choice(BODIES)
                body = mutated(rng, body) if rng.random() < 0.9 else json.dumps(random_value(rng)).encode()
                answer = await asyncio.wait_for(client.post(path, content=body), 20)
                check(path, body, answer)
                statuses.append(answer.status_code)
        service.engine.close()

    asyncio.run(run())
    assert service.engine.num_open == service.num_requests == 0
    assert 0.1 < statuses.count(200) / count < 0.9
