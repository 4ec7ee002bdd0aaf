"""Mutated request bodies: never a fault of the server, and every error names a field."""

import numpy as np
import pytest
from helpers.mutations import mutated
from helpers.scripted_engine import ScriptedEngine, scripted_service, tiny_tokenizer
from starlette.testclient import TestClient

from gptoss_jax.server.app import create_app

TOKENIZER = tiny_tokenizer()
SAMPLING = {
    "model": "tiny", "max_tokens": 9, "n": 2, "stop": ["x"], "seed": 3, "temperature": 0.5, "top_p": 0.9,
    "top_k": 4, "min_p": 0.1, "presence_penalty": 1, "frequency_penalty": -1, "logit_bias": {"5": 1},
    "stop_token_ids": [3], "ignore_eos": False, "cache_salt": "s", "return_token_ids": True, "user": "u",
}  # fmt: skip
SCHEMA = {
    "type": "object",
    "properties": {"a": {"anyOf": [{"type": "integer"}, {"type": "null"}]}, "b": {"$ref": "#/$defs/X"}},
    "required": ["a"],
    "$defs": {"X": {"enum": ["p", 1]}, "Y": {"type": "string", "pattern": "^a+$", "format": "date"}},
}
CALL = {"id": "x", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CHAT = {
    **SAMPLING,
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {"role": "assistant", "reasoning": "r", "content": "c", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "x", "content": "done"},
        {"role": "user", "content": "Go on."},
    ],
    "tools": [
        {
            "type": "function",
            "function": {"name": "f", "description": "d", "strict": True, "parameters": SCHEMA},
        }
    ],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}},
    "reasoning": {"effort": "low", "exclude": False},
    "reasoning_effort": "low",
    "chat_template_kwargs": {"reasoning_effort": "high"},
    "logprobs": True,
    "top_logprobs": 2,
    "parallel_tool_calls": True,
}
COMPLETION = {**SAMPLING, "prompt": ["a fox", [3, 4]], "echo": True, "logprobs": 2}
BODIES = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETION,
    "/tokenize": {"model": "tiny", "prompt": "a fox", "add_special_tokens": False},
    "/detokenize": {"model": "tiny", "tokens": [3, 4]},
}


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("number", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_mutated_bodies_are_answered_or_refused_by_field(path, number):
    rng, statuses = np.random.default_rng(number), []
    sampled = np.random.default_rng(1)  # on the engine's thread
    engine = ScriptedEngine(lambda request: sampled.integers(0, 512, sampled.integers(20)).tolist(), chunk=3)
    with TestClient(create_app(scripted_service(engine, TOKENIZER)), base_url="http://localhost") as http:
        assert http.post(path, json=BODIES[path]).status_code == 200
        for _ in range(number):
            body = BODIES[path] | ({"stream": True} if rng.random() < 0.3 and "n" in BODIES[path] else {})
            for _ in range(rng.integers(1, 3)):
                body = mutated(body, rng)
            answer = http.post(path, json=body)
            statuses.append(answer.status_code)
            assert answer.status_code in (200, 400, 404), (body, answer.text)
            if answer.status_code == 200:
                assert "server_error" not in answer.text, body
                continue
            error = answer.json()["error"]
            assert set(error) == {"message", "type", "param", "code"} and len(error["message"]) < 1000
            assert error["param"] or not isinstance(body, dict), (body, error)
        assert not engine.has_work
    assert 0.03 * number < statuses.count(200) < number
