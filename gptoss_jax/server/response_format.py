"""Structured output: `response_format` of chat completions, `text.format` of responses."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from gptoss_jax.data.harmony_tools import response_formats_section
from gptoss_jax.server.fields import Fields

ANY_OBJECT = {"type": "object"}


@dataclasses.dataclass(frozen=True)
class ResponseFormat:
    """A JSON schema that the final message must follow."""

    name: str
    schema: Mapping[str, Any]
    description: str | None = None
    # If False, a schema that cannot be enforced is only shown to the model, and any object is allowed.
    strict: bool = True
    # Path of the schema in the request, for error messages.
    path: str = "response_format"

    @property
    def section(self) -> str:
        """The response format section of the developer message."""
        return response_formats_section(self.name, self.schema, self.description)


def read_response_format(given: Fields | None) -> ResponseFormat | None:
    """Parses a response format; returns None for text. Raises ApiError for an invalid one.

    Args:
      given: `{"type": "json_schema", "json_schema": {"name", "schema", …}}`, the same without the inner
        object, `{"type": "json_object"}`, or `{"type": "text"}`; None: text.
    """
    if given is None:
        return None
    given.needed("type")
    kind = given.choice("type", ("text", "json_object", "json_schema"))
    if kind == "text":
        return None
    if kind == "json_object":
        return ResponseFormat("json_object", ANY_OBJECT, path=given.path)
    given = given.object("json_schema") or given
    schema = given.needed_object("schema").values
    name = given.text("name", "response")
    fits = re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name) is not None
    given.require(fits, "name", "must have 1 to 64 letters, digits, _, - and .")
    description, strict = given.text("description"), given.boolean("strict", True)
    return ResponseFormat(name, schema, description, strict, given.param("schema"))
