"""`/v1/responses` over a scripted engine, through the openai client and its pydantic models."""

import asyncio
import json
import re
import time

import numpy as np
import openai
import pydantic
import pytest
from helpers.live_server import live_server
from helpers.mutations import mutated
from helpers.scripted_engine import ScriptedEngine, scripted_service, tiny_tokenizer
from openai.types.responses import Response, ResponseStreamEvent
from starlette.testclient import TestClient

from gptoss_jax.data.harmony import Harmony
from gptoss_jax.server.app import create_app
from gptoss_jax.server.response_events import decode_reasoning, encode_reasoning
from gptoss_jax.server.response_store import ResponseStore, num_json_bytes

TOKENIZER = tiny_tokenizer()
HARMONY = Harmony(TOKENIZER)
EVENT = pydantic.TypeAdapter(ResponseStreamEvent)
THOUGHT = "<|channel|>analysis<|message|>the fox<|end|><|start|>assistant"
ANSWER = THOUGHT + "<|channel|>final<|message|>hello world<|return|>"
PREAMBLE = "<|channel|>commentary<|message|>says the dog<|end|><|start|>assistant"
CALL = '<|channel|>commentary to=functions.jump <|constrain|>json<|message|>{"high": 2}<|call|>'
TOOL = {
    "type": "function",
    "name": "jump",
    "description": "Jumps.",
    "parameters": {"type": "object", "properties": {"high": {"type": "integer"}}, "required": ["high"]},
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


@pytest.fixture
def start():
    """(answers, the last of which repeats, or a function of the request; engine's arguments) -> an openai
    client, the engine, and an HTTP client."""
    clients = []

    def make(*answers, **engine):
        scripts = [tokens_of(answer) if isinstance(answer, str) else answer for answer in answers or [ANSWER]]
        scripted = ScriptedEngine(lambda _: scripts.pop(0) if len(scripts) > 1 else scripts[0], **engine)
        service = scripted_service(scripted, TOKENIZER)
        http = TestClient(create_app(service))
        clients.append(http)
        http.__enter__()
        client = openai.OpenAI(
            base_url="http://testserver/v1", api_key="none", http_client=http, max_retries=0
        )
        return client, scripted, http

    yield make
    for one in clients:
        one.__exit__(None, None, None)


def create(client, input="the quick fox", **fields):
    answer = client.responses.create(**{"model": "tiny", "input": input, **fields})
    Response.model_validate(answer.to_dict())
    return answer


def stream(client, input="the quick fox", **fields):
    events = [
        event.to_dict() for event in client.responses.create(model="tiny", input=input, stream=True, **fields)
    ]
    for i, event in enumerate(events):
        EVENT.validate_python(event)
        assert event["sequence_number"] == i
    return events


def prompt_of(engine, i=-1):
    return HARMONY.spelled_text(engine.requests[i].prompt)


def summary(answer):
    """(type, status, text) of each output item."""
    found = []
    for item in answer.output:
        text = item.arguments if item.type == "function_call" else "".join(part.text for part in item.content)
        found.append((item.type, item.status, text))
    return found


def without_ids(value):
    """Replaces the ids and times of a response's JSON."""
    text = re.sub(r"(resp|rs|msg|fc|call)_[0-9a-f]{24,48}", r"\1_", json.dumps(value))
    return re.sub(r'"(created_at|completed_at|seed)": [\d.]+', r'"\1": 0', text)


def test_an_answer(start):
    client, engine, _ = start(cached_tokens=3)
    answer = create(client, instructions="hello", metadata={"a": "b"}, temperature=0.5)
    assert summary(answer) == [
        ("reasoning", "completed", "the fox"),
        ("message", "completed", "hello world"),
    ]
    assert answer.output_text == "hello world"
    assert answer.output[1].phase == "final_answer"
    assert (answer.status, answer.incomplete_details, answer.error) == ("completed", None, None)
    assert (answer.instructions, answer.metadata, answer.temperature) == ("hello", {"a": "b"}, 0.5)
    usage, thought = answer.usage, len(TOKENIZER.encode("the fox"))
    assert usage.input_tokens == len(engine.requests[0].prompt)
    assert usage.input_tokens_details.cached_tokens == 3
    assert usage.output_tokens == len(tokens_of(ANSWER))
    assert usage.output_tokens_details.reasoning_tokens == thought
    assert "# Instructions\n\nhello<|end|><|start|>user<|message|>the quick fox<|end|>" in prompt_of(engine)


def test_events_of_a_stream(start):
    client, _, _ = start(chunk=100)
    events = stream(client)
    assert [event["type"] for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.reasoning_text.delta",
        "response.reasoning_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert events[0]["response"]["status"] == "in_progress" and events[0]["response"]["output"] == []
    assert [event["output_index"] for event in events[2:-1]] == [0] * 6 + [1] * 6
    assert events[4]["delta"] == events[5]["text"] == "the fox"
    assert events[10]["delta"] == events[11]["text"] == "hello world"
    final = events[-1]["response"]
    assert final["output"] == [events[7]["item"], events[13]["item"]]
    assert without_ids(final) == without_ids(create(client).to_dict())


def test_stream_sends_names_of_events_and_no_other_end(start):
    _, _, http = start()
    body = http.post("/v1/responses", json={"input": "fox", "stream": True}).text
    events = [line.split("\n") for line in body.strip().split("\n\n")]
    assert all(name == f"event: {json.loads(data[6:])['type']}" for name, data in events)
    assert events[-1][0] == "event: response.completed"


def test_deltas_add_up_in_the_clients_stream(start):
    client, _, _ = start(PREAMBLE + THOUGHT + CALL, chunk=1, step_seconds=0.02)
    with client.responses.stream(model="tiny", input="fox", tools=[TOOL]) as events:
        arguments = [event for event in events if event.type == "response.function_call_arguments.delta"]
        final = events.get_final_response()
    assert arguments[-1].snapshot == '{"high": 2}' and len(arguments) > 1
    assert summary(final) == [
        ("message", "completed", "says the dog"),
        ("reasoning", "completed", "the fox"),
        ("function_call", "completed", '{"high": 2}'),
    ]
    assert final.output[0].phase == "commentary"
    assert (final.output[2].name, final.output[2].call_id[:5]) == ("jump", "call_")


def test_an_answer_that_reaches_its_limit_is_incomplete(start):
    client, _, _ = start()
    answer = create(client, max_output_tokens=len(tokens_of(ANSWER)) - 2)
    assert answer.status == "incomplete" and answer.incomplete_details.reason == "max_output_tokens"
    assert [item.status for item in answer.output] == ["completed", "incomplete"]
    events = stream(client, max_output_tokens=2)
    assert events[-1]["type"] == "response.incomplete"
    assert events[-1]["response"]["incomplete_details"]["reason"] == "max_output_tokens"


def test_an_answer_of_nothing_has_an_empty_message(start):
    client, _, _ = start("<|return|>")
    assert summary(create(client)) == [("message", "completed", "")]


@pytest.fixture
def tool_turns(start):
    """(how the first turn goes into the second) -> the prompts of both and the answers."""

    def run(second):
        client, engine, _ = start(PREAMBLE + THOUGHT + CALL, ANSWER)
        first = create(client, "jump", tools=[TOOL])
        result = {"type": "function_call_output", "call_id": first.output[2].call_id, "output": "done"}
        answer = create(client, tools=[TOOL], **second(first, result))
        return engine, first, answer

    return run


def by_id(first, result):
    return {"input": [result], "previous_response_id": first.id}


def by_items(first, result):
    sent = [item.model_dump(exclude_none=True) for item in first.output]
    return {"input": [{"role": "user", "content": "jump"}, *sent, result], "store": False}


def by_reference(first, result):
    sent = [{"type": "item_reference", "id": item.id} for item in first.output]
    return {"input": [{"role": "user", "content": "jump"}, *sent, result]}


@pytest.mark.parametrize("second", [by_id, by_items, by_reference])
def test_a_result_continues_the_answer_with_its_reasoning(tool_turns, second):
    engine, first, answer = tool_turns(second)
    assert answer.output_text == "hello world"
    turn = prompt_of(engine, 0) + PREAMBLE + THOUGHT
    # Calls are rendered with the recipient in the role, as openai-harmony does.
    turn += ' to=functions.jump<|channel|>commentary <|constrain|>json<|message|>{"high": 2}<|call|>'
    turn += "<|start|>functions.jump to=assistant<|channel|>commentary<|message|>done<|end|>"
    assert prompt_of(engine) == turn + "<|start|>assistant"


def test_reasoning_is_dropped_after_the_users_reply_to_a_final_answer(start):
    client, engine, _ = start()
    first = create(client)
    create(client, "and the dog", previous_response_id=first.id)
    assert "the fox" not in prompt_of(engine)
    final = "<|channel|>final<|message|>hello world<|end|><|start|>user<|message|>and the dog"
    assert final in prompt_of(engine)


def test_instructions_are_those_of_the_request_only(start):
    client, engine, _ = start()
    first = create(client, instructions="hello")
    create(client, "dog", previous_response_id=first.id, instructions="world")
    assert re.findall(r"# Instructions\n\n(\w+)<", prompt_of(engine)) == ["world"]


def test_reasoning_can_be_sent_back_as_encrypted_content(start):
    client, engine, _ = start(THOUGHT + CALL)
    first = create(client, tools=[TOOL], store=False, include=["reasoning.encrypted_content"])
    encoded = first.output[0].encrypted_content
    assert decode_reasoning(encoded) == "the fox"
    sent = [
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": encoded},
        {"type": "function_call", "call_id": "c", "name": "jump", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "done"}]},
    ]
    create(client, sent, tools=[TOOL])
    assert "<|channel|>analysis<|message|>the fox<|end|>" in prompt_of(engine)
    assert "<|message|>done<|end|>" in prompt_of(engine)
    assert decode_reasoning("gAAAAABo") is None and decode_reasoning("gptoss_jax.!") is None


