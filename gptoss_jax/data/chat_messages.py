"""Converts conversations of chat data to Harmony messages, or explains why a row cannot be used."""

import dataclasses
import datetime
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from gptoss_jax.data import harmony
from gptoss_jax.data.chat_rows import (
    THINKING,
    Conversation,
    Row,
    RowError,
    RowMessage,
    kind_of,
    shown,
    without_none,
)
from gptoss_jax.data.files import json_reason
from gptoss_jax.data.harmony import (
    ASSISTANT,
    DEVELOPER,
    FUNCTIONS,
    SYSTEM,
    TOOL_NAME,
    USER,
    Message,
    Reasoning,
    developer,
    system,
    user,
)

TOOL = "tool"
ROLES = (SYSTEM, DEVELOPER, USER, ASSISTANT, TOOL)
OLD_TOOL = "function"  # role in OpenAI's older files, with calls in function_call
CALL_FIELDS = ("tool_calls", "function_call")
LIKE_CALLS = re.compile(r"((tool|function)s?)?_?calls?", re.IGNORECASE)
# Tools of Harmony that are not functions.
BUILT_IN = re.compile(r"python|(browser|container)\..+")
EFFORTS = ("low", "medium", "high")
NO_CALL = "is a tool result without a call"


@dataclasses.dataclass(frozen=True)
class TrainMessage:
    """A message, and a flag that allows training on it."""

    message: Message
    is_trained: bool = True
    left_out_calls: int = 0  # number of calls after this one in the row's message, without results


def harmony_messages(conversation: Conversation, default_effort: Reasoning = "medium") -> list[TrainMessage]:
    """Converts a conversation to Harmony.

    System messages at the start become the instructions of the developer message, which also declares the
    tools. Content with a tool call becomes commentary. If a message has several calls, each is followed by
    its result, because the model makes one call at a time; without results, only the first call is kept,
    because the model would wait after it. Raises RowError for an invalid conversation.
    """
    row = conversation.row
    messages = conversation.messages
    if not messages:
        raise RowError("no messages", "has no messages")
    roles = [_role(message) for message in messages]
    if USER not in roles:
        raise RowError("no user", "has no user message")
    if roles[-1] != ASSISTANT:
        raise RowError("no answer", f"the last message is from the {roles[-1]}: must be from the assistant")
    functions = _functions(row.get("tools"))
    declared = {function["name"] for function in functions}
    first = next(i for i, role in enumerate(roles) if role not in (SYSTEM, DEVELOPER))
    texts = [_content(message, required=False) for message in messages[:first]]
    instructions = "\n\n".join(filter(None, texts))
    is_trained = all(map(_is_trained, messages[:first]))
    found = [TrainMessage(system(_effort(row, default_effort), _date(row), has_functions=bool(functions)))]
    if instructions or functions:
        declaration = developer(instructions or None, functions)
        _unicode(declaration.text, "tools")
        found.append(TrainMessage(declaration, is_trained))
    i = first
    while i < len(messages):
        message, is_trained = messages[i], _is_trained(messages[i])
        if roles[i] == ASSISTANT:
            after = next(j for j in range(i + 1, len(roles) + 1) if roles[j : j + 1] != [TOOL])
            end = next((j for j in range(i, len(roles)) if roles[j] == USER), len(roles))
            later = [messages[j] for j in range(after, end) if roles[j] == ASSISTANT]
            found += _answer(message, messages[i + 1 : after], later, declared)
            i = after
            continue
        if roles[i] == TOOL:
            raise RowError("result without a call", f"{message.name} {NO_CALL}")
        text = _content(message)
        found.append(TrainMessage(user(text) if roles[i] == USER else developer(text), is_trained))
        i += 1
    return found


def _role(message: RowMessage) -> str:
    role = message.fields.get("role")
    if role == OLD_TOOL:
        return TOOL
    if role not in ROLES:
        found = "missing" if role is None else shown(role)
        raise RowError("unknown role", f"{message.where('role')} is {found}: must be {', '.join(ROLES)}")
    return role


