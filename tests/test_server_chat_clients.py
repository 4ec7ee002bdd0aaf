"""Chat completions through clients that people use: openai's helpers, openai-agents, langchain-openai."""

import asyncio
import json
import pathlib
import re

import agents
import numpy as np
import openai
import pydantic
import pytest
from helpers.grammars import sample
from helpers.live_server import live_server
from helpers.scripted_engine import ScriptedEngine, encode_special, scripted_service, tiny_tokenizer
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI

from gptoss_jax.data.harmony import Harmony

TOKENIZER = tiny_tokenizer()
HARMONY = Harmony(TOKENIZER)
THOUGHT = "<|channel|>analysis<|message|>Look it up.<|end|><|start|>assistant"
CALL = '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Paris"}<|call|>'
THOUGHT_2 = THOUGHT.replace("Look it up", "Good")
FINAL = THOUGHT_2 + "<|channel|>final<|message|>It is warm.<|return|>"
QUESTION = "Weather in Paris?"


class City(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=9)
    people: int | None


def script(request):
    """A call and, after its result, an answer; to other questions, whatever the grammar allows."""
    prompt, grammar = HARMONY.spelled_text(request.prompt), request.params.grammar
    rng, limit = np.random.default_rng(4), request.params.max_new_tokens
    if QUESTION not in prompt and grammar is not None:
        return sample(TOKENIZER, grammar, rng, limit)[0]
    has_result = "<|start|>functions.weather to=assistant" in prompt
    is_call = QUESTION in prompt and not has_result
    tokens = encode_special(TOKENIZER, THOUGHT + CALL if is_call else FINAL)
    # Raises ValueError if the grammar does not allow them.
    return tokens if grammar is None else sample(TOKENIZER, grammar, rng, limit, tokens)[0]


@pytest.fixture(scope="module")
def server():
    """(address, engine) of a server on a socket."""
    engine = ScriptedEngine(script, vocab_size=TOKENIZER.vocab_size)
    with live_server(scripted_service(engine, TOKENIZER)) as url:
        yield url + "/v1", engine


@pytest.mark.parametrize("is_stream", [False, True])
def test_openai_agents_run_a_tool_loop_and_send_reasoning_back(server, is_stream):
    url, engine = server
    cities = []

    @agents.function_tool
    def weather(city: str) -> str:
        """Gets the weather."""
        cities.append(city)
        return "warm"

    async def run():
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            model = agents.OpenAIChatCompletionsModel("tiny", client)
            agent = agents.Agent("Guide", instructions="Be brief.", model=model, tools=[weather])
            config = agents.RunConfig(tracing_disabled=True)
            if not is_stream:
                return await agents.Runner.run(agent, QUESTION, run_config=config)
            result = agents.Runner.run_streamed(agent, QUESTION, run_config=config)
            async for _ in result.stream_events():
                pass
            return result

    result = asyncio.run(run())
    assert (result.final_output, cities) == ("It is warm.", ["Paris"])
    prompt = HARMONY.spelled_text(engine.requests[-1].prompt)
    turn = prompt[prompt.index("<|start|>user") :]
    assert turn == (
        "<|start|>user<|message|>Weather in Paris?<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>Look it up.<|end|>"
        "<|start|>assistant to=functions.weather<|channel|>commentary <|constrain|>json<|message|>"
        '{"city": "Paris"}<|call|>'
        "<|start|>functions.weather to=assistant<|channel|>commentary<|message|>warm<|end|><|start|>assistant"
    )


def test_openai_streams_with_accumulated_calls_and_parsed_formats(server):
    url, _ = server

    class weather(pydantic.BaseModel):  # noqa: N801 (the tool's name)
        city: str

    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        chat, ask = (
            client.chat.completions,
            {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]},
        )
        with chat.stream(**ask, response_format=City, max_tokens=3000) as stream:
            assert isinstance(stream.get_final_completion().choices[0].message.parsed, City)
        with chat.stream(**ask, tools=[openai.pydantic_function_tool(weather)], max_tokens=3000) as stream:
            events = list(stream)
            choice = stream.get_final_completion().choices[0]
    assert "tool_calls.function.arguments.done" in {event.type for event in events} or choice.message.content
    for call in choice.message.tool_calls or ():
        assert isinstance(call.function.parsed_arguments, weather)


def test_langchain_binds_tools_and_takes_results(server):
    url, _ = server
    model = ChatOpenAI(base_url=url, api_key="none", model="tiny", max_retries=0)
    tool = {"name": "weather", "description": "Gets it.", "parameters": {"type": "object", "properties": {}}}
    bound = model.bind_tools([tool])
    question = HumanMessage(QUESTION)
    message = bound.invoke([question])
    (call,) = message.tool_calls
    assert (call["name"], call["args"]) == ("weather", {"city": "Paris"})
    assert message.usage_metadata["output_token_details"]["reasoning"] > 0
    answer = bound.invoke([question, message, ToolMessage("warm", tool_call_id=call["id"])])
    assert answer.content == "It is warm."
    whole = None
    for chunk in bound.stream([question]):
        whole = chunk if whole is None else whole + chunk
    assert [one["args"] for one in whole.tool_calls] == [{"city": "Paris"}]


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
def test_langchain_gets_structured_output(server, method):
    url, engine = server
    model = ChatOpenAI(base_url=url, api_key="none", model="tiny", max_retries=0, max_tokens=3000)
    found = model.with_structured_output(City, method=method, include_raw=True).invoke("A city, as JSON.")
    if method == "json_mode":
        assert isinstance(json.loads(found["raw"].content), dict)
    else:
        assert isinstance(found["parsed"], City)
    assert engine.requests[-1].params.grammar is not None


def test_the_examples_of_the_docs_run(server):
    url, _ = server
    text = (pathlib.Path(__file__).parents[1] / "docs" / "serving.md").read_text(encoding="utf-8")
    blocks = [
        block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "client.chat" in block
    ]
    assert len(blocks) == 3
    code = "\n".join(blocks).replace("http://127.0.0.1:8000/v1", url).replace("openai/gpt-oss-20b", "tiny")
    found = {}
    exec(code, found)
    assert isinstance(found["answer"].choices[0].message.parsed, found["City"])
    assert [message["content"] for message in found["messages"] if isinstance(message, dict)][1] == "warm"