def test_encoded_reasoning_keeps_any_text():
    assert decode_reasoning(encode_reasoning("né\n🦊")) == "né\n🦊"


def test_parallel_results_follow_their_calls(start):
    client, engine, _ = start()
    calls = [{"type": "function_call", "call_id": name, "name": name, "arguments": name} for name in "ab"]
    results = [{"type": "function_call_output", "call_id": name, "output": name * 3} for name in "ab"]
    create(client, [{"role": "user", "content": "x"}, *calls, *results])
    order = re.findall(r"to=functions\.(\w)<\|ch|<\|start\|>functions\.(\w) to", prompt_of(engine))
    assert order == [("a", ""), ("", "a"), ("b", ""), ("", "b")]


def test_system_and_developer_messages(start):
    client, engine, _ = start()
    create(
        client,
        [
            {"role": "system", "content": "one"},
            {"role": "developer", "content": [{"type": "input_text", "text": "two"}]},
            {"role": "user", "content": "fox"},
            {"role": "developer", "content": "three"},
        ],
        instructions="zero",
        reasoning={"effort": "xhigh"},
    )
    assert "Reasoning: high" in prompt_of(engine)
    assert "# Instructions\n\nzero\n\none\n\ntwo<|end|><|start|>user" in prompt_of(engine)
    assert "fox<|end|><|start|>developer<|message|># Instructions\n\nthree<|end|>" in prompt_of(engine)


