"""Conversations as examples: formats, rows that cannot be used, masks token by token."""

import json
import re

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from helpers.data import shared_data

from gptoss_jax.data.chat import make_examples, needs_training
from gptoss_jax.data.chat_messages import harmony_messages
from gptoss_jax.data.chat_rows import RowError, open_chat, read_conversation
from gptoss_jax.data.harmony import Harmony, Message, system, user
from gptoss_jax.data.tokenizer import make_tokenizer

SMALL = make_tokenizer("bpe:300", lambda: iter(["What is 2 + 2? " * 9]))
SYSTEM = f"<|start|>system<|message|>{system().text}<|end|>"
FUNCTION = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
TOOL_SYSTEM = f"<|start|>system<|message|>{system(has_functions=True).text}<|end|>"


def examples_of(tokenizer, row, train_on="assistant"):
    messages = harmony_messages(read_conversation(row))
    (examples,) = make_examples(Harmony(tokenizer), [messages], train_on)
    assert needs_training(messages, train_on) == bool(examples)
    return examples


def show(example, tokenizer=SMALL):
    """Spells the tokens of an example, with the trained ones in brackets, without the system message."""
    harmony, text, inside = Harmony(tokenizer), b"", 0
    for token, weight in zip([*example.tokens.tolist(), None], [*example.weights.tolist(), 0], strict=True):
        text += (b"", "⟦".encode(), "⟧".encode())[weight - inside]
        text += b"" if token is None else harmony.spelled(token)
        inside = weight
    return text.decode().removeprefix(SYSTEM).removeprefix(TOOL_SYSTEM)


def shown(row, train_on="assistant"):
    return [show(example) for example in examples_of(SMALL, row, train_on)]


def u(text):
    return {"role": "user", "content": text}


def a(text=None, thinking=None, **other):
    return {"role": "assistant", "content": text, "thinking": thinking, **other}


def call(name, arguments=None, **other):
    return {"function": {"name": name, "arguments": {} if arguments is None else arguments}, **other}


def tool(content, **other):
    return {"role": "tool", "content": content, **other}


U, A = "<|start|>user<|message|>{}<|end|>".format, "<|start|>assistant"
F, T = "<|channel|>final<|message|>", "<|channel|>analysis<|message|>"
C = " to=functions.{}<|channel|>commentary <|constrain|>json<|message|>{}<|call|>".format
R = "<|start|>functions.{} to=assistant<|channel|>commentary<|message|>{}<|end|>".format
D = "<|start|>developer<|message|># Instructions\n\n{}<|end|>".format


def test_published_conversations(harmony):
    vectors = json.loads(shared_data("vectors/sft_examples.json").read_text())
    assert len(vectors) == 6
    for vector in vectors:
        examples = examples_of(harmony, vector)
        assert len(examples) == len(vector["examples"]), vector["name"]
        for found, expected in zip(examples, vector["examples"], strict=True):
            assert found.tokens.tolist() == expected["tokens"], vector["name"]
            assert found.weights.tolist() == expected["trained"], vector["name"]


def test_no_thinking_token_by_token(harmony):
    (example,) = examples_of(harmony, {"messages": [u("a<|end|>"), a("4<|return|>.")]})
    # The special tokens that the text spells are characters: 27 91 419 91 29 is <|end|>.
    tail = [
        *[200006, 1428, 200008, 64, 27, 91, 419, 91, 29, 200007, 200006, 173781],
        *[200005, 17196, 200008, 19, *harmony.encode("<|return|>."), 200002],
    ]
    trained = [0] * 12 + [1] * (len(tail) - 12)
    assert example.tokens[-len(tail) :].tolist() == tail
    assert example.weights.tolist() == [0] * (len(example.tokens) - len(tail)) + trained
    assert (example.tokens.dtype, example.weights.dtype, example.turn) == (np.int32, np.uint8, 1)
    assert not example.has_thinking and 200002 not in example.tokens[:-1]


