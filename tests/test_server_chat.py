"""`/v1/chat/completions` over a scripted engine, through the openai client and its pydantic models."""

import json
import time

import numpy as np
import openai
import pydantic
import pytest
from helpers.grammars import sample
from helpers.scripted_engine import ScriptedEngine, encode_special, logprob, scripted_service, tiny_tokenizer
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from starlette.testclient import TestClient

from gptoss_jax.data import harmony
from gptoss_jax.data.harmony import Harmony
from gptoss_jax.data.tokenizer import make_tokenizer
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
    return encode_special(TOKENIZER, text)


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


def test_a_message_without_reasoning_has_null(start):
    client, _, _ = start("<|channel|>final<|message|>Hello<|return|>")
    assert complete(client).choices[0].message.reasoning is None
    message = complete(client, extra_body={"include_reasoning": False}).choices[0].message
    assert not hasattr(message, "reasoning")


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


@pytest.mark.parametrize(
    ("answer", "content"),
    [
        ("Hello world", "Hello world"),
        ("<|message|>Hello", "Hello"),
        ("<|channel|>final", "<|channel|>final"),
        (f"{CALL.replace(' <|constrain|>', ' to=functions.other <|constrain|>')}{{}}", None),
        (f"{FINAL}one<|end|>two<|start|>user<|message|>three", "one\n\ntwo\n\n<|start|>user<|message|>three"),
        ("<|start|>assistant<|start|>", "<|start|>assistant\n\n<|start|>"),
    ],
)
def test_text_outside_of_the_format_is_content(start, answer, content):
    client, _, _ = start(answer)
    content = content or answer
    assert complete(client, tools=[WEATHER]).choices[0].message.content == content
    chunks = stream(client, tools=[WEATHER])
    assert joined(chunks, "content") == content


def test_random_tokens_are_never_an_error_and_text_shows_up(start):
    rng = np.random.default_rng(3)
    special = list(TOKENIZER.special_tokens.values())

    def script(request):
        some = rng.integers(0, 512, 20).tolist()
        some = [special[token % len(special)] if token % 3 == 0 else token for token in some]
        return tokens_of(f"{FINAL}a") + some if len(engine.requests) % 2 else some

    client, engine, _ = start(script)
    for i in range(60):
        answer = complete(client, tools=[WEATHER], max_tokens=20)
        assert i % 2 == 0 or answer.choices[0].message.content.startswith("a")
    for _ in range(60):
        stream(client, tools=[WEATHER], max_tokens=20)


def test_an_answer_that_is_cut_off_while_it_reasons_has_reasoning_only(start):
    client, _, _ = start(f"{ANALYSIS}one two three four five")
    answer = complete(client, max_completion_tokens=9)
    message = answer.choices[0].message
    assert "one two three four five".startswith(message.reasoning) and message.content == ""
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 9
    assert 0 < answer.usage.completion_tokens_details.reasoning_tokens < 9
    chunks = stream(client, max_completion_tokens=9)
    assert (joined(chunks, "reasoning"), joined(chunks, "content")) == (message.reasoning, "")


@pytest.mark.parametrize(
    "header",
    [
        CALL,
        CALL.replace("commentary", "analysis"),
        CALL.replace("commentary", "final"),
        CALL.replace("functions.", ""),
        " to=functions.weather<|channel|>commentary <|constrain|>json<|message|>",
        f"<|channel|>commentary<|message|>{NEXT}{CALL}",
    ],
)
def test_a_recipient_makes_a_call_on_any_channel(start, header):
    client, _, _ = start(f'{ANALYSIS}Hm.{NEXT}{header}{{"city": "Rome"}}<|call|>{FINAL}')
    choice = complete(client, tools=[WEATHER]).choices[0]
    (call,) = choice.message.tool_calls
    assert (call.function.name, call.function.arguments) == ("weather", '{"city": "Rome"}')
    assert (choice.message.reasoning, choice.message.content) == ("Hm.", None)
    assert choice.finish_reason == "tool_calls"


@pytest.mark.parametrize("chunk", [1, 5])
def test_a_call_in_a_stream_has_its_id_and_name_once(start, chunk):
    client, _, _ = start(f'{CALL}{{"city": "Rome"}}<|call|>', chunk=chunk)
    chunks = stream(client, tools=[WEATHER])
    calls = [call for one in chunks for call in one.choices[0].delta.tool_calls or ()]
    assert [(call.index, call.function.name, call.type) for call in calls if call.id] == [
        (0, "weather", "function")
    ]
    assert all(call.index == 0 for call in calls)
    assert [call.function.name for call in calls[1:]] == [None] * (len(calls) - 1)
    assert "".join(call.function.arguments for call in calls) == '{"city": "Rome"}'
    assert chunks[-1].choices[0].finish_reason == "tool_calls" and joined(chunks, "content") == ""


