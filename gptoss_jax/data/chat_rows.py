"""Rows of chat data: reads the files and converts the four formats to a common one.

`data.source` is `chat:GLOB` (JSON lines, JSON arrays or parquet), or `stdlib-chat`. The fields of a row
determine its format: `messages` (OpenAI), `conversations` (ShareGPT), `prompt` and `completion`, or
`instruction` and `output` (Alpaca). Those of `preferences:GLOB` and `stdlib-preferences` have `chosen` and
`rejected`; those of `prompts:GLOB` and `stdlib-prompts` need no answer. A field that is None is treated as
absent, but not in the arguments of a call or the JSON schema of a tool, except in parquet, where Arrow gives
all objects the same fields.
"""

import dataclasses
import functools
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from gptoss_jax.config import require
from gptoss_jax.config.base import listed, type_name
from gptoss_jax.config.train import (
    PREFERENCES_GLOB,
    PROMPTS_GLOB,
    STDLIB_PREFERENCES,
    STDLIB_PROMPTS,
    is_preferences,
    is_prompts,
)
from gptoss_jax.data import files
from gptoss_jax.data.sources import Source, stdlib_files
from gptoss_jax.data.stdlib_chat import preference_rows, prompt_rows, question_rows

STDLIB, GLOB = "stdlib-chat", "chat:"
# Kind and reader of the rows of each source that is generated from Python's standard library.
STDLIB_ROWS = {
    STDLIB: ("questions", question_rows),
    STDLIB_PREFERENCES: ("preferences", preference_rows),
    STDLIB_PROMPTS: ("prompts", prompt_rows),
}
# Fields with the reasoning of an assistant message.
THINKING = ("thinking", "reasoning", "reasoning_content")
PAIRS = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("query", "response"))
SHAREGPT_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool",
    "function_call": "assistant", "system": "system", "developer": "developer", "user": "user",
    "assistant": "assistant", "tool": "tool",
}  # fmt: skip
SHAREGPT_NAMES = "system, human, gpt, function_call or observation"
# Fields with arbitrary JSON.
JSON_FIELDS = ("arguments", "parameters")
MAX_SHOWN = 80  # characters of a value in an error
KNOWN_FORMATS = "messages, conversations, prompt and completion, or instruction and output"

Row = Mapping[str, Any]


class RowError(ValueError):
    """A row that cannot be used, with the reason; `kind` is a short category for the statistics."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


@dataclasses.dataclass(frozen=True)
class RowMessage:
    """An unchecked message in OpenAI's format, and its name in the row, for error messages."""

    fields: Row
    name: str  # such as messages[2] or completion
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)  # OpenAI's field -> field of the row

    def where(self, field: str) -> str:
        """Returns the path in the row of a field of OpenAI's format, such as `conversations[2].value`."""
        return self.names.get(field, f"{self.name}.{field}")


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A row in OpenAI's format. `format` is the name of its original format."""

    format: str
    messages: list[RowMessage]
    row: Row  # the other fields: tools, reasoning_effort, date


def is_chat_source(source: str) -> bool:
    """Returns True if a `data.source` has conversations, pairs of them, or prompts, rather than documents."""
    return source == STDLIB or source.startswith(GLOB) or is_preferences(source) or is_prompts(source)


class ChatCorpus(Source):
    """A source of conversations."""

    def rows(self) -> Iterator[tuple[str, int, Row | RowError]]:
        """Yields (prefix, number, row); prefix and number together are the location of the row."""
        return iter(self._read())


def open_chat(source: str) -> ChatCorpus:
    """Opens a source of conversations. Raises ValueError if there are no files."""
    if source in STDLIB_ROWS:
        root, paths, fingerprint = stdlib_files()
        kind, read_rows = STDLIB_ROWS[source]

        def questions() -> Iterator[tuple[str, int, Row]]:
            for number, row in enumerate(read_rows(root, paths)):
                yield f"{source} row ", number, row

        return ChatCorpus(source, f"{kind} on {fingerprint}", questions)
    prefix = PREFERENCES_GLOB if is_preferences(source) else PROMPTS_GLOB if is_prompts(source) else GLOB
    name = source.removeprefix(prefix)
    require(name != "", "data.source", source, f"must be {prefix}GLOB, JSON lines or parquet files")
    paths = files.find_files(name, source)
    stamps = functools.partial(files.stamps, paths)

    def read() -> Iterator[tuple[str, int, Row | RowError]]:
        for path in paths:
            yield from _read_file(path)

    return ChatCorpus(source, f"{source}\n{stamps()}", read, stamps)


def _read_file(path: str) -> Iterator[tuple[str, int, Row | RowError]]:
    """Reads parquet, a JSON array, or JSON lines, as determined by the first bytes of the file."""
    with files.readable(path), open(path, "rb") as file:
        is_parquet = file.read(4) == b"PAR1"
    if is_parquet:
        for number, row in enumerate(files.parquet_rows(path)):
            yield f"{path} row ", number, without_none(row, ())
        return
    lines = files.jsonl_lines(path)
    for index, (number, line) in enumerate(lines):
        if index == 0 and line.lstrip().startswith(b"["):
            yield from _read_array(path, [line, *(line for _, line in lines)])
            return
        yield f"{path}:", number, _parse_line(line)


def _read_array(path: str, lines: Iterable[bytes | bytearray]) -> Iterator[tuple[str, int, Row | RowError]]:
    text = files.decode(b"\n".join(lines), path)
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {files.json_reason(error)}") from None
    for number, item in enumerate(items):
        is_object = isinstance(item, dict)
        yield f"{path} item ", number, item if is_object else RowError("invalid JSON", "must be an object")