TURNS = {
    "two calls in a turn": (
        [
            u("q"),
            a(None, "t1", tool_calls=[call("f", {"x": "é"})]),
            tool("r1"),
            a(None, "t2", tool_calls=[call("g", '{"y":2}')]),
            tool(""),
            a("done", "t3"),
        ],
        [
            f"{U('q')}{A}⟦{T}t1<|end|>{A}{C('f', json.dumps({'x': 'é'}, ensure_ascii=False))}⟧{R('f', 'r1')}"
            f"{A}⟦{T}t2<|end|>{A}{C('g', json.dumps({'y': 2}, separators=(',', ':')))}⟧{R('g', '')}"
            f"{A}⟦{T}t3<|end|>{A}{F}done<|return|>⟧"
        ],
    ),
    # The model makes one call at a time: each is followed by its result.
    "two calls in a message": (
        [
            u("q"),
            a("Looking.", tool_calls=[call("f", id="1"), call("g", id="2")]),
            tool("r2", tool_call_id="2"),
            tool("r1", tool_call_id="1"),
            a("done"),
        ],
        [
            f"{U('q')}{A}⟦<|channel|>commentary<|message|>Looking.<|end|>{A}{C('f', '{}')}⟧{R('f', 'r1')}"
            f"{A}⟦{C('g', '{}')}⟧{R('g', 'r2')}{A}⟦{F}done<|return|>⟧"
        ],
    ),
    "results matched by name, then by order": (
        [u("q"), a(tool_calls=[call("f"), call("g")]), tool("r2", name="g"), tool("r1"), a("done")],
        [f"{U('q')}{A}⟦{C('f', '{}')}⟧{R('f', 'r1')}{A}⟦{C('g', '{}')}⟧{R('g', 'r2')}{A}⟦{F}done<|return|>⟧"],
    ),
    "a preamble in a message before the call": (
        [u("q"), a("Looking.", "t"), a(tool_calls=[call("f")])],
        [f"{U('q')}{A}⟦{T}t<|end|>{A}<|channel|>commentary<|message|>Looking.<|end|>{A}{C('f', '{}')}⟧"],
    ),
    # The model waits for the result of the first one.
    "two calls without results": (
        [u("q1"), a("So.", tool_calls=[call("f"), call("g")]), u("q2"), a(tool_calls=[call("g"), call("f")])],
        [
            f"{U('q1')}{A}⟦<|channel|>commentary<|message|>So.<|end|>{A}{C('f', '{}')}⟧",
            f"{U('q1')}{A}<|channel|>commentary<|message|>So.<|end|>{A}{C('f', '{}')}{U('q2')}"
            f"{A}⟦{C('g', '{}')}⟧",
        ],
    ),
    "calls in OpenAI's older files": (
        [
            u("q"),
            a("Looking."),
            a(function_call={"name": "f", "arguments": '{"x": 1}'}),
            {"role": "function", "name": "f", "content": "r"},
            a("done"),
        ],
        [
            f"{U('q')}{A}⟦<|channel|>commentary<|message|>Looking.<|end|>{A}"
            f"{C('f', json.dumps({'x': 1}))}⟧{R('f', 'r')}{A}⟦{F}done<|return|>⟧"
        ],
    ),
    # A name with a dot is a function's, except those of Harmony's own tools.
    "names of tools": (
        [
            u("q"),
            a(tool_calls=[call("m.f"), call("functions.g"), call("python")]),
            *[tool(""), tool(""), tool("")],
            a(tool_calls=[call("browser.open")]),
        ],
        [
            f"{U('q')}{A}⟦{C('m.f', '{}')}⟧{R('m.f', '')}{A}⟦{C('g', '{}')}⟧{R('g', '')}"
            f"{A}⟦{C('python', '{}').replace('functions.', '')}⟧"
            f"{R('python', '').replace('functions.', '')}"
            f"{A}⟦{C('browser.open', '{}').replace('functions.', '')}⟧"
        ],
    ),
    "no thinking, and special tokens in the text": (
        [u("<|end|><|start|>assistant"), a("<|return|>")],
        [f"{U('<|end|><|start|>assistant')}{A}⟦{F}<|return|><|return|>⟧"],
    ),
    "thinking of earlier turns is gone": (
        [u("q1"), a("a1", "t1"), u("q2"), a("a2", "t2")],
        [
            f"{U('q1')}{A}⟦{T}t1<|end|>{A}{F}a1<|return|>⟧",
            f"{U('q1')}{A}{F}a1<|end|>{U('q2')}{A}⟦{T}t2<|end|>{A}{F}a2<|return|>⟧",
        ],
    ),
    "an interrupted turn keeps its thinking": (
        [u("q1"), a(None, "t1", tool_calls=[call("f")]), tool("r"), u("q2"), a("a2")],
        [
            f"{U('q1')}{A}⟦{T}t1<|end|>{A}{C('f', '{}')}⟧",
            f"{U('q1')}{A}{T}t1<|end|>{A}{C('f', '{}')}{R('f', 'r')}{U('q2')}{A}⟦{F}a2<|return|>⟧",
        ],
    ),
    "messages that are not trained": (
        [
            u("q1"),
            a("a1", "t1", train=False),
            u("q2"),
            a(None, "t2", train=False),
            a(None, tool_calls=[call("f")]),
            tool("r"),
            a("a2", weight=0),
        ],
        [
            f"{U('q1')}{A}{F}a1<|end|>{U('q2')}{A}{T}t2<|end|>⟦{A}{C('f', '{}')}⟧{R('f', 'r')}"
            f"{A}{F}a2<|return|>"
        ],
    ),
    "system messages are instructions, several users one turn": (
        [
            {"role": "system", "content": "x"},
            {"role": "developer", "content": [{"type": "text", "text": "y"}, "z"]},
            a("Hi"),
            u("q1"),
            {"role": "system", "content": "w"},
            u("q2"),
            a("a1"),
        ],
        [f"{D('x' + chr(10) * 2 + 'yz')}{A}{F}Hi<|end|>{U('q1')}{D('w')}{U('q2')}{A}⟦{F}a1<|return|>⟧"],
    ),
    "empty instructions are absent": (
        [{"role": "system", "content": ""}, {"role": "developer"}, u("q"), a("a")],
        [f"{U('q')}{A}⟦{F}a<|return|>⟧"],
    ),
    "results whose names have another prefix": (
        [u("q"), a(tool_calls=[call("functions.f"), call("g")])]
        + [tool("r2", name="functions.g"), tool("r1", name="f"), a("done")],
        [f"{U('q')}{A}⟦{C('f', '{}')}⟧{R('f', 'r1')}{A}⟦{C('g', '{}')}⟧{R('g', 'r2')}{A}⟦{F}done<|return|>⟧"],
    ),
    "None, empty lists and empty thinking are absent": (
        [
            {"role": "user", "content": "q", "tool_calls": None, "thinking": None, "name": None},
            {"role": "assistant", "content": "a", "tool_calls": [], "thinking": "", "reasoning": None},
        ],
        [f"{U('q')}{A}⟦{F}a<|return|>⟧"],
    ),
}


