"""Conversations of chat data as Harmony messages, and why a row cannot be used."""

import dataclasses
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from gptoss_jax.config.base import type_name
from gptoss_jax.data.chat_rows import THINKING, Conversation, Row, RowError, without_none
from gptoss_jax.data.harmony import (
    ASSISTANT,
    CONSTRAIN,
    DEVELOPER,
    SYSTEM,
    USER,
    Message,
    developer,
    system,
    user,
)

TOOL = "tool"
ROLES = (SYSTEM, DEVELOPER, USER, ASSISTANT, TOOL)
OLD_TOOL = "function"  # the role in OpenAI's older files, whose calls are in function_call
CALL_FIELDS = ("tool_calls", "function_call")
LIKE_CALLS = re.compile(r"((tool|function)s?)?_?calls?", re.IGNORECASE)
# Tools of Harmony that are not functions.
BUILT_IN = re.compile(r"python|(browser|container)\..+")
FUNCTIONS = "functions."
EFFORTS = ("low", "medium", "high")
TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclasses.dataclass(frozen=True)
class TrainMessage:
    """A message, and whether its row allows to train on it."""

    message: Message
    is_trained: bool = True
    left_out_calls: int = 0  # the calls after this one in its row's message, which have no results


def harmony_messages(conversation: Conversation, default_effort: str = "medium") -> list[TrainMessage]:
    """Converts a conversation to Harmony.

    The system messages at its start are the instructions of the developer message, which also declares the
    tools. Content before or beside a tool call is commentary; several calls of one message each come before
    their result, because the model makes one call at a time. Without results only the first of them remains:
    the model waits after it. Raises RowError for what does not fit.
    """
    row = conversation.row
    messages = [
        {**one, "role": TOOL} if isinstance(one, dict) and one.get("role") == OLD_TOOL else one
        for one in conversation.messages
    ]
    if not messages:
        raise RowError("no messages", "has no messages")
    for i, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else message
        if role not in ROLES:
            raise RowError("unknown role", f"messages[{i}].role is {role!r}: must be {', '.join(ROLES)}")
    roles = [message["role"] for message in messages]
    if USER not in roles:
        raise RowError("no user", "has no message of the user")
    if roles[-1] != ASSISTANT:
        raise RowError("no answer", f"the last message is the {roles[-1]}'s: must be the assistant's")
    functions = _functions(row.get("tools"))
    declared = {function["name"] for function in functions}
    first = next(i for i, role in enumerate(roles) if role not in (SYSTEM, DEVELOPER))
    texts = [_content(message, i, required=False) for i, message in enumerate(messages[:first])]
    instructions = "\n\n".join(filter(None, texts))
    is_trained = all(_is_trained(message, i) for i, message in enumerate(messages[:first]))
    found = [TrainMessage(system(_effort(row, default_effort), _date(row), has_functions=bool(functions)))]
    if instructions or functions:
        declaration = developer(instructions or None, functions)
        _unicode(declaration.text, "tools")
        found.append(TrainMessage(declaration, is_trained))
    i = first
    while i < len(messages):
        message, is_trained = messages[i], _is_trained(messages[i], i)
        if roles[i] == ASSISTANT:
            after = next(j for j in range(i + 1, len(roles) + 1) if roles[j : j + 1] != [TOOL])
            end = next((j for j in range(i, len(roles)) if roles[j] == USER), len(roles))
            found += _answer(messages, i, range(i + 1, after), range(after, end), declared)
            i = after
            continue
        if roles[i] == TOOL:
            raise RowError("result without a call", f"messages[{i}] is the result of a tool without a call")
        text = _content(message, i)
        found.append(TrainMessage(user(text) if roles[i] == USER else developer(text), is_trained))
        i += 1
    return found