class Jump(pydantic.BaseModel):
    high: int
    name: str | None = None


def test_format_is_parsed_and_enforced(start):
    client, engine, _ = start(THOUGHT + '<|channel|>final<|message|>{"high":3,"name":null}<|return|>')
    answer = client.responses.parse(model="tiny", input="jump", text_format=Jump)
    assert answer.output_parsed == Jump(high=3)
    with client.responses.stream(model="tiny", input="jump", text_format=Jump) as events:
        assert events.get_final_response().output_parsed == Jump(high=3)
    assert "# Response Formats\n\n## Jump" in prompt_of(engine)
    assert "%json" in engine.requests[0].params.grammar
    schema = {"type": "object", "properties": {"high": {"type": "integer"}}}
    shown = create(client, text={"format": {"type": "json_schema", "name": "a", "schema": schema}})
    assert shown.text.format.schema_ == schema
    again = create(client, text={"format": {"type": "json_object"}, "verbosity": "low"})
    assert (again.text.format.type, again.text.verbosity) == ("json_object", "low")


def test_required_calls_have_a_grammar(start):
    client, engine, _ = start(THOUGHT + CALL)
    create(client, tools=[TOOL], tool_choice="required")
    assert "functions.jump" in engine.requests[0].params.grammar
    choice = {"type": "function", "name": "jump"}
    answer = create(client, tools=[TOOL, {**TOOL, "name": "run"}], tool_choice=choice)
    assert answer.tool_choice.name == "jump" and [tool.name for tool in answer.tools] == ["jump", "run"]
    assert "functions.run" not in engine.requests[1].params.grammar
    free = create(client, tools=[TOOL], tool_choice="none")
    assert engine.requests[2].params.grammar is None and "namespace" not in prompt_of(engine)
    assert [item.type for item in free.output] == ["reasoning", "message"]  # no tools, no calls