@pytest.mark.parametrize("name", TURNS)
def test_turns(name):
    messages, expected = TURNS[name]
    assert shown({"messages": messages, "tools": None}) == expected


def test_what_is_trained_on():
    row = {"messages": [u("q"), a("a", "t")]}
    assert shown(row, "final") == [f"{U('q')}{A}{T}t<|end|>⟦{A}{F}a<|return|>⟧"]
    (example,) = examples_of(SMALL, row, "all")
    assert example.weights.tolist() == [0] + [1] * (len(example.tokens) - 1)
    row["messages"][0]["train"] = False
    assert shown(row, "all")[0].endswith(f"⟧{U('q')}⟦{A}{T}t<|end|>{A}{F}a<|return|>⟧")
    assert shown({"messages": [a("Hi"), u("q"), a("a", train=False)]}) == []
    calls = {"messages": [u("q"), a(None, tool_calls=[call("f")])]}
    assert shown(calls, "final") == []


def test_names_that_tools_declare_are_functions():
    declared = [{"name": name} for name in ("spotify.play", "python", "browser.open")]
    calls = [call(one["name"]) for one in declared]
    row = {"messages": [u("q"), a(tool_calls=calls), *[tool("")] * 3, a("a")], "tools": declared}
    for name in ("spotify.play", "python", "browser.open"):
        assert f"{A}⟦{C(name, '{}')}⟧{R(name, '')}" in shown(row)[0]


