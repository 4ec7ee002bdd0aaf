"""`/v1/chat/completions` over a scripted engine, through the openai client and its pydantic models."""

import re

import openai
import pytest
from helpers.scripted_engine import ScriptedEngine, scripted_service, tiny_tokenizer
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from starlette.testclient import TestClient

from gptoss_jax.data import harmony
from gptoss_jax.data.harmony import Harmony
from gptoss_jax.server.app import create_app
from gptoss_jax.server.service import Settings

TOKENIZER = tiny_tokenizer()
HARMONY = Harmony(TOKENIZER)
ANALYSIS, FINAL = "<|channel|>analysis<|message|>", "<|channel|>final<|message|>"
NEXT = "<|end|><|start|>assistant"
CALL = "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"
ANSWER = f"{ANALYSIS}Hm, hi.{NEXT}{FINAL}Hello world<|return|>"
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Gets the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
HI = [{"role": "user", "content": "Hi"}]


def tokens_of(text):
    """Tokens of a text, with special tokens for their names."""
    found = []
    for piece in re.split(r"(<\|\w+\|>)", text):
        special = TOKENIZER.special_tokens.get(piece)
        found += TOKENIZER.encode(piece) if special is None else [special]
    return found


@pytest.fixture
def start():
    """(answer, settings, engine's arguments) -> an openai client, the engine, and an HTTP client."""
    clients = []

    def make(answer=ANSWER, settings=Settings(), **engine):  # noqa: B008
        scripted = ScriptedEngine(tokens_of(answer) if isinstance(answer, str) else answer, **engine)
        http = TestClient(create_app(scripted_service(scripted, TOKENIZER, settings=settings)))
        clients.append(http)
        http.__enter__()
        client = openai.OpenAI(
            base_url="http://testserver/v1", api_key="none", http_client=http, max_retries=0
        )
        return client, scripted, http

    yield make
    for one in clients:
        one.__exit__(None, None, None)


def complete(client, messages=HI, **fields):
    """A response that has been validated."""
    answer = client.chat.completions.create(model="tiny", messages=messages, **fields)
    ChatCompletion.model_validate(answer.model_dump(), strict=True)
    return answer


def stream(client, messages=HI, **fields):
    """The validated chunks of a stream."""
    chunks = list(client.chat.completions.create(model="tiny", messages=messages, stream=True, **fields))
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk.model_dump(), strict=True)
    return chunks


def joined(chunks, name, index=0):
    """The text of a field of the deltas of a choice."""
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices if choice.index == index]
    return "".join(getattr(delta, name, None) or "" for delta in deltas)


def test_an_answer_has_reasoning_content_and_usage(start):
    client, engine, _ = start(cached_tokens=2)
    answer = complete(client)
    message = answer.choices[0].message
    assert (message.role, message.reasoning, message.content) == ("assistant", "Hm, hi.", "Hello world")
    assert message.tool_calls is None and answer.choices[0].finish_reason == "stop"
    prompt = HARMONY.render([harmony.system("medium", "2026-01-02"), harmony.user("Hi")])
    assert engine.requests[0].prompt == prompt
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), len(tokens_of(ANSWER)))
    assert usage.total_tokens == len(prompt) + len(tokens_of(ANSWER))
    assert usage.completion_tokens_details.reasoning_tokens == len(tokens_of("Hm, hi."))
    assert usage.prompt_tokens_details.cached_tokens == 2
    assert answer.id.startswith("chatcmpl-") and answer.system_fingerprint == "fp_test"


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_a_stream_has_the_same_answer(start, chunk):
    client, engine, _ = start(chunk=chunk)
    chunks = stream(client, stream_options={"include_usage": True})
    assert (joined(chunks, "reasoning"), joined(chunks, "content")) == ("Hm, hi.", "Hello world")
    assert len({one.id for one in chunks}) == len({one.created for one in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [choice.finish_reason for one in chunks for choice in one.choices][-1] == "stop"
    assert [one.usage for one in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == [] and chunks[-1].usage == complete(client).usage
