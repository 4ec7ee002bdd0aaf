"""Sections of Harmony's developer message: tools as TypeScript types, and the response format.

For any schema, the tools section equals that of openai-harmony character by character, as the tests verify.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Schema = Mapping[str, Any]


def tools_section(functions: Sequence[Schema]) -> str:
    """Returns the section that declares functions, in the namespace `functions`.

    Args:
      functions: each has `name` and, optionally, `description` and `parameters`, a JSON schema.
    """
    lines = ["# Tools", "", "## functions", "", "namespace functions {", ""]
    for function in functions:
        lines += [f"// {line}" for line in _lines(function.get("description") or "")]
        schema = function.get("parameters")
        arguments = "" if schema is None else f"_: {_type(schema, '')}"
        lines += [f"type {function['name']} = ({arguments}) => any;", ""]
    return "\n".join([*lines, "} // namespace functions"])


def response_formats_section(name: str, schema: Schema, description: str | None = None) -> str:
    """Returns the section that declares the response format, a JSON schema."""
    about = [f"// {line}" for line in _lines(description or "")]
    written = json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
    return "\n".join(["# Response Formats", "", f"## {name}", "", *about, written])


def _lines(text: str) -> list[str]:
    """Splits at LF and CRLF only, without an empty last line."""
    *lines, last = text.split("\n")
    return [line.removesuffix("\r") for line in lines] + ([last] if last else [])


def _type(schema: Any, indent: str) -> str:
    """Returns the TypeScript type of a schema, with properties indented by `indent`."""
    if not isinstance(schema, dict):
        return "any"
    if isinstance(variants := schema.get("oneOf"), list):
        return "".join(
            f"\n{indent} | {_nullable(one, indent + '   ')}"
            + _comment(_text(one, "description"), _default(one, quote_enum=True))
            for one in variants
        )
    kind = schema.get("type")
    names = [name for name in kind if isinstance(name, str)] if isinstance(kind, list) else []
    if names:
        return " | ".join("number" if name == "integer" else name for name in names)
    if kind == "object":
        about = _text(schema, "description")
        lines = [] if about is None else [f"{indent}// {about}"]
        return "\n".join([*lines, "{", *_properties(schema, indent), indent + "}"])
    if kind == "string":
        values = [f'"{value}"' for value in _list(schema, "enum") if isinstance(value, str)]
        return " | ".join(values) or "string"
    if kind == "array":
        return f"{_type(schema['items'], indent)}[]" if "items" in schema else "Array<any>"
    return {"number": "number", "integer": "number", "boolean": "boolean"}.get(
        kind if isinstance(kind, str) else "", "any"
    )


def _properties(schema: Schema, indent: str) -> Iterator[str]:
    """Yields the lines of an object's properties."""
    properties, required = schema.get("properties"), _list(schema, "required")
    for name, value in properties.items() if isinstance(properties, dict) else ():
        value = value if isinstance(value, dict) else {}
        key = f"{indent}{name}" + ("" if name in required else "?")
        about = _text(value, "description")
        if (title := _text(value, "title")) is not None:
            yield from (f"{indent}// {title}", f"{indent}//")
        if about is not None and "oneOf" not in value:
            yield f"{indent}// {about}"
        if _list(value, "examples"):
            yield f"{indent}// Examples:"
            yield from (f'{indent}// - "{one}"' for one in value["examples"] if isinstance(one, str))
        if isinstance(variants := value.get("oneOf"), list):
            yield from _variants(key, value, variants, indent)
        else:
            default = _default(value) if "oneOf" not in value else None
            yield f"{key}: {_nullable(value, indent + '    ')},{_comment(default)}"


def _variants(key: str, value: Schema, variants: list, indent: str) -> Iterator[str]:
    """Yields the lines of a property with `oneOf`."""
    about, default = _text(value, "description"), _default(value)
    is_above = about is not None and not (variants and _text(variants[0], "description") == about)
    if is_above:
        yield f"{indent}// {about}"
    if default is not None:
        yield f"{indent}// {default}"
    yield f"{key}:"
    for index, one in enumerate(variants):
        own = _text(one, "description")
        own = None if own == about or (index == 0 and is_above) else own
        yield f"{indent} | {_nullable(one, indent + '   ')}{_comment(own, _default(one))}"
    yield f"{indent},"


def _nullable(schema: Any, indent: str) -> str:
    written = _type(schema, indent)
    is_nullable = isinstance(schema, dict) and schema.get("nullable") is True
    return f"{written} | null" if is_nullable and "null" not in written else written


def _default(schema: Any, quote_enum: bool = False) -> str | None:
    if not isinstance(schema, dict) or "default" not in schema:
        return None
    value = schema["default"]
    if isinstance(value, str) and not _list(schema, "enum"):
        return f'default: "{value}"'
    if isinstance(value, str) and not quote_enum:
        return f"default: {value}"
    return f"default: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}"


def _comment(*parts: str | None) -> str:
    """Joins the parts to a trailing comment; empty if there are none."""
    known = [part for part in parts if part is not None]
    return f" // {' '.join(known)}" if known else ""


def _text(schema: Any, key: str) -> str | None:
    value = schema.get(key) if isinstance(schema, dict) else None
    return value if isinstance(value, str) else None


def _list(schema: Schema, key: str) -> list:
    value = schema.get(key)
    return value if isinstance(value, list) else []