def _parse_line(line: bytes | bytearray) -> Row | RowError:
    try:
        return files.parse_object(line, "")
    except ValueError as error:
        return RowError("invalid JSON", str(error).removeprefix(": "))


def without_none(value: Any, kept: Collection[str] = JSON_FIELDS) -> Any:
    """Drops fields that are None, recursively except in fields named in `kept`."""
    if isinstance(value, dict):
        return {
            name: one if name in kept else without_none(one, kept)
            for name, one in value.items()
            if one is not None
        }
    return [without_none(one, kept) for one in value] if isinstance(value, list) else value


def read_conversation(row: Row) -> Conversation:
    """Converts a row of any supported format to messages. Raises RowError for an unknown format."""
    given, row = row, without_none(row)
    system = [_text("system", row["system"], "system")] if row.get("system") else []
    if "messages" in row:
        return Conversation("messages", system + _messages(row, "messages"), row)
    if "conversations" in row:
        messages = [
            _sharegpt(one, f"conversations[{i}]") for i, one in enumerate(_list(row, "conversations"))
        ]
        return Conversation("ShareGPT (conversations)", system + messages, row)
    if "instruction" in row and "output" in row:
        return Conversation("Alpaca (instruction, input, output)", system + _alpaca(row), row)
    for asked, answered in PAIRS:
        if asked in row and answered in row:
            if isinstance(row[asked], list):  # messages; only those of the completion are trained on
                before = [
                    dataclasses.replace(one, fields={**one.fields, "train": False})
                    for one in _messages(row, asked)
                ]
            else:
                before = [_text("user", row[asked], asked)]
            is_list = isinstance(row[answered], list)
            after = _messages(row, answered) if is_list else [_answer(row, answered)]
            return Conversation(f"pairs ({asked}, {answered})", [*system, *before, *after], row)
    names = [shown(name)[1:-1] + ("" if name in row else " (null)") for name in given]
    found = f"its fields are {listed(names, files.SHOWN_NAMES)}" if names else "it has no fields"
    raise RowError("unknown format", f"{found}: must be {KNOWN_FORMATS}")


def shown(value: Any) -> str:
    """Formats a value of a row for an error message, truncated to MAX_SHOWN characters."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 2]}…{text[-1]}"


def kind_of(value: Any) -> str:
    """Returns the type of a value for an error message: `a str`, `null`."""
    return "null" if value is None else type_name(value)


def _list(row: Row, field: str) -> list:
    value = row.get(field, [])
    if not isinstance(value, list):
        raise RowError("bad messages", f"{field} is {kind_of(value)}: must be a list")
    return value


def _messages(row: Row, field: str) -> list[RowMessage]:
    """Returns the messages of a field in OpenAI's format."""
    return [_message(one, f"{field}[{i}]") for i, one in enumerate(_list(row, field))]


def _message(value: Any, name: str) -> RowMessage:
    if not isinstance(value, dict):
        raise RowError("bad messages", f"{name} is {kind_of(value)}: must be an object with role and content")
    return RowMessage(value, name)


def _text(role: str, text: Any, name: str, thinking: Row | None = None) -> RowMessage:
    """Returns a message with text, and thinking if any, from fields of the row."""
    fields = {"role": role, "content": text, **(thinking or {})}
    return RowMessage(fields, name, {"content": name} | {field: field for field in THINKING})


def _answer(row: Row, name: str) -> RowMessage:
    """Returns the assistant message of a row with one question and its answer."""
    return _text("assistant", row[name], name, {field: row[field] for field in THINKING if field in row})


def _alpaca(row: Row) -> list[RowMessage]:
    history = _list(row, "history")
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise RowError("bad messages", "history must have pairs of a question and its answer")
    messages = [
        _text(role, pair[k], f"history[{i}][{k}]")
        for i, pair in enumerate(history)
        for k, role in enumerate(("user", "assistant"))
    ]
    parts = {name: row[name] for name in ("instruction", "input") if row.get(name)}
    for name, part in parts.items():
        if not isinstance(part, str):
            raise RowError("bad content", f"{name} is {kind_of(part)}: must be text")
    return [*messages, _text("user", "\n\n".join(parts.values()), "instruction"), _answer(row, "output")]


def _sharegpt(message: Any, name: str) -> RowMessage:
    """Converts a message with `from` and `value`; one with `role` and `content` is unchanged."""
    if isinstance(message, dict) and "from" not in message and "role" in message:
        return RowMessage(message, name)
    if not isinstance(message, dict) or "from" not in message:
        found = "has no from" if isinstance(message, dict) else f"is {kind_of(message)}"
        raise RowError("bad messages", f"{name} {found}: must be an object with from and value")
    role, value = SHAREGPT_ROLES.get(str(message["from"])), message.get("value")
    if role is None:
        found = f"{name}.from is {shown(message['from'])}"
        raise RowError("unknown role", f"{found}: must be {SHAREGPT_NAMES}")
    names = {"role": f"{name}.from"} | dict.fromkeys(("content", "tool_calls"), f"{name}.value")
    if message["from"] != "function_call":
        return RowMessage({**message, "role": role, "content": value}, name, names)
    try:
        call = json.loads(value if isinstance(value, str) else "null")
    except (ValueError, RecursionError) as error:
        raise RowError("bad tool call", f"{name}.value: {files.json_reason(error)}") from None
    if not call or not isinstance(call, dict | list):
        allowed = "must be the JSON of a call, an object with name and arguments"
        raise RowError("bad tool call", f"{name}.value is {shown(value)}: {allowed}")
    return RowMessage({**message, "role": role, "tool_calls": call}, name, names)