def test_an_unfinished_call_is_sent_and_ends_by_length(start):
    client, _, _ = start(f'{CALL}{{"city": "Rome"}}<|call|>')
    limit = len(tokens_of(f'{CALL}{{"ci'))
    choice = complete(client, tools=[WEATHER], max_tokens=limit).choices[0]
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls[0].function.arguments == '{"ci'
    chunks = stream(client, tools=[WEATHER], max_tokens=limit)
    calls = [call for one in chunks for call in one.choices[0].delta.tool_calls or ()]
    assert "".join(call.function.arguments for call in calls) == '{"ci'


def test_content_streams_when_tools_are_not_used(start):
    # A pause between tokens: those that arrive while the server is busy come in one piece.
    answer = f"<|channel|>commentary<|message|>First.{NEXT}{FINAL}Hello<|return|>"
    client, _, _ = start(answer, chunk=1, step_seconds=0.02)
    chunks = stream(client, tools=[WEATHER])
    assert joined(chunks, "content") == "First.\n\nHello"
    assert sum(bool(one.choices[0].delta.content) for one in chunks) > 1


def test_arguments_are_passed_on_as_they_were_sampled(start):
    client, _, _ = start(f"{CALL}not {{ JSON<|call|>")
    call = complete(client, tools=[WEATHER]).choices[0].message.tool_calls[0]
    assert call.function.arguments == "not { JSON"
    (sent,) = complete(client, [*HI, {"role": "assistant", "tool_calls": [call.model_dump()]}]).choices
    assert sent.finish_reason


def masked(request):
    """Some reasoning, then random tokens that the request's grammar allows."""
    rng, thought = np.random.default_rng(request.params.seed), tokens_of(f"{ANALYSIS}Hm.{NEXT}")
    return sample(TOKENIZER, request.params.grammar, rng, 3000, thought)[0]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_required_call_is_always_made_and_reasoning_stays(start, choice):
    client, _, _ = start(masked, vocab_size=TOKENIZER.vocab_size)
    other = {"type": "function", "function": {"name": "other"}}
    answers = [complete(client, tools=[other, WEATHER], tool_choice=choice, seed=i) for i in range(8)]
    for answer in answers:
        (call,) = answer.choices[0].message.tool_calls
        assert choice == "required" or call.function.name == "weather"
        json.loads(call.function.arguments)
        assert answer.choices[0].finish_reason == "tool_calls"
        assert answer.choices[0].message.reasoning.startswith("Hm.")


def test_no_tool_is_declared_or_called_if_none_may_be(start):
    client, engine, _ = start(f"{CALL}{{}}<|call|>")
    choice = complete(client, tools=[WEATHER], tool_choice="none").choices[0]
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == ("{}", None, "stop")
    assert "weather" not in HARMONY.spelled_text(engine.requests[0].prompt)


class City(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=9)
    people: int | None
    twin: "City | None"


def test_a_format_is_followed_and_reasoning_stays(start):
    client, engine, _ = start(masked, vocab_size=TOKENIZER.vocab_size)
    for seed in range(6):
        answer = client.chat.completions.parse(
            model="tiny", messages=HI, response_format=City, seed=seed, max_tokens=3000
        )
        assert isinstance(answer.choices[0].message.parsed, City)
        assert answer.choices[0].message.reasoning.startswith("Hm.")
    prompt = HARMONY.spelled_text(engine.requests[0].prompt)
    assert "# Response Formats\n\n## City\n\n{" in prompt
    found = complete(client, response_format={"type": "json_object"}, seed=1, max_tokens=3000).choices[0]
    assert isinstance(json.loads(found.message.content), dict)


def test_the_grammar_does_not_depend_on_earlier_turns(start):
    client, engine, _ = start()
    earlier = [*HI, {"role": "assistant", "reasoning": "Hm.", "content": '{"a": 1}'}, *HI]
    for messages in (HI, earlier):
        complete(client, messages, response_format={"type": "json_object"})
    assert engine.requests[0].params.grammar == engine.requests[1].params.grammar is not None


