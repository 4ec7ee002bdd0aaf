"""JSON schemas as llguidance enforces them, so that what it allows is valid."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from gptoss_jax.server.readable_schema import find_reference

# The formats that llguidance knows. Others are annotations, as JSON Schema has them by default.
FORMATS = (
    "date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "unknown",
)  # fmt: skip
# Without \u a key cannot be spelled in two ways, and so not twice. Without a limit of white space a model may
# write nothing else. (https://github.com/guidance-ai/llguidance/blob/main/docs/json_schema.md)
OPTIONS = {"whitespace_pattern": r"[ \n\r\t]{1,64}", "json_allowed_escapes": '"\\bfnrt'}
# Keywords whose value is a schema, a list of schemas, or schemas by name.
ONE = ("items", "additionalItems", "additionalProperties", "not", "if", "then", "else", "contains")
LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")

Schema = Mapping[str, Any]


def enforced_schema(schema: Schema) -> str:
    """Returns a schema for `%json` in a Lark grammar. Raises ValueError for one that cannot be enforced."""

    def convert(one: Schema) -> Schema:
        if isinstance(one.get("format"), str) and one["format"] not in FORMATS:
            one = {key: value for key, value in one.items() if key != "format"}
        variants = one.get("oneOf")
        if isinstance(variants, list) and "anyOf" not in one and _has_discriminator(variants, schema):
            one = {**{key: value for key, value in one.items() if key != "oneOf"}, "anyOf": variants}
        least, required = one.get("minProperties"), one.get("required")
        num_required = len(set(map(str, required))) if isinstance(required, list) else 0
        if isinstance(least, (int, float)) and least > max(1, num_required):
            # A repeated key would count twice.
            raise ValueError("minProperties above 1 needs as many required properties")
        return one

    return json.dumps({**_map_schemas(schema, convert), "x-guidance": OPTIONS})


def reason_of(error: ValueError) -> str:
    """Returns why llguidance refuses a schema, for the client."""
    reason = str(error).rpartition("failed to compile JSON schema: ")[2]
    if "coerce_one_of" in reason:
        return "oneOf is not supported for variants that overlap; use anyOf"
    return reason.replace("Unimplemented keys", "not supported")


def _map_schemas(schema: Any, convert: Callable[[Schema], Schema]) -> Any:
    """Converts a schema and those inside of it."""
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
    """Returns True if a property that all variants require has other values in each of them."""
    found = _required_strings(variants[0], root) if variants else {}  # what earlier variants have
    for variant in variants[1:]:
        values = _required_strings(variant, root)
        names = [name for name in found if name in values and found[name].isdisjoint(values[name])]
        if not names:  # soon, if many variants refer to one large enum
            return False
        found = {name: found[name] | values[name] for name in names}
    return bool(found)


def _required_strings(schema: Any, root: Schema) -> dict[str, set[str]]:
    """Returns the values of the required properties that are constants or enums of strings, by name."""
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
