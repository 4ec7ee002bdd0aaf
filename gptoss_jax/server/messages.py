"""Converts OpenAI chat messages to Harmony messages."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from gptoss_jax.data import harmony
from gptoss_jax.data.harmony import ASSISTANT, DEVELOPER, FUNCTIONS, SYSTEM, TOOL_NAME, USER, Message
from gptoss_jax.server.errors import bad_request
from gptoss_jax.server.fields import Fields, shown
from gptoss_jax.server.tools import NAME_RULE, Tools

TOOL = "tool"
OLD_TOOL = "function"  # deprecated role of results, from before `tool_calls`
ROLES = (SYSTEM, DEVELOPER, USER, ASSISTANT, TOOL, OLD_TOOL)
TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
NO_TOOLS = Tools()
# Fields for the reasoning of an assistant message; the first nonempty one is used.
REASONING = ("reasoning", "reasoning_content", "thinking")


@dataclasses.dataclass(frozen=True)
class Conversation:
    """The leading system and developer texts of a request, and the messages after them."""

    instructions: str | None
    messages: list[Message]

    def with_system(
        self,
        effort: harmony.Reasoning,
        date: str | None,
        tools: Tools = NO_TOOLS,
        response_format: str | None = None,
    ) -> list[Message]:
        """Returns all messages, preceded by the system and developer messages.

        Args:
          effort: reasoning effort.
          date: current date as YYYY-MM-DD; None omits it.
          tools: functions to declare in the developer message.
          response_format: section for the developer message, from `ResponseFormat.section`.
        """
        functions = tools.declarations()
        found = [harmony.system(effort, date, has_functions=bool(functions))]
        if self.instructions is not None or functions or response_format is not None:
            found.append(harmony.developer(self.instructions, functions, response_format))
        return found + self.messages


def read_messages(fields: Fields, name: str = "messages") -> Conversation:
    """Converts a list of chat messages.

    Leading system and developer texts become one developer message, later ones a message each, in place.
    Content beside tool calls becomes commentary. Each call is followed directly by its result, matched by
    `tool_call_id`, if there is one. Raises ApiError with the path of the invalid field.
    """
    fields.needed(name)
    given = fields.objects(name) or []
    fields.require(bool(given), name, "must contain at least one message")
    for message in given:
        message.needed("role")
        message.choice("role", ROLES)
    first = next((i for i, message in enumerate(given) if not _instructs(message)), len(given))
    instructions = [text for message in given[:first] if (text := read_text(message))]
    reader = _Reader(given)
    found = [one for i in range(first, len(given)) for one in reader.read(i, given[i])]
    return Conversation("\n\n".join(instructions) or None, found)


def _instructs(message: Fields) -> bool:
    return message.get("role") in (SYSTEM, DEVELOPER)


class _Reader:
    """Converts messages in order; keeps track of calls, and of results already placed after their calls."""

    def __init__(self, messages: Sequence[Fields]) -> None:
        self._messages = messages
        self._tools: dict[str | None, str] = {}  # tool of each call, by id
        self._read: set[int] = set()  # indices of results already placed

    def read(self, i: int, message: Fields) -> list[Message]:
        role = message.get("role")
        if role == ASSISTANT:
            return self._answer(i, message)
        if role in (TOOL, OLD_TOOL):
            return [] if i in self._read else [_result(self._tool(message), message)]
        text = read_text(message)
        if role == USER:
            return [harmony.user(text)]
        return [harmony.developer(text)] if text else []

    def _answer(self, i: int, message: Fields) -> list[Message]:
        calls = _calls(message)
        found = []
        if thinking := next((text for name in REASONING if (text := message.text(name))), None):
            found.append(Message(ASSISTANT, thinking, "analysis"))
        # A truncated response has no content, and clients may drop its reasoning.
        if text := read_text(message, is_required=False) or message.text("refusal"):
            found.append(Message(ASSISTANT, text, "commentary" if calls else "final"))
        results = self._results(i) if calls else {}
        for identity, tool, arguments in calls:
            self._tools[identity] = tool
            found.append(harmony.call(tool, arguments))
            for k in results.pop(identity, ()):
                self._read.add(k)
                found.append(_result(tool, self._messages[k]))
        return found

    def _results(self, i: int) -> dict[str | None, list[int]]:
        """Returns the indices of the results between this assistant message and the next, by call id."""
        found: dict[str | None, list[int]] = {}
        for k in range(i + 1, len(self._messages)):
            message = self._messages[k]
            if message.get("role") == ASSISTANT:
                break
            if message.get("role") in (TOOL, OLD_TOOL):
                found.setdefault(_result_id(message), []).append(k)
        return found

    def _tool(self, message: Fields) -> str:
        """Returns the tool of a result that was not placed after its call."""
        tool = self._tools.get(_result_id(message))
        if tool is None and (name := message.text("name")) is not None:
            message.require(TOOL_NAME.fullmatch(name) is not None, "name", NAME_RULE)
            return tool_name(name)
        field = "name" if message.get("role") == OLD_TOOL else "tool_call_id"
        message.needed(field)
        if tool is None:
            raise message.fault(field, "must match an earlier tool call")
        return tool


def _result(tool: str, message: Fields) -> Message:
    return harmony.result(tool, read_text(message, is_required=False))


def _result_id(message: Fields) -> str | None:
    """Returns the id of the call that a result belongs to, or the function name for the deprecated role."""
    return message.text("name" if message.get("role") == OLD_TOOL else "tool_call_id")


def _calls(message: Fields) -> list[tuple[str, str, str]]:
    """Returns the id, tool and arguments of each call in an assistant message."""
    calls = []
    for call in message.objects("tool_calls") or []:
        kind = call.text("type", "function")
        call.require(kind == "function", "type", "must be function, the only supported type of tool")
        tool, arguments = read_call(call.needed_object("function"))
        calls.append((call.text("id", tool), tool, arguments))
    if (old := message.object("function_call")) is not None:
        tool, arguments = read_call(old)
        calls.append((tool.removeprefix(FUNCTIONS), tool, arguments))
    return calls


def read_call(fields: Fields) -> tuple[str, str]:
    """Returns the tool of a call, such as `functions.get_weather`, and its arguments.

    The arguments are not parsed: they are model output.
    """
    name = fields.needed_text("name")
    fields.require(TOOL_NAME.fullmatch(name) is not None, "name", NAME_RULE)
    arguments = fields.get("arguments")
    if isinstance(arguments, dict):
        return tool_name(name), json.dumps(arguments, ensure_ascii=False)
    return tool_name(name), fields.text("arguments", "{}")


def tool_name(name: str) -> str:
    """Returns a function's name with the namespace prefix."""
    return name if name.startswith(FUNCTIONS) else FUNCTIONS + name


def read_text(message: Fields, name: str = "content", is_required: bool = True) -> str:
    """Returns the text of a content field: a string, or text parts, which are concatenated.

    Raises ApiError for parts other than text, such as images, with a path such as
    `messages[2].content[0].type`.
    """
    content = message.get(name)
    if is_required:
        message.needed(name)
    if content is None or isinstance(content, str):
        return content or ""
    message.require(isinstance(content, list), name, "must be a string or a list of text parts")
    return "".join(_part(message, f"{name}[{i}]", part) for i, part in enumerate(content))


def _part(message: Fields, name: str, part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        path = message.param(name)
        raise bad_request(f"{path} is {shown(part)}: must be a text part", path)
    fields = Fields(part, message.param(name))
    fields.needed("type")
    kind = fields.get("type")
    fields.require(kind in TEXT_PARTS, "type", "must be text; images, audio and files are not supported")
    key = "refusal" if kind == "refusal" else "text"
    return fields.needed_text(key)