def test_nulls_inside_arguments_and_schemas_are_kept():
    schema = {"type": "object", "properties": {"x": {"type": "string", "default": None}}}
    messages = [u("q"), a(tool_calls=[call("f", {"limit": None, "a": {"b": None}}, id=None)])]
    (text,) = shown({"messages": messages, "tools": [{"name": "f", "parameters": schema}]})
    assert C("f", '{"limit": null, "a": {"b": null}}') in text
    assert "type f = (_: {\nx?: string, // default: null\n}) => any;" in text


def test_fields_of_a_row():
    messages = [u("q"), a("a")]
    row = {"messages": messages, "reasoning_effort": "high", "date": "2026-01-31"}
    about = system("high", "2026-01-31", has_functions=True).text
    tools = "<|start|>developer<|message|># Tools\n\n## functions\n\nnamespace functions {\n\n"
    declared = "type f = (_: {\n}) => any;\n\n} // namespace functions<|end|>"
    none = FUNCTION["function"] | {"description": None}
    for given in ([FUNCTION], [none], json.dumps([FUNCTION]), json.dumps([none])):
        (text,) = shown(row | {"tools": given})
        assert text.startswith(f"<|start|>system<|message|>{about}<|end|>{tools}{declared}")
    for given in ("", " ", "[]", "null", []):
        assert shown({"messages": messages, "tools": given}) == [f"{U('q')}{A}⟦{F}a<|return|>⟧"]
    (text,) = shown({"messages": messages, "chat_template_kwargs": {"reasoning_effort": "low"}})
    assert "\n\nReasoning: low\n\n" in text
    message = harmony_messages(read_conversation({"messages": messages}), "low")[0].message
    assert message == system("low") and isinstance(message, Message)
    assert harmony_messages(read_conversation({"messages": messages}))[1].message == user("q")


FORMATS = {
    "prompt": ({"prompt": "q", "completion": "a"}, "pairs (prompt, completion)"),
    "question": ({"question": "q", "answer": "a", "system": "s"}, "pairs (question, answer)"),
    "alpaca": ({"instruction": "q", "input": "", "output": "a"}, "Alpaca (instruction, input, output)"),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        "ShareGPT (conversations)",
    ),
    "conversations": ({"conversations": [u("q"), a("a")]}, "ShareGPT (conversations)"),
    "messages": ({"messages": [u("q"), a("a")]}, "messages"),
    "lists": ({"prompt": [u("q")], "completion": [a("a")]}, "pairs (prompt, completion)"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name):
    row, described = FORMATS[name]
    assert read_conversation(row).format == described
    instructions = D("s") if "system" in row else ""
    assert shown(row) == [f"{instructions}{U('q')}{A}⟦{F}a<|return|>⟧"]
    row = row | {"rejected": "b"}
    assert shown(row) == [f"{instructions}{U('q')}{A}⟦{F}a<|return|>⟧"]


def test_more_of_the_formats():
    row = {"instruction": "q2", "input": "i", "output": "a2", "history": [["q1", "a1"]], "thinking": "t"}
    assert shown(row) == [
        f"{U('q1')}{A}⟦{F}a1<|return|>⟧",
        f"{U('q1')}{A}{F}a1<|end|>{U('q2' + chr(10) * 2 + 'i')}{A}⟦{T}t<|end|>{A}{F}a2<|return|>⟧",
    ]
    # Of a prompt of messages only the completion is trained on.
    row = {"prompt": [u("q1"), a("a1"), u("q2")], "completion": [a("a2")]}
    assert shown(row) == [f"{U('q1')}{A}{F}a1<|end|>{U('q2')}{A}⟦{F}a2<|return|>⟧"]
    row = {
        "conversations": [
            {"from": "system", "value": "s"},
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
            {"from": "observation", "value": "r"},
            {"from": "gpt", "value": "a"},
        ]
    }
    assert shown(row) == [f"{D('s')}{U('q')}{A}⟦{C('f', '{}')}⟧{R('f', 'r')}{A}⟦{F}a<|return|>⟧"]


