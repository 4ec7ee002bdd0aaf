"""Converts JSON schemas to ones that llguidance can enforce, so that all output it allows is valid."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from gptoss_jax.server.readable_schema import find_reference

# The formats that llguidance supports. Others are ignored: JSON Schema treats them as annotations by default.
FORMATS = (
    "date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "unknown",
)  # fmt: skip
# \u escapes are disabled because they would allow the same key twice, in two spellings. Whitespace is limited
# to a space, or a line break and its indentation, because a model might emit it forever.
# (https://github.com/guidance-ai/llguidance/blob/main/docs/json_schema.md)
OPTIONS = {"whitespace_pattern": r"[ ]|\r?\n[ \t]{0,32}", "json_allowed_escapes": '"\\bfnrt'}
# Keywords with a schema, a list of schemas, or a mapping of names to schemas as their value.
ONE = ("items", "additionalItems", "additionalProperties", "not", "if", "then", "else", "contains")
LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")

Schema = Mapping[str, Any]


def enforced_schema(schema: Schema) -> str:
    """Returns a schema as JSON for `%json` in a Lark grammar; raises ValueError if it cannot be enforced."""

    def convert(one: Schema) -> Schema:
        if isinstance(one.get("format"), str) and one["format"] not in FORMATS:
            one = {key: value for key, value in one.items() if key != "format"}
        variants = one.get("oneOf")
        if isinstance(variants, list) and "anyOf" not in one and _has_discriminator(variants, schema):
            one = {**{key: value for key, value in one.items() if key != "oneOf"}, "anyOf": variants}
        least, required = one.get("minProperties"), one.get("required")
        num_required = len(set(map(str, required))) if isinstance(required, list) else 0
        if isinstance(least, (int, float)) and least > max(1, num_required):
            # llguidance would count a repeated key twice.
            raise ValueError("minProperties above 1 requires at least as many required properties")
        return one

    return json.dumps({**_map_schemas(schema, convert), "x-guidance": OPTIONS})


def reason_of(error: ValueError) -> str:
    """Converts llguidance's error for a schema to a message for the client."""
    reason = str(error).rpartition("failed to compile JSON schema: ")[2]
    if "coerce_one_of" in reason:
        return "oneOf is not supported for overlapping variants; use anyOf"
    return reason.replace("Unimplemented keys", "not supported")


def _map_schemas(schema: Any, convert: Callable[[Schema], Schema]) -> Any:
    """Applies `convert` to a schema and all nested schemas."""
    if not isinstance(schema, dict):
        return schema
    found = dict(convert(schema))
    for key, value in found.items():
        if key in NAMED and isinstance(value, dict):
            found[key] = {name: _map_schemas(one, convert) for name, one in value.items()}
        elif key in LISTS and isinstance(value, list):
            found[key] = [_map_schemas(one, convert) for one in value]
        elif key in ONE:
            found[key] = _map_schemas(value, convert)
    return found


def _has_discriminator(variants: list[Any], root: Schema) -> bool:
    """Returns True if a property that all variants require has different values in each of them."""
    found = _required_strings(variants[0], root) if variants else {}  # union over earlier variants
    for variant in variants[1:]:
        values = _required_strings(variant, root)
        names = [name for name in found if name in values and found[name].isdisjoint(values[name])]
        if not names:  # return early: many variants may refer to one large enum
            return False
        found = {name: found[name] | values[name] for name in names}
    return bool(found)


def _required_strings(schema: Any, root: Schema) -> dict[str, set[str]]:
    """Returns the possible values of required properties that are string constants or enums, by name."""
    if isinstance(schema, dict) and isinstance(name := schema.get("$ref"), str):
        schema = find_reference(root, name)
    properties = schema.get("properties") if isinstance(schema, dict) else None
    required = schema.get("required") if isinstance(schema, dict) else None
    found: dict[str, set[str]] = {}
    if not isinstance(properties, dict) or not isinstance(required, list):
        return found
    for name in required:
        value = properties.get(name) if isinstance(name, str) else None
        options = [value["const"]] if isinstance(value, dict) and "const" in value else None
        options = value.get("enum") if isinstance(value, dict) and options is None else options
        if isinstance(options, list) and all(isinstance(option, str) for option in options):
            found[name] = set(options)
    return found
