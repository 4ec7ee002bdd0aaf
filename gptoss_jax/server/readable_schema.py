"""JSON schemas in the form that Harmony's tool definitions can show.

`data.harmony_tools` writes a schema as openai-harmony does: `$ref`, `anyOf`, `allOf` and `const` become
`any`. Schemas made by pydantic and zod are full of them, so they are first expressed by what it can write.
"""

import json
from collections.abc import Mapping
from typing import Any

# Schemas inside each other; those further inside, and those beyond MAX_NODES, are shown as `any`.
MAX_DEPTH = 24
MAX_NODES = 4096
# Characters of what references point to, counted each time; after them references are shown as `any`.
MAX_REFERRED = 1 << 18
# What variants of `anyOf` and `oneOf` have, but mere conditions on the object around them have not.
SHOWS_TYPE = ("type", "enum", "const", "$ref", "properties", "items", "anyOf", "oneOf", "allOf")
SCALARS = ("string", "number", "integer", "boolean")
NULL = {"type": "null"}

Schema = dict[str, Any]


def readable_schema(schema: Mapping[str, Any]) -> Schema:
    """Returns an equivalent schema, as far as Harmony can express it.

    `$ref` is replaced by its target, a target inside itself by its description. `anyOf` with null becomes
    `nullable` or a list of types, another one `oneOf`; `const` and enums of other than strings become enums
    of strings or are told in the description; `allOf` is merged.
    """
    return _Reader(schema).read(schema, ())


def find_reference(root: Mapping[str, Any], name: str) -> Schema | None:
    """Returns what a reference, such as `#/$defs/Node`, points to; None if there is no such schema."""
    if name != "#" and not name.startswith("#/"):
        return None
    value: Any = root
    for key in name.split("/")[1:]:
        key = key.replace("~1", "/").replace("~0", "~")
        if isinstance(value, list) and key.isdecimal() and len(key) < 6 and int(key) < len(value):
            value = value[int(key)]
        elif isinstance(value, dict) and key in value:
            value = value[key]
        else:
            return None
    return value if isinstance(value, dict) else None


class _Reader:
    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._nodes = self._referred = 0
        self._targets: dict[str, tuple[Schema | None, int]] = {}  # of references, with their sizes

    def read(self, schema: Any, path: tuple[str, ...], depth: int = 0) -> Schema:
        """Converts a schema. `path` are the references that it is inside of."""
        self._nodes += 1
        if not isinstance(schema, dict):
            return {}
        # A null means absent, as in openai-harmony; for `default` and `enum` it says that null is allowed.
        schema = {key: value for key, value in schema.items() if value is not None}
        if depth > MAX_DEPTH or self._nodes > MAX_NODES:
            return _about(schema)
        while isinstance(name := schema.get("$ref"), str):
            siblings = {key: value for key, value in schema.items() if key != "$ref"}
            target = self._target(name)
            if target is None or name in path:
                return _about({**(target or {}), **siblings})
            path = (*path, name)
            schema = {**{key: value for key, value in target.items() if value is not None}, **siblings}
        schema = self._merge_all_of(schema, path, depth)
        schema = self._variants(schema, path, depth)
        schema = _enum(schema)
        schema = _type_list(schema)
        if isinstance(properties := schema.get("properties"), dict):
            schema.setdefault("type", "object")
            schema["properties"] = {
                key: self.read(value, path, depth + 1) for key, value in properties.items()
            }
        if "items" in schema:
            schema.setdefault("type", "array")
            schema["items"] = self.read(schema["items"], path, depth + 1)
        return schema

    def _target(self, name: str) -> Schema | None:
        """Returns what a reference points to; None if there is no such schema or MAX_REFERRED is used up."""
        if name not in self._targets:
            target = find_reference(self._root, name)
            self._targets[name] = target, len(json.dumps(target))
        target, size = self._targets[name]
        self._referred += size
        return target if self._referred <= MAX_REFERRED else None

    def _merge_all_of(self, schema: Schema, path: tuple[str, ...], depth: int) -> Schema:
        """Merges the schemas of `allOf` into the one that has them, whose own keywords win."""
        parts = schema.pop("allOf", None)
        if not isinstance(parts, list):
            return schema
        merged: Schema = {}
        for part in [*(self.read(part, path, depth + 1) for part in parts), schema]:
            properties = [
                one for one in (merged.get("properties"), part.get("properties")) if isinstance(one, dict)
            ]
            required = [
                one for one in (merged.get("required"), part.get("required")) if isinstance(one, list)
            ]
            merged |= part
            if properties:
                merged["properties"] = {key: value for one in properties for key, value in one.items()}
            if required:
                merged["required"] = [name for one in required for name in one]
        return merged

    def _variants(self, schema: Schema, path: tuple[str, ...], depth: int) -> Schema:
        """Replaces `anyOf`, and null in it or in `oneOf`."""
        key = next((key for key in ("anyOf", "oneOf") if isinstance(schema.get(key), list)), None)
        if key is None:
            return schema
        given = schema.pop(key)
        is_shown = "properties" not in schema and all(
            not isinstance(one, dict) or any(name in one for name in SHOWS_TYPE) for one in given
        )
        variants = [self.read(one, path, depth + 1) for one in given if one != NULL]
        if not is_shown or not variants:
            return schema
        is_nullable = len(variants) < len(given)
        if len(variants) == 1:
            return {**(_nullable(variants[0]) if is_nullable else variants[0]), **schema}
        if is_nullable:
            variants[-1] = {**variants[-1], "nullable": True}
        schema.pop("type", None)
        return {**schema, "oneOf": variants}