BAD_ROWS = [
    ({"text": "x"}, "unknown format", "its fields are text: must be messages, conversations, prompt and"),
    ({"messages": "x"}, "bad messages", "messages is a str: must be a list"),
    ({"messages": []}, "no messages", "has no messages"),
    ([u("q"), {"role": "wizard"}], "unknown role", r"messages\[1\].role is 'wizard': must be system, dev"),
    ([u("q"), {"content": "a"}], "unknown role", r"messages\[1\].role is missing: must be system"),
    ([u("q"), {"role": "x" * 99}], "unknown role", r"role is 'x{77}…': must be sys"),
    ([u("q"), "a"], "bad messages", r"messages\[1\] is a str: must be an object with role and content"),
    ([None], "bad messages", r"messages\[0\] is null: must be an object"),
    (
        {"messages": None, "id": 3},
        "unknown format",
        r"its fields are messages \(null\), id: must be messages",
    ),
    ({}, "unknown format", "it has no fields: must be messages"),
    ([a("a")], "no user", "has no user message"),
    ([u("q"), a("a"), u("r")], "no answer", "the last message is from the user: must be from the assistant"),
    ([u("q"), a(None, "t")], "no answer", r"messages\[1\], the last of its turn, has thinking but no answer"),
    ([u("q"), a(None, "t"), u("r"), a("a")], "no answer", r"messages\[1\], the last of its turn, has"),
    ([u("q"), a(None)], "empty message", r"messages\[1\] has neither content nor thinking nor tool_calls"),
    ([u(""), a("a")], "empty message", r"messages\[0\].content is missing"),
    ([u([]), a("a")], "empty message", r"messages\[0\].content is missing"),
    ([u(3), a("a")], "bad content", r"messages\[0\].content is an int: must be text"),
    ([u("\ud83d"), a("a")], "bad content", r"holds '\\ud83d', half of a surrogate pair"),
    ([u([{"type": "image_url"}]), a("a")], "bad content", "has a part of type 'image_url': must be text"),
    ([u("q"), a("a"), a("b")], "two answers", r"messages\[2\] follows the answer in messages\[1\]"),
    ([u("q"), tool("r"), a("a")], "result without a call", r"messages\[1\] is a tool result without"),
    ([u("q"), a("a"), tool("r"), a("b")], "result without a call", r"messages\[2\] is a tool result"),
    (
        [u("q"), a(tool_calls=[call("f", id="1")]), tool("r", tool_call_id="2"), a("b")],
        "result without a call",
        r"messages\[2\] is a tool result without a call with the id '2'",
    ),
    (
        [u("q"), a(tool_calls=[call("f")]), tool("r", name="g"), a("b")],
        "result without a call",
        r"messages\[2\] is a tool result without a call to 'g'",
    ),
    ([u("q"), a(tool_calls=[call("f")]), a("b")], "call without a result", r"messages\[1\]: no result for f"),
    (
        [u("q"), a(tool_calls=[call("f"), call("g")]), tool("r"), a("b")],
        "call without a result",
        r"messages\[1\]: no result for g",
    ),
    ([u("q"), a(tool_calls=[call("f x")])], "bad tool call", r"s\[0\].function.name is 'f x': must have 1"),
    (
        [u("q"), a(tool_calls=[call("f"), None])],
        "bad tool call",
        r"messages\[1\].tool_calls\[1\] is null: must be a call with the name and arguments of a function",
    ),
    ([u("q"), a(tool_calls="abc")], "bad tool call", r"messages\[1\].tool_calls is 'abc': must be a list of"),
    (
        [u("q"), a(tool_calls=[{"id": "1"}])],
        "bad tool call",
        r"messages\[1\].tool_calls\[0\] has no function name",
    ),
    ([u("q"), a(function_call={})], "empty message", r"messages\[1\] has neither content nor thinking nor"),
    (
        [u("q"), a(function_call={"x": 1})],
        "bad tool call",
        r"messages\[1\].function_call has no function name",
    ),
    (
        [u("q"), a("a", tool_call=call("f"))],
        "bad tool call",
        r"messages\[1\] has calls in tool_call: must",
    ),
    (
        [u("q"), a(tool_calls=[call("f")], function_call={"name": "f"})],
        "bad tool call",
        "has calls in tool_calls and function_call: must be tool_calls or function_call",
    ),
    (
        [u("q"), a(tool_calls=[call("f", "{")])],
        "bad tool call",
        r"\[0\].function.arguments is '{': must be a JSON",
    ),
    ([u("q"), a(tool_calls=[call("f", '"{}"')])], "bad tool call", "must be a JSON object, or its text"),
    (
        {"instruction": "q", "output": "a", "history": [["q1"]]},
        "bad messages",
        "history must have pairs of a question and its answer",
    ),
    ([u("q"), a("a", train="no")], "bad train flag", r"messages\[1\].train is 'no': must be true or false"),
    ([u("q"), a("a", weight=0.5)], "bad train flag", r"messages\[1\].weight is 0.5: must be 0 or 1"),
    ([u("q"), a("a", "t", reasoning="s")], "bad thinking", "thinking and reasoning differ"),
    (
        {"messages": [u("q"), a("a")], "reasoning_effort": "max"},
        "bad reasoning_effort",
        "reasoning_effort is 'max': must be low, medium, high",
    ),
    (
        {"messages": [u("q"), a("a")], "date": "today"},
        "bad date",
        "date is 'today': must be a date, YYYY-MM-DD",
    ),
    (
        {"messages": [u("q"), a("a")], "date": "2025-13-45"},
        "bad date",
        "date is '2025-13-45': must be a date",
    ),
    ({"messages": [u("q"), a("a")], "date": "20250131"}, "bad date", "date is '20250131': must be a date"),
    ({"messages": [u("q"), a("a")], "tools": "["}, "bad tools", "tools: not JSON"),
    (
        {"messages": [u("q"), a("a")], "tools": [{"name": "f", "description": "\ud83d"}]},
        "bad content",
        r"tools holds '\\ud83d', half of a surrogate pair",
    ),
    ({"messages": [u("q"), a("a")], "tools": [{}]}, "bad tools", r"tools\[0\] must be a function"),
    ({"instruction": 3, "output": "a"}, "bad content", "instruction is an int: must be text"),
    ({"instruction": "", "output": "a"}, "empty message", "^instruction is missing"),
    (
        {"instruction": "q", "output": "a", "history": [["b", "c"], ["d", None]]},
        "empty message",
        r"^history\[1\]\[1\] is missing",
    ),
    ({"prompt": 3, "completion": "a"}, "bad content", r"^prompt is an int: must be text"),
    ({"prompt": "q", "completion": 5, "system": "s"}, "bad content", r"^completion is an int: must be text"),
    ({"prompt": [u(3)], "completion": "a"}, "bad content", r"^prompt\[0\].content is an int: must be text"),
    ({"question": "q", "answer": "a", "thinking": 5}, "bad content", "^thinking is an int: must be text"),
    (
        {"conversations": [{"from": "martian", "value": "q"}]},
        "unknown role",
        r"conversations\[0\].from is 'martian': must be system, human, gpt, function_call or observation",
    ),
    (
        {"conversations": [{"from": "human", "value": 5}, {"from": "gpt", "value": "a"}], "system": "s"},
        "bad content",
        r"conversations\[0\].value is an int: must be text",
    ),
    (
        {"conversations": [{"value": "q"}]},
        "bad messages",
        r"conversations\[0\] has no from: must be an object",
    ),
    (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt"}]},
        "empty message",
        r"conversations\[1\] has neither value nor thinking",
    ),
    (
        {"conversations": [{"from": "function_call", "value": "5"}]},
        "bad tool call",
        r"conversations\[0\].value is '5': must be the JSON of a call",
    ),
    (
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": '[{"x": 1}]'},
            ]
        },
        "bad tool call",
        r"conversations\[1\].value\[0\] has no function name",
    ),
    (
        {"conversations": [{"from": "function_call", "value": "f"}]},
        "bad tool call",
        r"conversations\[0\].value: not JSON",
    ),
]