def _answer(
    messages: Sequence[Row], i: int, results: range, rest: range, declared: Collection[str]
) -> Iterator[TrainMessage]:
    """Yields the messages of the assistant's message i and of its tool results, which `rest` of its turn
    follows."""
    message, is_trained = messages[i], _is_trained(messages[i], i)
    thinking, calls = _thinking(message, i), _calls(message, i, declared)
    text = _content(message, i, required=False)
    later = [j for j in rest if messages[j]["role"] == ASSISTANT]
    if not (thinking or calls or text):
        raise RowError("empty message", f"messages[{i}] has neither content nor thinking nor tool_calls")
    if not (later or calls or text):
        raise RowError("no answer", f"messages[{i}], the last of its turn, has thinking but no answer")
    if results and not calls:
        raise RowError("result without a call", f"messages[{i + 1}] is the result of a tool without a call")
    if calls and not results and later:
        raise RowError("call without a result", f"messages[{i}]: no result of {calls[0].name}")
    if thinking:
        yield TrainMessage(Message(ASSISTANT, thinking, "analysis"), is_trained)
    if text:
        is_preamble = bool(calls) or any(_call_field(messages[j], j) for j in later)
        if later and not is_preamble:
            reason = f"messages[{later[0]}] follows the answer in messages[{i}]: must follow a user's message"
            raise RowError("two answers", reason)
        yield TrainMessage(Message(ASSISTANT, text, "commentary" if is_preamble else "final"), is_trained)
    left_out = 0 if results else len(calls[1:])
    calls = calls if results else calls[:1]
    matched = _match(messages, calls, results)
    for call, result in zip(calls, matched, strict=True):
        arguments = Message(ASSISTANT, call.arguments, "commentary", call.tool, f"{CONSTRAIN}json")
        yield TrainMessage(arguments, is_trained, left_out)
        if result is not None:
            text = _content(messages[result], result, allow_empty=True)
            answer = Message(call.tool, text, "commentary", ASSISTANT)
            yield TrainMessage(answer, _is_trained(messages[result], result))


@dataclasses.dataclass(frozen=True)
class _Call:
    tool: str  # such as functions.get_weather
    arguments: str  # JSON
    name: str
    id: Any


def _call_field(message: Row, i: int) -> str | None:
    """Returns the name of the field with the tool calls of an assistant's message; None without calls."""
    fields = [name for name, value in message.items() if value and LIKE_CALLS.fullmatch(name)]
    if len(fields) > 1 or not set(fields) <= set(CALL_FIELDS):
        allowed = f"must be {' or '.join(CALL_FIELDS)}"
        raise RowError("bad tool call", f"messages[{i}] has calls in {' and '.join(fields)}: {allowed}")
    return fields[0] if fields else None


def _calls(message: Row, i: int, declared: Collection[str]) -> list[_Call]:
    """Returns the tool calls of an assistant's message. Those that `tools` declares are functions."""
    field, found = _call_field(message, i), []
    calls = message[field] if field else []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not TOOL_NAME.fullmatch(name):
            allowed = "a name of letters, digits, _, - and ."
            raise RowError("bad tool call", f"messages[{i}].{field}: {name!r} is not {allowed}")
        arguments = function.get("arguments", "{}")
        if isinstance(arguments, dict):
            arguments = json.dumps(arguments, ensure_ascii=False)
        where = f"messages[{i}].{field}: the arguments of {name}"
        try:
            is_object = isinstance(json.loads(arguments), dict)
        except (TypeError, ValueError, RecursionError):
            is_object = False
        if not is_object:
            raise RowError("bad tool call", f"{where} must be a JSON object, or its text")
        is_built_in = name not in declared and BUILT_IN.fullmatch(name)
        tool = name if is_built_in or name.startswith(FUNCTIONS) else FUNCTIONS + name
        found.append(_Call(tool, _unicode(arguments, where), name, call.get("id")))
    return found