def _about(schema: Mapping[str, Any]) -> Schema:
    """Returns the title and the description of a schema."""
    return {key: schema[key] for key in ("title", "description") if key in schema}


def _nullable(schema: Schema) -> Schema:
    """Allows null; as a list of types where nothing is lost by it."""
    kind = schema.get("type")
    if kind in SCALARS and "enum" not in schema:
        return {**schema, "type": [kind, "null"]}
    return {**schema, "nullable": True} if kind is not None else schema


def _enum(schema: Schema) -> Schema:
    """Converts `const` and `enum`: strings and null are written as types, other values in the description."""
    if "const" in schema:
        schema["enum"] = [schema.pop("const")]
    values = schema.get("enum")
    if not isinstance(values, list) or not values:
        return schema
    strings = [value for value in values if isinstance(value, str)]
    others = [value for value in values if value is not None and not isinstance(value, str)]
    if None in values:
        schema["nullable"] = True
    if not others:
        kind = schema.get("type")
        is_string = kind in (None, "string") or (isinstance(kind, list) and "string" in kind)
        return {**schema, "type": "string", "enum": strings} if strings and is_string else schema
    del schema["enum"]
    written = ", ".join(json.dumps(value, ensure_ascii=False) for value in values)
    about = schema.get("description")
    options = f"{'One of' if len(values) > 1 else 'Always'} {written}."
    schema["description"] = f"{about} {options}" if isinstance(about, str) and about else options
    kinds = list(dict.fromkeys(_kind(value) for value in strings[:1] + others))
    schema.setdefault("type", kinds[0] if len(kinds) == 1 else kinds)
    return schema


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    named = {str: "string", int: "integer", float: "number", list: "array", dict: "object"}
    return named[type(value)]


def _type_list(schema: Schema) -> Schema:
    """Writes a list of a single type, and null, so that its enum, properties or items are shown."""
    kinds = schema.get("type")
    if not isinstance(kinds, list):
        return schema
    others = [kind for kind in kinds if kind != "null"]
    has_more = any(key in schema for key in ("enum", "properties", "items"))
    if len(others) != 1 or (len(kinds) > 1 and not has_more):
        return schema
    return {**schema, "type": others[0], **({"nullable": True} if len(kinds) > 1 else {})}