def _answer(
    message: RowMessage, results: Sequence[RowMessage], later: Sequence[RowMessage], declared: Collection[str]
) -> Iterator[TrainMessage]:
    """Yields the Harmony messages for an assistant message and its tool results.

    `later` are the other assistant messages of this turn, after the results.
    """
    name, is_trained = message.name, _is_trained(message)
    thinking, calls = _thinking(message), _calls(message, declared)
    text = _content(message, required=False)
    if not (thinking or calls or text):
        content = message.where("content")
        field = content.removeprefix(f"{name}.")
        reason = f"{name} has neither {field} nor thinking nor tool_calls"
        raise RowError("empty message", f"{name} is missing" if content == name else reason)
    if not (later or calls or text):
        raise RowError("no answer", f"{name}, the last of its turn, has thinking but no answer")
    if results and not calls:
        raise RowError("result without a call", f"{results[0].name} {NO_CALL}")
    if calls and not results and later:
        raise RowError("call without a result", f"{name}: no result for {calls[0].name}")
    if thinking:
        yield TrainMessage(Message(ASSISTANT, thinking, "analysis"), is_trained)
    if text:
        is_preamble = bool(calls) or any(map(_call_field, later))
        if later and not is_preamble:
            reason = f"{later[0].name} follows the answer in {name}: must follow a user's message"
            raise RowError("two answers", reason)
        yield TrainMessage(Message(ASSISTANT, text, "commentary" if is_preamble else "final"), is_trained)
    left_out = 0 if results else len(calls[1:])
    calls = calls if results else calls[:1]
    matched = _match(name, calls, results)
    for call, result in zip(calls, matched, strict=True):
        yield TrainMessage(harmony.call(call.tool, call.arguments), is_trained, left_out)
        if result is not None:
            answer = harmony.result(call.tool, _content(result, allow_empty=True))
            yield TrainMessage(answer, _is_trained(result))


@dataclasses.dataclass(frozen=True)
class _Call:
    tool: str  # such as functions.get_weather
    arguments: str  # JSON
    name: str
    id: Any


def _call_field(message: RowMessage) -> str | None:
    """Returns the name of the field with the tool calls of an assistant message; None without calls."""
    fields = [name for name, value in message.fields.items() if value and LIKE_CALLS.fullmatch(name)]
    if len(fields) > 1 or not set(fields) <= set(CALL_FIELDS):
        allowed = f"must be {' or '.join(CALL_FIELDS)}"
        raise RowError("bad tool call", f"{message.name} has calls in {' and '.join(fields)}: {allowed}")
    return fields[0] if fields else None


def _calls(message: RowMessage, declared: Collection[str]) -> list[_Call]:
    """Returns the tool calls of an assistant message. Tools in `declared` are functions."""
    field = _call_field(message)
    if field is None:
        return []
    calls, where = message.fields[field], message.where(field)
    if isinstance(calls, dict) or field != "tool_calls":
        return [_call(calls, where, declared)]
    if not isinstance(calls, list):
        raise RowError("bad tool call", f"{where} is {shown(calls)}: must be a list of calls")
    return [_call(call, f"{where}[{k}]", declared) for k, call in enumerate(calls)]


def _call(call: Any, where: str, declared: Collection[str]) -> _Call:
    """Parses a tool call: the value of the field `where` or, in OpenAI's format, of its field `function`."""
    given = call
    if isinstance(call, dict) and "function" in call:
        given, where = call["function"], f"{where}.function"
    if not isinstance(given, dict):
        allowed = "must be a call with the name and arguments of a function"
        raise RowError("bad tool call", f"{where} is {shown(given)}: {allowed}")
    name = given.get("name")
    if name is None:
        raise RowError("bad tool call", f"{where} has no function name")
    if not isinstance(name, str) or not TOOL_NAME.fullmatch(name):
        allowed = "must have 1 to 64 letters, digits, _, - and ."
        raise RowError("bad tool call", f"{where}.name is {shown(name)}: {allowed}")
    arguments = given.get("arguments", "{}")
    if isinstance(arguments, dict):
        arguments = json.dumps(arguments, ensure_ascii=False)
    where = f"{where}.arguments"
    try:
        is_object = isinstance(json.loads(arguments), dict)
    except (TypeError, ValueError, RecursionError):
        is_object = False
    if not is_object:
        raise RowError("bad tool call", f"{where} is {shown(arguments)}: must be a JSON object, or its text")
    is_built_in = name not in declared and BUILT_IN.fullmatch(name)
    tool = name if is_built_in or name.startswith(FUNCTIONS) else FUNCTIONS + name
    return _Call(tool, _unicode(arguments, where), name, call.get("id"))