def test_log_probabilities(start):
    client, _, _ = start(chunk=1)
    answer = create(client, top_logprobs=2, include=["message.output_text.logprobs"])
    entries = answer.output[1].content[0].logprobs
    assert "".join(entry.token for entry in entries) == "hello world"
    assert [len(entry.top_logprobs) for entry in entries] == [2] * len(entries)
    events = stream(client, top_logprobs=1)
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    tokens = ["".join(entry["token"] for entry in event["logprobs"]) for event in deltas]
    assert tokens == [event["delta"] for event in deltas]
    done = next(event for event in events if event["type"] == "response.output_text.done")
    assert len(done["logprobs"]) == len(entries)


def test_stored_responses(start):
    client, _, http = start()
    answer = create(client)
    assert client.responses.retrieve(answer.id).model_dump() == answer.model_dump()
    client.responses.delete(answer.id)
    for method in ("GET", "DELETE"):
        missing = http.request(method, f"/v1/responses/{answer.id}")
        assert missing.status_code == 404 and missing.json()["error"]["param"] == "id"
    unstored = create(client, store=False)
    with pytest.raises(openai.NotFoundError) as error:
        create(client, previous_response_id=unstored.id)
    assert error.value.body["code"] == "previous_response_not_found"
    assert error.value.body["param"] == "previous_response_id"


def test_store_is_limited_in_number_and_bytes():
    store = ResponseStore(max_responses=2, max_bytes=1000)

    def put(name, text=""):
        items = [{"text": text}]
        store.put({"id": name, "output": [{"id": f"item-{name}"}]}, items, num_json_bytes(items))

    put("a"), put("b"), store.get("a"), put("c")
    assert [store.get(name) is not None for name in "abc"] == [True, False, True]
    assert store.item("item-b") is None and store.item("item-a") == {"id": "item-a"}
    put("d", "x" * 900)
    assert len(store) == 1 and store.get("d").items == ({"text": "x" * 900}, {"id": "item-d"})
    put("e", "x" * 1000)
    assert len(store) == 1 and store.get("e") is None
    assert store.delete("d") and not store.delete("d") and store.num_bytes == 0


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": 3}, "input"),
        ({"input": [3]}, "input[0]"),
        ({"input": [{"type": "web_search_call"}]}, "input[0].type"),
        ({"input": [{"role": "robot", "content": ""}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": [{"role": "assistant", "content": "x", "phase": {}}]}, "input[0].phase"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": ""}]}, "input[0].call_id"),
        ({"input": [{"type": "function_call", "call_id": "c"}]}, "input[0].name"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].id"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": "x", "tool_choice": {"type": "function", "name": "f"}}, "tool_choice.name"),
        ({"input": "x", "background": True}, "background"),
        ({"input": "x", "conversation": "conv_1"}, "conversation"),
        ({"input": "x", "include": ["everything"]}, "include"),
        ({"input": "x", "reasoning": {"effort": "extreme"}}, "reasoning.effort"),
        ({"input": "x", "truncation": "some"}, "truncation"),
        ({"input": "x", "metadata": {"a": 1}}, "metadata"),
        ({"input": "x", "max_output_tokens": 0}, "max_output_tokens"),
        ({"input": "x", "max_output_tokens": 5000}, "max_output_tokens"),
        ({"input": "fox " * 5000}, "input"),
        ({"input": "x", "model": "other"}, "model"),
    ],
)
def test_faults_name_their_field(start, fields, param):
    _, _, http = start()
    answer = http.post("/v1/responses", json=fields)
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["param"] == param


