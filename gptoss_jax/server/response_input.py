"""Converts input items of the Responses API (messages, reasoning, calls, results) to Harmony messages."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from gptoss_jax.data import harmony
from gptoss_jax.data.harmony import ASSISTANT, DEVELOPER, SYSTEM, USER, Message
from gptoss_jax.server.errors import ApiError, bad_request
from gptoss_jax.server.fields import Fields, shown
from gptoss_jax.server.messages import Conversation, read_call, read_text
from gptoss_jax.server.response_events import decode_reasoning
from gptoss_jax.server.response_store import ResponseStore

ROLES = (USER, SYSTEM, DEVELOPER, ASSISTANT)
TYPES = ("message", "reasoning", "function_call", "function_call_output", "item_reference")
PHASES = {"commentary": "commentary", "final_answer": "final"}


@dataclasses.dataclass(frozen=True)
class ResponseInput:
    """The conversation of a request. `items` are all its items, including earlier ones, for the store."""

    items: tuple[Mapping[str, Any], ...]
    conversation: Conversation


def read_input(fields: Fields, store: ResponseStore) -> ResponseInput:
    """Parses `instructions`, `previous_response_id` and `input`, a string or items.

    Instructions of earlier requests are not carried over. Raises ApiError with the path of the field: 404 for
    responses and items that are not stored, 400 for invalid input.
    """
    earlier: tuple[Mapping[str, Any], ...] = ()
    if (name := fields.text("previous_response_id")) is not None:
        stored = store.get(name)
        if stored is None:
            message = f"Previous response with id {shown(name)} not found: it was not stored or was evicted."
            code = "previous_response_not_found"
            raise ApiError(404, message, param="previous_response_id", code=code)
        earlier = stored.items
    given = [] if "input" not in fields and earlier else _items(fields)
    given = [_resolve(item, store) for item in given]
    items = (*earlier, *(item.values for item in given))
    if not items:
        raise bad_request("input is empty: must contain at least one item", "input")
    readable = [Fields(item, "previous_response_id") for item in earlier] + given
    return ResponseInput(items, _conversation(fields.text("instructions"), readable))


def _items(fields: Fields) -> list[Fields]:
    fields.needed("input")
    text = fields.get("input")
    if isinstance(text, str):
        return [Fields({"type": "message", "role": USER, "content": text}, "input")]
    fields.require(isinstance(text, list), "input", "must be a string or a list of items")
    return fields.objects("input") or []


def _resolve(item: Fields, store: ResponseStore) -> Fields:
    """Checks an item's type, and resolves a reference to a stored item."""
    kind = item.text("type") or "message"
    item.require(kind in TYPES, "type", f"must be one of {', '.join(TYPES)}")
    if kind != "item_reference":
        return item
    found = store.item(item.needed_text("id"))
    if found is None:
        message = f"Item with id {shown(item.get('id'))} not found: it was not stored or was evicted."
        raise ApiError(404, message, param=item.param("id"))
    return Fields(found, item.path)


def _conversation(instructions: str | None, items: Sequence[Fields]) -> Conversation:
    first = next((i for i, item in enumerate(items) if not _instructs(item)), len(items))
    texts = [instructions, *(read_text(item) for item in items[:first])]
    reader = _Reader(items)
    messages = [message for i in range(first, len(items)) for message in reader.read(i)]
    return Conversation("\n\n".join(filter(None, texts)) or None, messages)


def _instructs(item: Fields) -> bool:
    return item.get("type") in (None, "message") and item.get("role") in (SYSTEM, DEVELOPER)


class _Reader:
    """Converts items in order, placing each result directly after its call, as in the model's training."""

    def __init__(self, items: Sequence[Fields]) -> None:
        self._items = items
        self._tools: dict[str, str] = {}  # tool of each call, by call_id
        self._results: dict[str, collections.deque[int]] = {}  # indices of results not placed yet, by call_id
        for i, item in enumerate(items):
            if item.get("type") == "function_call_output":
                self._results.setdefault(item.needed_text("call_id"), collections.deque()).append(i)
        self._read: set[int] = set()  # indices of results already placed after their calls

    def read(self, i: int) -> list[Message]:
        item = self._items[i]
        kind = item.get("type") or "message"
        if kind == "message":
            return self._message(i, item)
        if kind == "reasoning":
            text = _reasoning(item)
            return [Message(ASSISTANT, text, "analysis")] if text else []
        if kind == "function_call":
            return self._call(i, item)
        return [] if i in self._read else [self._result(item)]

    def _message(self, i: int, item: Fields) -> list[Message]:
        item.needed("role")
        role, text = item.choice("role", ROLES), read_text(item)
        if role == USER:
            return [harmony.user(text)]
        if not text:
            return []
        if role != ASSISTANT:
            return [harmony.developer(text)]
        return [Message(ASSISTANT, text, PHASES.get(item.choice("phase", PHASES) or "") or self._channel(i))]

    def _channel(self, i: int) -> str:
        """Returns the channel of assistant text without a phase: commentary before a call, else final."""
        # By index: slicing the later items is quadratic, which takes hours for the largest bodies.
        later = (self._items[k] for k in range(i + 1, len(self._items)))
        following = next((item for item in later if item.get("type") != "reasoning"), None)
        is_preamble = following is not None and following.get("type") == "function_call"
        return "commentary" if is_preamble else "final"

    def _call(self, i: int, item: Fields) -> list[Message]:
        name = item.needed_text("call_id")
        tool, arguments = read_call(item)
        self._tools[name] = tool
        found = [harmony.call(tool, arguments)]
        results = self._results.get(name, collections.deque())
        while results and results[0] < i:
            results.popleft()
        if results:
            k = results.popleft()
            self._read.add(k)
            found.append(self._result(self._items[k]))
        return found

    def _result(self, item: Fields) -> Message:
        tool = self._tools.get(item.text("call_id", ""))
        if tool is None:
            raise item.fault("call_id", "must match an earlier function_call")
        item.needed("output")
        return harmony.result(tool, read_text(item, "output"))


def _reasoning(item: Fields) -> str:
    """Returns the text of a reasoning item: its content, else its encoded content, else its summary."""
    for name in ("content", "encrypted_content", "summary"):
        if name == "encrypted_content":
            text = decode_reasoning(item.text(name, ""))
        else:
            parts = item.objects(name) or []
            text = "\n\n".join(part.text("text", "") for part in parts)
        if text:
            return text
    return ""