def _match(name: str, calls: Sequence[_Call], results: Sequence[RowMessage]) -> list[RowMessage | None]:
    """Returns the result of each call of message `name`, matched by id, otherwise by name or by order."""
    matched: list[RowMessage | None] = [None] * len(calls)
    ids = {call.id for call in calls if isinstance(call.id, str)}
    for result in results:
        given, tool = result.fields.get("tool_call_id"), result.fields.get("name")
        open_calls = [k for k, found in enumerate(matched) if found is None]
        of = ""
        if given is not None and ids:
            open_calls = [k for k in open_calls if calls[k].id == given]
            of = f" with the id {shown(given)}"
        elif tool is not None:
            plain = str(tool).removeprefix(FUNCTIONS)
            open_calls = [k for k in open_calls if calls[k].tool.removeprefix(FUNCTIONS) == plain]
            of = f" to {shown(tool)}"
        if not open_calls:
            raise RowError("result without a call", f"{result.name} {NO_CALL}{of}")
        matched[open_calls[0]] = result
    missing = [call.name for call, found in zip(calls, matched, strict=True) if found is None]
    if missing and len(missing) < len(calls):
        raise RowError("call without a result", f"{name}: no result for {missing[0]}")
    return matched


def _functions(tools: Any) -> list[Mapping[str, Any]]:
    """Returns the functions of a row's `tools`, which may be a list or its JSON."""
    if isinstance(tools, str):
        try:
            tools = without_none(json.loads(tools)) if tools.strip() else None
        except (ValueError, RecursionError) as error:
            raise RowError("bad tools", f"tools: {json_reason(error)}") from None
    functions = []
    for i, tool in enumerate(tools if isinstance(tools, list) else [tools] if tools else []):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        fits = (
            isinstance(function, dict)
            and isinstance(name, str)
            and TOOL_NAME.fullmatch(name) is not None
            and isinstance(function.get("description", ""), str)
            and isinstance(function.get("parameters", {}), dict)
        )
        if function is None or not fits:
            raise RowError(
                "bad tools", f"tools[{i}] must be a function: a name, a description, a JSON schema"
            )
        functions.append(function)
    return functions


def _effort(row: Row, default: Reasoning) -> Reasoning:
    options = row.get("chat_template_kwargs")
    options = options if isinstance(options, dict) else {}
    effort = row.get("reasoning_effort", options.get("reasoning_effort", default))
    if effort not in EFFORTS:
        reason = f"reasoning_effort is {shown(effort)}: must be {', '.join(EFFORTS)}"
        raise RowError("bad reasoning_effort", reason)
    return effort


def _date(row: Row) -> str | None:
    date = row.get("date")
    if date is not None and not _is_date(date):
        raise RowError("bad date", f"date is {shown(date)}: must be a date, YYYY-MM-DD")
    return date


def _is_date(text: Any) -> bool:
    """Returns True for a valid date, as YYYY-MM-DD."""
    if not isinstance(text, str) or not re.fullmatch(r"\d{4}-\d\d-\d\d", text, re.ASCII):
        return False
    try:
        datetime.date.fromisoformat(text)
    except ValueError:
        return False
    return True


def _is_trained(message: RowMessage) -> bool:
    """Returns False for a message with `train: false` or, in OpenAI's format, `weight: 0`."""
    fields = message.fields
    for field in ("train", "weight"):
        if field in fields and fields[field] not in (0, 1):
            found = f"{message.where(field)} is {shown(fields[field])}"
            allowed = "true or false" if field == "train" else "0 or 1"
            raise RowError("bad train flag", f"{found}: must be {allowed}")
    return bool(fields.get("train", True)) and bool(fields.get("weight", 1))


def _thinking(message: RowMessage) -> str:
    texts = {name: message.fields[name] for name in THINKING if message.fields.get(name)}
    for name, text in texts.items():
        _unicode(text, message.where(name))
    if len(set(texts.values())) > 1:
        raise RowError("bad thinking", f"{message.name}: {' and '.join(texts)} differ; must be one of them")
    return next(iter(texts.values()), "")


def _content(message: RowMessage, required: bool = True, allow_empty: bool = False) -> str:
    """Returns the content of a message; a list of text parts is joined."""
    where, content = message.where("content"), message.fields.get("content")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        kinds = [part.get("type", "text") for part in content if isinstance(part, dict)]
        if other := [kind for kind in kinds if kind != "text"]:
            raise RowError("bad content", f"{where} has a part of type {shown(other[0])}: must be text")
        texts = [_unicode(part, where) for part in parts]
        content = "".join(texts) if texts else None
    if content is None or (content == "" and not allow_empty):
        if not required:
            return ""
        raise RowError("empty message", f"{where} is missing")
    return _unicode(content, where)


def _unicode(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise RowError("bad content", f"{where} is {kind_of(text)}: must be text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise RowError("bad content", f"{where} holds {half!r}, half of a surrogate pair") from None
    return text