def test_truncation_drops_the_oldest_messages(start):
    client, engine, _ = start(max_context=300)
    turns = [{"role": ("user", "assistant")[i % 2], "content": f"number {i} " * 9} for i in range(18)]
    turns.append({"role": "user", "content": "the last"})
    with pytest.raises(openai.BadRequestError) as error:
        create(client, turns)
    assert error.value.code == "context_length_exceeded"
    create(client, turns, truncation="auto", max_output_tokens=40, instructions="hello")
    prompt = engine.requests[-1].prompt
    assert 150 < len(prompt) <= 260
    assert "hello<|end|>" in prompt_of(engine) and "number 0" not in prompt_of(engine)
    assert prompt_of(engine).endswith("the last<|end|><|start|>assistant")


def test_nothing_that_a_model_writes_is_an_error_or_lost(start):
    rng = np.random.default_rng(0)
    special = list(TOKENIZER.special_tokens.values())
    answers = []
    for _ in range(150):
        tokens = rng.integers(0, 420, rng.integers(0, 60))
        tokens[rng.random(len(tokens)) < 0.3] = rng.choice(special)
        answers.append(tokens.tolist())
    client, _, _ = start(*answers)
    for _ in range(75):
        events = stream(client, tools=[TOOL])
        final = events[-1]["response"]
        texts = "".join(event["delta"] for event in events if event["type"].endswith(".delta"))
        shown = "".join(
            item.get("arguments") or "".join(part["text"] for part in item.get("content", []))
            for item in final["output"]
        )
        assert texts == shown
        create(client, tools=[TOOL])


@pytest.mark.parametrize("is_streamed", [False, True])
def test_tool_loop_of_openai_agents(is_streamed):
    agents = pytest.importorskip("agents")
    agents.set_tracing_disabled(True)
    heights = []

    @agents.function_tool
    def jump(high: int) -> str:
        """Jumps."""
        heights.append(high)
        return "landed"

    async def run(url):
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            model = agents.OpenAIResponsesModel("tiny", client)
            agent = agents.Agent("fox", instructions="hello", model=model, tools=[jump])
            if not is_streamed:
                return await agents.Runner.run(agent, "jump")
            result = agents.Runner.run_streamed(agent, "jump")
            async for _ in result.stream_events():
                pass
            return result

    scripts = [tokens_of(PREAMBLE + THOUGHT + CALL), tokens_of(ANSWER)]
    engine = ScriptedEngine(lambda _: scripts.pop(0))
    with live_server(scripted_service(engine, TOKENIZER)) as url:
        result = asyncio.run(run(url))
    assert (heights, result.final_output) == ([2], "hello world")
    # The reasoning and the preamble before the call come back.
    assert PREAMBLE + THOUGHT in prompt_of(engine)
    assert "functions.jump to=assistant<|channel|>commentary<|message|>landed<|end|>" in prompt_of(engine)


