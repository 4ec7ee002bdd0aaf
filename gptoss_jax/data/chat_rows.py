"""Rows of chat data: files, the four formats, and one form for all of them.

`data.source` is `chat:GLOB`, JSON lines, JSON arrays or parquet, or `stdlib-chat`. The format of a row is
that of its fields: `messages` (OpenAI), `conversations` (ShareGPT), `prompt` and `completion`, or
`instruction` and `output` (Alpaca). A field that is None counts as absent, but not inside the arguments of
a call or the JSON schema of a tool, except in parquet: there Arrow gives all objects the same fields.
"""

import dataclasses
import functools
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from gptoss_jax.config import require
from gptoss_jax.config.base import listed, type_name
from gptoss_jax.data import files
from gptoss_jax.data.sources import Source, stdlib_files
from gptoss_jax.data.stdlib_chat import question_rows

STDLIB, GLOB = "stdlib-chat", "chat:"
# Fields that hold the reasoning of an assistant's message.
THINKING = ("thinking", "reasoning", "reasoning_content")
PAIRS = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("query", "response"))
SHAREGPT_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool",
    "function_call": "function_call",
}  # fmt: skip
# Fields that hold the user's JSON.
JSON_FIELDS = ("arguments", "parameters")
KNOWN_FORMATS = "messages, conversations, prompt and completion, or instruction and output"

Row = Mapping[str, Any]


class RowError(ValueError):
    """A row that cannot be used: the message says why, `kind` in few words for the statistics."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A row in OpenAI's form, its messages unchecked. `format` names the form that it had."""

    format: str
    messages: list[Any]
    row: Row  # the other fields: tools, reasoning_effort, date


def is_chat_source(source: str) -> bool:
    """Returns True if a `data.source` holds conversations, not documents."""
    return source == STDLIB or source.startswith(GLOB)


class ChatCorpus(Source):
    """A source of conversations."""

    def rows(self) -> Iterator[tuple[str, int, Row | RowError]]:
        """Yields each row, after where it is: a prefix, and a number to append to it."""
        return iter(self._read())


def open_chat(source: str) -> ChatCorpus:
    """Opens a source of conversations. Raises ValueError if there are no files."""
    if source == STDLIB:
        root, paths, fingerprint = stdlib_files()

        def questions() -> Iterator[tuple[str, int, Row]]:
            for number, row in enumerate(question_rows(root, paths)):
                yield f"{STDLIB} row ", number, row

        return ChatCorpus(source, f"questions on {fingerprint}", questions)
    name = source.removeprefix(GLOB)
    require(name != "", "data.source", source, "must be chat:GLOB, JSON lines or parquet files")
    paths = files.find_files(name, source)
    stamps = functools.partial(files.stamps, paths)

    def read() -> Iterator[tuple[str, int, Row | RowError]]:
        for path in paths:
            yield from _read_file(path)

    return ChatCorpus(source, f"{source}\n{stamps()}", read, stamps)


def _read_file(path: str) -> Iterator[tuple[str, int, Row | RowError]]:
    """Reads parquet, a JSON array, or JSON lines, by the first bytes of the file."""
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


def _read_array(path: str, lines: Iterable[bytes]) -> Iterator[tuple[str, int, Row | RowError]]:
    text = files.decode(b"\n".join(lines), path)
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    for number, item in enumerate(items):
        is_object = isinstance(item, dict)
        yield f"{path} item ", number, item if is_object else RowError("invalid JSON", "must be an object")


def _parse_line(line: bytes) -> Row | RowError:
    try:
        return files.parse_object(line, "")
    except ValueError as error:
        return RowError("invalid JSON", str(error).removeprefix(": "))


def without_none(value: Any, kept: Collection[str] = JSON_FIELDS) -> Any:
    """Drops the fields that are None. Those with a name in `kept` are not looked into."""
    if isinstance(value, dict):
        return {
            name: one if name in kept else without_none(one, kept)
            for name, one in value.items()
            if one is not None
        }
    return [without_none(one, kept) for one in value] if isinstance(value, list) else value


def read_conversation(row: Row) -> Conversation:
    """Converts a row of any format to messages. Raises RowError for another one."""
    row = without_none(row)
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    if "messages" in row:
        return Conversation("messages", system + _list(row, "messages"), row)
    if "conversations" in row:
        messages = [_sharegpt(one, i) for i, one in enumerate(_list(row, "conversations"))]
        return Conversation("ShareGPT (conversations)", system + messages, row)
    if "instruction" in row and "output" in row:
        history = _list(row, "history")
        if not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
            raise RowError("bad messages", "history must have pairs of a question and its answer")
        messages = [
            {"role": role, "content": text}
            for pair in history
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        parts = [row[key] for key in ("instruction", "input") if row.get(key)]
        if not all(isinstance(part, str) for part in parts):
            raise RowError("bad content", "instruction and input must be text")
        messages += [{"role": "user", "content": "\n\n".join(parts)}, _answer(row, row["output"])]
        return Conversation("Alpaca (instruction, input, output)", system + messages, row)
    for asked, answered in PAIRS:
        if asked in row and answered in row:
            prompt, completion = row[asked], row[answered]
            if isinstance(prompt, list):  # messages, of which only the completion's are trained
                before = [{**one, "train": False} if isinstance(one, dict) else one for one in prompt]
            else:
                before = [{"role": "user", "content": prompt}]
            after = completion if isinstance(completion, list) else [_answer(row, completion)]
            return Conversation(f"pairs ({asked}, {answered})", [*system, *before, *after], row)
    fields = listed(row, files.SHOWN_NAMES) or "none"
    raise RowError("unknown format", f"its fields are {fields}: must be {KNOWN_FORMATS}")


def _list(row: Row, field: str) -> list:
    value = row.get(field, [])
    if not isinstance(value, list):
        raise RowError("bad messages", f"{field} is {type_name(value)}: must be a list")
    return value


def _answer(row: Row, text: Any) -> Row:
    """The assistant's message of a row that is one question and its answer."""
    return {"role": "assistant", "content": text} | {name: row[name] for name in THINKING if name in row}


def _sharegpt(message: Any, index: int) -> Any:
    """Converts `from` and `value`; messages with `role` and `content` pass."""
    if not isinstance(message, dict) or "from" not in message:
        return message
    role = SHAREGPT_ROLES.get(str(message["from"]), message["from"])
    if role != "function_call":
        return {**message, "role": role, "content": message.get("value")}
    try:
        call = json.loads(message.get("value", ""))
    except (ValueError, TypeError) as error:
        raise RowError("bad tool call", f"conversations[{index}].value: not JSON ({error})") from None
    return {**message, "role": "assistant", "tool_calls": call if isinstance(call, list) else [call]}