@pytest.mark.parametrize(("row", "kind", "reason"), BAD_ROWS, ids=lambda value: str(value)[:40])
def test_rows_that_cannot_be_used(row, kind, reason):
    row = {"messages": row} if isinstance(row, list) else row
    with pytest.raises(RowError, match=reason) as caught:
        harmony_messages(read_conversation(row))
    assert caught.value.kind == kind and "\n" not in str(caught.value)


def rows_of(path):
    return [
        (prefix + str(number), row if isinstance(row, dict) else f"{row.kind}: {row}")
        for prefix, number, row in open_chat(f"chat:{path}").rows()
    ]


def test_files(tmp_path):
    row = FORMATS["messages"][0]
    lines = tmp_path / "a.jsonl"
    lines.write_bytes(
        b"\xef\xbb\xbf" + json.dumps(row).encode() + b'\n\n{"a": \n[1]\n\xff\n{}\n[' + b"1" * 4400 + b"]"
    )
    assert rows_of(lines) == [
        (f"{lines}:1", row),
        (f"{lines}:3", "invalid JSON: not JSON (Expecting value: line 1 column 7 (char 6))"),
        (f"{lines}:4", "invalid JSON: must be a JSON object"),
        (f"{lines}:5", "invalid JSON: not UTF-8 at byte 0 (invalid start byte)"),
        (f"{lines}:6", {}),
        (f"{lines}:7", "invalid JSON: has an integer of too many digits"),
    ]
    array = tmp_path / "a.json"
    array.write_text(json.dumps([row, 3], indent=2))
    assert rows_of(array) == [
        (f"{array} item 0", row),
        (f"{array} item 1", "invalid JSON: must be an object"),
    ]
    array.write_text("[{")
    with pytest.raises(ValueError, match=f"{re.escape(str(array))}: not JSON"):
        rows_of(array)
    with pytest.raises(ValueError, match="no file matches"):
        open_chat(f"chat:{tmp_path}/none")
    with pytest.raises(ValueError, match="must be chat:GLOB"):
        open_chat("chat:")