def test_stateless_loop_as_codex_sends_it(start):
    _, engine, http = start(PREAMBLE + THOUGHT + CALL, ANSWER)
    asked = [
        {"type": "message", "role": role, "content": [{"type": "input_text", "text": text}]}
        for role, text in (("developer", "be quick"), ("user", "jump"))
    ]
    body = {
        "model": "tiny",
        "instructions": "hello",
        "tools": [{**TOOL, "strict": False}],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "0c4e",
        "text": {"verbosity": "low"},
    }

    def turn(items):
        lines = http.post("/v1/responses", json={**body, "input": items}).text.split("\n")
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
        assert events[-1]["type"] == "response.completed" and events[-1]["response"]["usage"]
        return [event["item"] for event in events if event["type"] == "response.output_item.done"]

    message, thought, call = turn(asked)
    sent = [
        {key: message[key] for key in ("type", "role", "content")},
        {"type": "reasoning", "summary": [], "encrypted_content": thought["encrypted_content"]},
        {key: call[key] for key in ("type", "name", "arguments", "call_id")},
        {"type": "function_call_output", "call_id": call["call_id"], "output": "done"},
    ]
    assert turn(asked + sent)[-1]["content"][0]["text"] == "hello world"
    # The channel of the preamble is found again without its phase.
    assert prompt_of(engine).startswith(prompt_of(engine, 0) + PREAMBLE + THOUGHT)


def test_failure_in_a_stream_is_an_event(start):
    _, engine, http = start(chunk=1)

    def fail():
        engine.step = broken
        return engine_step()

    def broken():
        raise RuntimeError("broken")

    engine_step, engine.step = engine.step, fail
    lines = http.post("/v1/responses", json={"input": "x", "stream": True}).text.strip().split("\n")
    last = json.loads(lines[-1][6:])
    EVENT.validate_python(last)
    assert last["type"] == "response.failed" and last["response"]["error"]["code"] == "server_error"
    assert "broken" not in lines[-1]


def test_request_is_cancelled_when_the_client_leaves():
    engine = ScriptedEngine(tokens_of("fox " * 900), step_seconds=0.01)
    with live_server(scripted_service(engine, TOKENIZER)) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        with client.responses.stream(model="tiny", input="fox") as events:
            next(event for event in events if event.type == "response.output_text.delta")
        until = time.monotonic() + 10
        while not engine.cancelled and time.monotonic() < until:
            time.sleep(0.01)
    assert engine.cancelled == engine.requests and engine.num_steps < 100


VALID = {
    "model": "tiny",
    "instructions": "hello",
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "jump"}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "fox"}]},
        {"type": "function_call", "call_id": "c", "name": "jump", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "done"},
        {"type": "message", "role": "assistant", "phase": "final_answer", "content": "x"},
        {"role": "user", "content": "again"},
    ],
    "tools": [TOOL],
    "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "jump"}]},
    "text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "object"}}},
    "reasoning": {"effort": "low", "summary": "auto"},
    "include": ["message.output_text.logprobs"],
    "metadata": {"a": "b"},
    "max_output_tokens": 9,
    "temperature": 1,
    "top_p": 1,
    "top_logprobs": 1,
    "store": True,
    "stream": False,
    "truncation": "auto",
    "previous_response_id": None,
}


def test_mutated_requests_never_fail(start):
    _, _, http = start()
    assert http.post("/v1/responses", json=VALID).status_code == 200
    rng = np.random.default_rng(0)
    statuses = []
    for _ in range(400):
        body = VALID
        for _ in range(rng.integers(1, 3)):
            body = mutated(body, rng)
        answer = http.post("/v1/responses", json=body)
        statuses.append(answer.status_code)
        if answer.status_code == 200 and "text/event-stream" not in answer.headers["content-type"]:
            Response.model_validate(answer.json())
        elif answer.status_code != 200:
            assert answer.status_code in (400, 404), answer.text
            error = answer.json()["error"]
            assert error["param"] is not None or not isinstance(body, dict), error
    assert statuses.count(200) > 40