@pytest.mark.parametrize("chunk", [1, 1000])
def test_stop_strings_cut_content_and_nothing_else(start, chunk):
    client, engine, _ = start(f"{ANALYSIS}a world b{NEXT}{FINAL}Hello world<|return|>", chunk=chunk)
    answer = complete(client, stop=["world"])
    message, reason = answer.choices[0].message, answer.choices[0].finish_reason
    assert (message.reasoning, message.content, reason) == ("a world b", "Hello ", "stop")
    chunks = stream(client, stop="wor")
    assert (joined(chunks, "reasoning"), joined(chunks, "content")) == ("a world b", "Hello ")
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert engine.requests[0].params.stop_strings == ()


def test_a_stop_string_frees_the_slot(start):
    client, engine, _ = start(f"{FINAL}Hello world" + "a" * 2000, chunk=4, step_seconds=0.002)
    assert complete(client, stop=["world"]).choices[0].message.content == "Hello "
    while engine.has_work:
        time.sleep(0.001)
    assert len(engine.cancelled) == 1 and engine.num_steps < 400


def test_logprobs_are_those_of_content(start):
    client, _, _ = start(chunk=2)
    fields = {"logprobs": True, "top_logprobs": 2}
    logprobs = complete(client, **fields).choices[0].logprobs.content
    tokens = tokens_of("Hello world")
    assert [bytes(one.bytes) for one in logprobs] == [TOKENIZER.decode_bytes([token]) for token in tokens]
    assert [one.logprob for one in logprobs] == [logprob(token) for token in tokens]
    assert [len(one.top_logprobs) for one in logprobs] == [2] * len(tokens)
    chunks = stream(client, **fields)
    streamed = [one.choices[0].logprobs.content for one in chunks if one.choices[0].logprobs]
    assert [one for some in streamed for one in some] == logprobs
    assert complete(client).choices[0].logprobs is None


def test_every_system_message_is_in_the_prompt(start):
    client, engine, _ = start()
    roles = ("system", "developer", "user", "system", "user")
    messages = [{"role": role, "content": f"Text {i}."} for i, role in enumerate(roles)]
    complete(client, messages)
    prompt = HARMONY.spelled_text(engine.requests[0].prompt)
    assert "# Instructions\n\nText 0.\n\nText 1.<|end|><|start|>user<|message|>Text 2." in prompt
    assert "<|start|>developer<|message|># Instructions\n\nText 3.<|end|><|start|>user" in prompt


def test_reasoning_has_both_names_if_the_server_is_told_so(start):
    client, _, _ = start(settings=Settings(reasoning_content=True))
    message = complete(client).choices[0].message
    assert message.reasoning == message.reasoning_content == "Hm, hi."
    chunks = stream(client)
    assert joined(chunks, "reasoning") == joined(chunks, "reasoning_content") == "Hm, hi."
    client, _, _ = start()
    assert not hasattr(complete(client).choices[0].message, "reasoning_content")


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_is_kept_between_calls_and_dropped_after_an_answer(start, name):
    client, engine, _ = start()
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    loop = [
        *HI,
        {"role": "assistant", "content": None, name: "Look.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "warm"},
    ]
    complete(client, loop, tools=[WEATHER])
    complete(client, [*loop, {"role": "assistant", name: "Then.", "content": "Warm."}, *HI], tools=[WEATHER])
    in_loop, later = (HARMONY.spelled_text(request.prompt) for request in engine.requests)
    assert "<|channel|>analysis<|message|>Look.<|end|><|start|>assistant to=functions.weather" in in_loop
    assert "<|start|>functions.weather to=assistant<|channel|>commentary<|message|>warm<|end|>" in in_loop
    assert "Look." not in later and "Then." not in later and "final<|message|>Warm.<|end|>" in later


def test_a_turn_ends_after_one_call(start):
    call = f"{CALL}{{}}<|call|>"
    client, engine, _ = start(call + "<|start|>assistant" + call)
    answer = complete(client, tools=[WEATHER], parallel_tool_calls=True)
    assert len(answer.choices[0].message.tool_calls) == 1
    assert HARMONY.call in engine.requests[0].params.stop_tokens


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"reasoning_effort": "high"}, "Reasoning: high"),
        ({"reasoning_effort": "minimal"}, "Reasoning: low"),
        ({"extra_body": {"reasoning": {"effort": "low"}}}, "Reasoning: low"),
        ({"extra_body": {"chat_template_kwargs": {"reasoning_effort": "high"}}}, "Reasoning: high"),
        ({}, "Reasoning: medium"),
    ],
)
def test_the_effort_is_in_the_system_message(start, fields, line):
    client, engine, _ = start()
    complete(client, **fields)
    assert line in HARMONY.spelled_text(engine.requests[0].prompt)


