"""Tools of requests, and schemas in the form that Harmony can show."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_jax.data.harmony_tools import tools_section
from gptoss_jax.server.errors import ApiError
from gptoss_jax.server.fields import Fields
from gptoss_jax.server.readable_schema import MAX_NODES, MAX_REFERRED, readable_schema
from gptoss_jax.server.tools import Tools, read_tools

F = {"name": "f", "description": "Does f."}
G = {"name": "g", "parameters": {"type": "object"}, "strict": True}
ONLY_F = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]}
CHOOSE_H = {"type": "function", "function": {"name": "h"}}
CHAT = [{"type": "function", "function": F}, {"type": "function", "function": G}]
FLAT = [{"type": "function", **F}, {"type": "function", **G}]


@pytest.mark.parametrize("tools", [CHAT, FLAT])
def test_both_forms_of_tools_are_read(tools):
    found = read_tools(Fields({"tools": tools}))
    assert [(one.name, one.description, one.strict) for one in found.functions] == [
        ("f", "Does f.", False),
        ("g", None, True),
    ]
    assert (found.mode, found.allowed, found.names) == ("auto", found.functions, {"f", "g"})
    assert found.declarations() == [F, {"name": "g", "parameters": {"type": "object"}}]


@pytest.mark.parametrize(
    ("choice", "mode", "allowed"),
    [
        ("auto", "auto", ["f", "g"]),
        ("required", "required", ["f", "g"]),
        ({"type": "function", "function": {"name": "g"}}, "required", ["g"]),
        ({"type": "function", "name": "g"}, "required", ["g"]),
        (ONLY_F, "auto", ["f"]),
    ],
)
def test_tool_choice_limits_what_may_be_called(choice, mode, allowed):
    found = read_tools(Fields({"tools": CHAT, "tool_choice": choice}))
    assert (found.mode, [one.name for one in found.allowed]) == (mode, allowed)
    assert found.names == {"f", "g"}


def test_no_function_is_declared_if_none_may_be_called():
    assert read_tools(Fields({"tools": CHAT, "tool_choice": "none"})) == Tools(mode="none")
    assert read_tools(Fields({})) == Tools()


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
        ({"tools": [{"type": "function", "name": "a", "parameters": []}]}, "tools[0].parameters"),
        ({"tools": [*CHAT, CHAT[0]]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": CHAT, "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": CHAT, "tool_choice": 3}, "tool_choice"),
        ({"tools": CHAT, "tool_choice": CHOOSE_H}, "tool_choice.function.name"),
        ({"tools": CHAT, "tool_choice": {"type": "allowed_tools", "tools": []}}, "tool_choice.tools"),
    ],
)  # fmt: skip
def test_faults_name_the_field(body, param):
    with pytest.raises(ApiError) as caught:
        read_tools(Fields(body))
    assert (caught.value.status, caught.value.param) == (400, param)


REFERENCE = {"$ref": "#/$defs/A"}
NODE = {"type": "object", "description": "A node.", "properties": {"next": {"$ref": "#/$defs/Node"}}}


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"$ref": "#/$defs/A", "$defs": {"A": {"enum": ["x", "y"]}}}, {"type": "string", "enum": ["x", "y"]}),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None, "title": "T"},
         {"type": ["integer", "null"], "title": "T"}),
        ({"anyOf": [{"type": "string", "enum": ["a"]}, {"type": "null"}]},
         {"type": "string", "enum": ["a"], "nullable": True}),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}, {"type": "null"}]},
         {"oneOf": [{"type": "integer"}, {"type": "string", "nullable": True}]}),
        ({"const": "a"}, {"type": "string", "enum": ["a"]}),
        ({"const": 3, "description": "Version."}, {"type": "integer", "description": "Version. Always 3."}),
        ({"enum": [1, True, None]}, {"type": ["integer", "boolean"], "nullable": True,
                                     "description": "One of 1, true, null."}),
        ({"type": ["string", "null"], "enum": ["a", None]},
         {"type": "string", "enum": ["a"], "nullable": True}),
        ({"type": ["object", "null"], "properties": {}},
         {"type": "object", "properties": {}, "nullable": True}),
        ({"allOf": [{"$ref": "#/$defs/A"}, {"properties": {"b": {}}, "required": ["b"]}], "description": "D",
          "$defs": {"A": {"type": "object", "properties": {"a": {}}, "required": ["a"]}}},
         {"type": "object", "properties": {"a": {}, "b": {}}, "required": ["a", "b"], "description": "D"}),
        ({"type": "object", "properties": {"a": {}}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
         {"type": "object", "properties": {"a": {}}}),
        ({**NODE, "$defs": {"Node": NODE}},
         {**NODE, "properties": {"next": {**NODE, "properties": {"next": {"description": "A node."}}}}}),
        ({"$ref": "#/no/where", "description": "D"}, {"description": "D"}),
        ({"properties": {"a": True}, "items": {"const": "a/b"}},
         {"type": "object", "properties": {"a": {}}, "items": {"type": "string", "enum": ["a/b"]}}),
    ],
)  # fmt: skip
def test_schemas_become_readable(schema, expected):
    found = readable_schema(schema)
    found.pop("$defs", None)
    assert found == expected
    again = readable_schema(found)
    assert again == found


def test_a_pydantic_schema_is_shown_with_its_types():
    schema = {
        "$defs": {"Unit": {"enum": ["c", "f"], "type": "string"}},
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "unit": {"anyOf": [{"$ref": "#/$defs/Unit"}, {"type": "null"}], "default": None},
            "day": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
        },
        "required": ["city"],
    }
    text = tools_section([{"name": "weather", "parameters": readable_schema(schema)}])
    assert text.splitlines()[6:15] == [
        "type weather = (_: {",
        "city: string,",
        'unit?: "c" | "f" | null,',
        "day?:",
        " | number",
        " | string",
        ",",
        "}) => any;",
        "",
    ]


def test_references_that_double_are_bounded():
    doubling = {
        f"d{i}": {"type": "object", "properties": dict.fromkeys("ab", {"$ref": f"#/$defs/d{i + 1}"})}
        for i in range(60)
    }
    written = tools_section(
        [{"name": "f", "parameters": readable_schema({"$ref": "#/$defs/d0", "$defs": doubling})}]
    )
    assert written.count("\n") < 8 * MAX_NODES


@pytest.mark.parametrize(
    ("target", "schema"),
    [
        ({"description": "d" * 10_000}, {"properties": {f"p{i}": REFERENCE for i in range(1000)}}),
        ({"enum": ["a"] * 10_000}, {"properties": {f"p{i}": REFERENCE for i in range(1000)}}),
        ({"required": ["a"] * 10_000}, {"allOf": [REFERENCE] * 1000}),
    ],
)
def test_what_is_referred_to_many_times_is_bounded(target, schema):
    shown = readable_schema({**schema, "type": "object", "$defs": {"A": target}})
    assert len(json.dumps({**shown, "$defs": {}})) < 2 * MAX_REFERRED


KEYWORDS = [
    "type",
    "enum",
    "const",
    "anyOf",
    "oneOf",
    "allOf",
    "$ref",
    "properties",
    "items",
    "required",
    "default",
]
VALUES = (
    st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from(["object", "null", "#", "#/items", "a"])
)
ANY_SCHEMAS = st.recursive(
    VALUES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYWORDS), inner, max_size=4),
    max_leaves=20,
)


@settings(deadline=None, max_examples=100)
@given(schema=st.dictionaries(st.sampled_from(KEYWORDS), ANY_SCHEMAS, max_size=4))
def test_any_schema_can_be_shown(schema):
    assert tools_section([{"name": "f", "parameters": readable_schema(schema)}])
