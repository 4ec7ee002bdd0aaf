"""Tools of a request: the declared functions, and which of them the model may or must call.

Accepts the format of chat completions, `{"type": "function", "function": {"name", …}}`, and of responses,
`{"type": "function", "name", …}`.
"""

import collections
import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, Literal

from gptoss_jax.data.harmony import TOOL_NAME
from gptoss_jax.server.errors import bad_request
from gptoss_jax.server.fields import Fields, shown
from gptoss_jax.server.readable_schema import readable_schema

Mode = Literal["none", "auto", "required"]
MODES: tuple[Mode, ...] = ("none", "auto", "required")
NAME_RULE = "must have 1 to 64 letters, digits, _, - and ."
MAX_TOOLS = 1024


@dataclasses.dataclass(frozen=True)
class Function:
    """A function that the client declares. `parameters` is its JSON schema."""

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = None
    # Arguments must follow the schema.
    strict: bool = False
    # Path of the schema in the request, for error messages.
    path: str = "tools"

    def declaration(self) -> dict[str, Any]:
        """Returns the declaration for `data.harmony.developer`."""
        parameters = None if self.parameters is None else readable_schema(self.parameters)
        fields = {"name": self.name, "description": self.description, "parameters": parameters}
        return {key: value for key, value in fields.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class Tools:
    """The functions of a request, and which of them the model may or must call."""

    functions: tuple[Function, ...] = ()
    mode: Mode = "auto"
    # The functions allowed by `tool_choice`.
    allowed: tuple[Function, ...] = ()

    def declarations(self) -> list[dict[str, Any]]:
        """Returns the declarations for `data.harmony.developer`."""
        return [function.declaration() for function in self.functions]

    @property
    def names(self) -> frozenset[str]:
        """The names of the functions."""
        return frozenset(function.name for function in self.functions)


def read_tools(fields: Fields) -> Tools:
    """Parses `tools` and `tool_choice`.

    With `none`, no function is declared. Any other choice does not change the prompt, so that the prefix
    cache applies; it is enforced by the grammar. Raises ApiError for tools that are not functions, and for a
    choice of an undeclared function.
    """
    functions = [_function(tool) for tool in fields.objects("tools") or []]
    fields.require(len(functions) <= MAX_TOOLS, "tools", f"must have at most {MAX_TOOLS:,} tools")
    names = collections.Counter(function.name for function in functions)
    for name, count in names.items():
        if count > 1:
            raise bad_request(f"tools declares the function {name!r} more than once", "tools")
    mode, chosen = _tool_choice(fields, names)
    if mode == "none":
        return Tools(mode="none")
    allowed = functions if chosen is None else [one for one in functions if one.name in chosen]
    return Tools(tuple(functions), mode, tuple(allowed))


def _function(tool: Fields) -> Function:
    kind = tool.text("type", "function")
    tool.require(kind == "function", "type", "must be function, the only supported type of tool")
    given = tool.object("function") or tool
    name = given.needed_text("name")
    given.require(TOOL_NAME.fullmatch(name) is not None, "name", NAME_RULE)
    parameters = given.object("parameters")
    return Function(
        name,
        given.text("description"),
        None if parameters is None else parameters.values,
        given.boolean("strict") or tool.boolean("strict"),
        given.param("parameters"),
    )


def _tool_choice(fields: Fields, names: Collection[str]) -> tuple[Mode, Collection[str] | None]:
    """Returns the mode, and the allowed function names (None: all)."""
    choice = fields.get("tool_choice")
    if choice is None:
        return "auto", None
    if isinstance(choice, str):
        mode = fields.choice("tool_choice", MODES, "auto")
        fields.require(mode != "required" or bool(names), "tool_choice", "needs tools")
        return mode, None
    allowed = f"must be one of {', '.join(MODES)}, or an object that names a function"
    fields.require(isinstance(choice, dict), "tool_choice", allowed)
    given = Fields(choice, "tool_choice")
    kind = given.choice("type", ("function", "allowed_tools"), "function")
    if kind == "function":
        return "required", {_named(given, names)}
    given = given.object("allowed_tools") or given
    mode = given.choice("mode", MODES[1:], "auto")
    chosen = {_named(tool, names) for tool in given.objects("tools") or []}
    given.require(bool(chosen), "tools", "must name at least one of the request's tools")
    return mode, chosen


def _named(choice: Fields, names: Collection[str]) -> str:
    given = choice.object("function") or choice
    name = given.needed_text("name")
    if name not in names:
        raise bad_request(
            f"{given.param('name')} is {shown(name)}: must be declared in tools", given.param("name")
        )
    return name