@pytest.mark.parametrize("extra", [{"reasoning": {"exclude": True}}, {"include_reasoning": False}])
def test_reasoning_may_be_left_out_and_is_counted(start, extra):
    client, _, _ = start()
    answer = complete(client, extra_body=extra)
    assert not hasattr(answer.choices[0].message, "reasoning")
    assert answer.choices[0].message.content == "Hello world"
    assert answer.usage.completion_tokens_details.reasoning_tokens > 0
    assert joined(stream(client, extra_body=extra), "reasoning") == ""


@pytest.mark.parametrize("is_stream", [False, True])
def test_several_choices_have_consecutive_seeds(start, is_stream):
    client, engine, _ = start(lambda request: tokens_of(f"{FINAL}{'abc'[request.params.seed % 3]}"))
    fields = {"n": 3, "seed": (1 << 32) - 1}
    if is_stream:
        chunks = stream(client, stream_options={"include_usage": True}, **fields)
        texts, usage = [joined(chunks, "content", i) for i in range(3)], chunks[-1].usage
    else:
        answer = complete(client, **fields)
        texts, usage = [choice.message.content for choice in answer.choices], answer.usage
        assert answer.seed == (1 << 32) - 1
    assert [request.params.seed for request in engine.requests] == [(1 << 32) - 1, 0, 1]
    assert texts == ["a", "a", "b"]
    assert usage.completion_tokens == 3 * len(tokens_of(f"{FINAL}a"))
    assert usage.prompt_tokens == len(engine.requests[0].prompt)


def test_sampling_settings_reach_the_engine(start):
    client, engine, _ = start()
    extra = {"top_k": 5, "min_p": 0.1, "stop_token_ids": [7], "cache_salt": "s", "return_token_ids": True}
    answer = complete(
        client, temperature=0.5, top_p=0.9, presence_penalty=1, frequency_penalty=-1, logit_bias={"3": -5},
        max_tokens=77, seed=9, extra_body=extra,
    )  # fmt: skip
    request = engine.requests[0]
    params = request.params
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 5, 0.1)
    assert (params.presence_penalty, params.frequency_penalty, params.logit_bias) == (1, -1, ((3, -5),))
    assert (params.max_new_tokens, params.seed, request.cache_salt) == (77, 9, "s")
    assert 7 in params.stop_tokens and HARMONY.return_id in params.stop_tokens
    assert answer.choices[0].token_ids == tokens_of(ANSWER)[:-1]
    assert answer.choices[0].prompt_token_ids == request.prompt
    chunks = stream(client, extra_body=extra)
    ids = [token for one in chunks for token in getattr(one.choices[0], "token_ids", ())]
    assert ids == tokens_of(ANSWER)[:-1]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [*HI, {"role": "user", "content": [{"type": "input_audio"}]}]},
         "messages[1].content[0].type"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "r", "schema": {"not": {}}}}},
         "response_format.json_schema.schema"),
        ({"tools": [{"function": {"name": "f", "strict": True, "parameters": {"not": {}}}}]},
         "tools[0].function.parameters"),
        ({"reasoning_effort": "most"}, "reasoning_effort"),
        ({"reasoning": {"effort": 3}}, "reasoning.effort"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"n": 0}, "n"),
        ({"stop": [3]}, "stop"),
        ({"stream_options": {}}, "stream_options"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"max_tokens": 5000}, "max_tokens"),
        ({"messages": [{"role": "user", "content": "a b " * 5000}]}, "messages"),
        ({"ignore_eos": True, "response_format": {"type": "json_object"}}, "ignore_eos"),
        ({"temperature": -1}, "temperature"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
    ],
)  # fmt: skip
def test_faults_name_the_field(start, body, param):
    _, engine, http = start()
    answer = http.post("/v1/chat/completions", json={"model": "tiny", "messages": HI, **body})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error")
    assert engine.requests == []


def test_a_base_model_points_to_completions():
    tokenizer = make_tokenizer("bytes")
    service = scripted_service(ScriptedEngine(), tokenizer)
    with TestClient(create_app(service)) as http:
        answer = http.post("/v1/chat/completions", json={"messages": HI})
    assert answer.status_code == 400
    assert "/v1/completions" in answer.json()["error"]["message"]