def _match(messages: Sequence[Row], calls: Sequence[_Call], results: range) -> list[int | None]:
    """Returns the index of each call's result: that with its id, else its name, else the next one."""
    matched: list[int | None] = [None] * len(calls)
    ids = {call.id for call in calls if isinstance(call.id, str)}
    for i in results:
        given, name = messages[i].get("tool_call_id"), messages[i].get("name")
        open_calls = [k for k, found in enumerate(matched) if found is None]
        if given is not None and ids:
            open_calls = [k for k in open_calls if calls[k].id == given]
        elif name is not None:
            tool = str(name).removeprefix(FUNCTIONS)
            open_calls = [k for k in open_calls if calls[k].tool.removeprefix(FUNCTIONS) == tool]
        if not open_calls:
            of = f" with the id {given!r}" if given is not None and ids else f" of {name!r}" if name else ""
            raise RowError(
                "result without a call", f"messages[{i}] is the result of a tool without a call{of}"
            )
        matched[open_calls[0]] = i
    missing = [call.name for call, found in zip(calls, matched, strict=True) if found is None]
    if missing and len(missing) < len(calls):
        raise RowError("call without a result", f"messages[{results.start - 1}]: no result of {missing[0]}")
    return matched


def _functions(tools: Any) -> list[Mapping[str, Any]]:
    """Returns the functions of a row's `tools`: a list, or its JSON."""
    if isinstance(tools, str):
        try:
            tools = without_none(json.loads(tools)) if tools.strip() else None
        except (ValueError, RecursionError) as error:
            raise RowError("bad tools", f"tools: not JSON ({error})") from None
    functions = []
    for i, tool in enumerate(tools if isinstance(tools, list) else [tools] if tools else []):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        fits = isinstance(name, str) and TOOL_NAME.fullmatch(name) is not None
        fits = fits and isinstance(function.get("description", ""), str)
        if not fits or not isinstance(function.get("parameters", {}), dict):
            raise RowError(
                "bad tools", f"tools[{i}] must be a function: a name, a description, a JSON schema"
            )
        functions.append(function)
    return functions


def _effort(row: Row, default: str) -> str:
    options = row.get("chat_template_kwargs")
    options = options if isinstance(options, dict) else {}
    effort = row.get("reasoning_effort", options.get("reasoning_effort", default))
    if effort not in EFFORTS:
        reason = f"reasoning_effort is {effort!r}: must be {', '.join(EFFORTS)}"
        raise RowError("bad reasoning_effort", reason)
    return effort


def _date(row: Row) -> str | None:
    date = row.get("date")
    if date is not None and not (isinstance(date, str) and re.fullmatch(r"\d{4}-\d\d-\d\d", date)):
        raise RowError("bad date", f"date is {date!r}: must be YYYY-MM-DD")
    return date


def _is_trained(message: Row, i: int) -> bool:
    """Returns False for a message with `train: false`, or `weight: 0` as OpenAI's files have it."""
    for field in ("train", "weight"):
        if field in message and message[field] not in (0, 1):
            allowed = "true or false" if field == "train" else "0 or 1"
            raise RowError(
                "bad train flag", f"messages[{i}].{field} is {message[field]!r}: must be {allowed}"
            )
    return bool(message.get("train", True)) and bool(message.get("weight", 1))


def _thinking(message: Row, i: int) -> str:
    texts = {name: message[name] for name in THINKING if message.get(name)}
    for name, text in texts.items():
        _unicode(text, f"messages[{i}].{name}")
    if len(set(texts.values())) > 1:
        raise RowError("bad thinking", f"messages[{i}]: {' and '.join(texts)} differ; must be one of them")
    return next(iter(texts.values()), "")


def _content(message: Row, i: int, required: bool = True, allow_empty: bool = False) -> str:
    """Returns the content of a message: text, or parts of text, which are joined."""
    where, content = f"messages[{i}].content", message.get("content")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        kinds = [part.get("type", "text") for part in content if isinstance(part, dict)]
        if other := [kind for kind in kinds if kind != "text"]:
            raise RowError("bad content", f"{where} has a part of type {other[0]!r}: must be text")
        texts = [_unicode(part, where) for part in parts]
        content = "".join(texts) if texts else None
    if content is None or (content == "" and not allow_empty):
        if not required:
            return ""
        raise RowError("empty message", f"{where} is missing")
    return _unicode(content, where)


def _unicode(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise RowError("bad content", f"{where} is {type_name(text)}: must be text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise RowError("bad content", f"{where} holds {half!r}, half of a surrogate pair") from None
    return text
