"""Chat messages of requests as Harmony messages."""

import time

import pytest

from gptoss_jax.data.harmony import Message, developer, system, user
from gptoss_jax.server.errors import ApiError
from gptoss_jax.server.fields import Fields
from gptoss_jax.server.messages import Conversation, read_messages
from gptoss_jax.server.tools import Function, Tools

CONSTRAINED = "<|constrain|>json"


def read(*messages):
    return read_messages(Fields({"messages": list(messages)}))


def call(identity, name, arguments="{}"):
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}


def test_every_system_and_developer_text_stays_in_order():
    found = read(
        {"role": "system", "content": "One."},
        {"role": "developer", "content": [{"type": "text", "text": "Tw"}, {"type": "text", "text": "o."}]},
        {"role": "user", "content": "Hi"},
        {"role": "system", "content": "Three."},
        {"role": "user", "content": ""},
    )
    assert found == Conversation("One.\n\nTwo.", [user("Hi"), developer("Three."), user("")])
    assert found.with_system("low", None)[:2] == [system("low"), developer("One.\n\nTwo.")]


def test_calls_come_before_their_results_and_reasoning_before_calls():
    found = read(
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "reasoning": "Look it up.",
            "content": "One moment.",
            "tool_calls": [call("a", "weather", '{"city": "Rome"}'), call("b", "weather", '{"city": ')],
        },
        {"role": "tool", "tool_call_id": "b", "content": "cold"},
        {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "warm"}]},
        {"role": "assistant", "reasoning_content": "Done.", "content": "Warm."},
    )
    assert found.messages == [
        user("Weather?"),
        Message("assistant", "Look it up.", "analysis"),
        Message("assistant", "One moment.", "commentary"),
        Message("assistant", '{"city": "Rome"}', "commentary", "functions.weather", CONSTRAINED),
        Message("functions.weather", "warm", "commentary", "assistant"),
        Message("assistant", '{"city": ', "commentary", "functions.weather", CONSTRAINED),
        Message("functions.weather", "cold", "commentary", "assistant"),
        Message("assistant", "Done.", "analysis"),
        Message("assistant", "Warm.", "final"),
    ]


def test_many_calls_and_results_take_linear_time():
    calls = [call(f"call{i}", "f") for i in range(3000)]
    results = [{"role": "tool", "tool_call_id": f"other{i}", "name": "g", "content": ""} for i in range(3000)]
    began = time.process_time()
    found = read({"role": "assistant", "tool_calls": calls}, *results)
    # Each call with each result: 10 s.
    assert len(found.messages) == 6000 and time.process_time() - began < 3


def test_what_clients_send_back_is_accepted():
    found = read(
        {"role": "assistant", "content": None},  # cut off while it reasoned; the client dropped that
        {"role": "assistant", "content": None, "tool_calls": [call("x", "f", {"a": 1}), call("y", "g")]},
        {"role": "user", "content": "Stop."},  # no result of y
        {"role": "tool", "tool_call_id": "x", "content": None},
        {"role": "assistant", "content": "Ok."},
        {"role": "tool", "tool_call_id": "y", "content": "late"},
        {"role": "assistant", "content": "", "refusal": "No."},
        {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "name": "f", "content": "old"},
    )
    assert [(one.role, one.text, one.recipient) for one in found.messages] == [
        ("assistant", '{"a": 1}', "functions.f"),
        ("functions.f", "", "assistant"),
        ("assistant", "{}", "functions.g"),
        ("user", "Stop.", None),
        ("assistant", "Ok.", None),
        ("functions.g", "late", "assistant"),
        ("assistant", "No.", None),
        ("assistant", "{}", "functions.f"),
        ("functions.f", "old", "assistant"),
    ]


def test_tools_and_the_format_of_the_answer_are_in_the_developer_message():
    tools = Tools((Function("f", "Does it.", {"const": 3}),))
    messages = Conversation("Be brief.", []).with_system("high", "2026-01-31", tools, "# Response Formats")
    assert messages == [
        system("high", "2026-01-31", has_functions=True),
        Message(
            "developer",
            "# Instructions\n\nBe brief.\n\n# Tools\n\n## functions\n\nnamespace functions {\n\n// Does it.\n"
            "type f = (_: number) => any;\n\n} // namespace functions\n\n# Response Formats",
        ),
    ]
    assert Conversation(None, [user("a")]).with_system("low", None) == [system("low"), user("a")]


@pytest.mark.parametrize(
    ("messages", "param", "reason"),
    [
        (None, "messages", "messages is missing"),
        ([], "messages", "must contain at least one message"),
        (["a"], "messages[0]", "must be an object"),
        ([{"content": "a"}], "messages[0].role", "missing"),
        ([{"role": "bot", "content": "a"}], "messages[0].role", "must be one of system, developer"),
        ([{"role": "user"}], "messages[0].content", "missing"),
        ([{"role": "user", "content": 3}], "messages[0].content", "must be a string or a list"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            "messages[0].content[0].type",
            "images, audio and files are not supported",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text", "missing"),
        ([{"role": "user", "content": ["a", 3]}], "messages[0].content[1]", "must be a text part"),
        ([{"role": "tool", "content": "a"}], "messages[0].tool_call_id", "missing"),
        ([{"role": "tool", "content": "a", "tool_call_id": "z"}], "messages[0].tool_call_id", "earlier"),
        (
            [{"role": "assistant", "tool_calls": [call("x", "a b")]}],
            "messages[0].tool_calls[0].function.name",
            "1 to 64 letters",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"type": "custom", "custom": {}}]}],
            "messages[0].tool_calls[0].type",
            "must be function",
        ),
    ],
)
def test_faults_name_the_field(messages, param, reason):
    with pytest.raises(ApiError, match=reason) as caught:
        read_messages(Fields({"messages": messages}))
    assert (caught.value.status, caught.value.param) == (400, param)