def test_parquet(tmp_path):
    # Arrow gives all objects of a column the same fields, None where a row has none.
    function = {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}
    rows = [
        {"messages": [u("q"), a("a", "t")], "tools": []},
        {"messages": [u("q"), a(tool_calls=[call("f", {"x": 1}, id="1")])], "tools": [function]},
        {"messages": [u("q"), a(tool_calls=[call("f", {"y": 2}, id="2")])], "tools": None},
    ]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[1:2] + rows), path)
    (where, _), *found = rows_of(path)
    assert where == f"{path} row 0"
    assert [shown(row) for _, row in found[::2]] == [
        [f"{U('q')}{A}⟦{T}t<|end|>{A}{F}a<|return|>⟧"],
        [f"{U('q')}{A}⟦{C('f', json.dumps({'y': 2}))}⟧"],
    ]
    assert shown(found[1][1])[0].endswith(f"{A}⟦{C('f', json.dumps({'x': 1}))}⟧")


def test_questions_on_the_standard_library():
    first, again = (list(open_chat("stdlib-chat").rows()) for _ in range(2))
    assert first == again and len(first) > 5000
    assert [number for _, number, _ in first] == list(range(len(first)))
    rows = [row for _, _, row in first]
    assert len({row["question"] for row in rows}) == len(rows)
    assert max(len(row["question"]) + len(row["answer"]) for row in rows) < 400
    known = {row["question"]: row["answer"] for row in rows}
    signatures = [answer for question, answer in known.items() if "`textwrap.dedent`" in question]
    assert "`def dedent(text)`" in signatures
    assert shown(rows[0])[0].endswith(f"⟦{F}{rows[0]['answer']}<|return|>⟧")
