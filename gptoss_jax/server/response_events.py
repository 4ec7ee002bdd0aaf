"""Builds a response's output and its stream events from parsed deltas."""

import base64
import binascii
import dataclasses
import secrets
import time
from collections.abc import Iterable, Mapping
from typing import Any

from gptoss_jax.data.harmony import Harmony
from gptoss_jax.server.answers import Call, Delta, FinishReason, Kind, logprob_json
from gptoss_jax.server.errors import ApiError

# Event name and data.
Event = tuple[str, dict[str, Any]]
ID_PREFIXES = {"reasoning": "rs", "content": "msg", "call": "fc"}
PHASES = {"commentary": "commentary", "final": "final_answer"}
ENCODED = "gptoss_jax."  # prefix of reasoning in `encrypted_content`


def make_response_id(prefix: str = "resp") -> str:
    """Returns a new, unguessable id in the format of OpenAI's Responses API, such as `resp_…`."""
    return f"{prefix}_{secrets.token_hex(24)}"


def encode_reasoning(text: str) -> str:
    """Encodes reasoning as `encrypted_content`, for clients that send only this back. It is not encrypted."""
    return ENCODED + base64.urlsafe_b64encode(text.encode()).decode()


def decode_reasoning(encoded: str) -> str | None:
    """Decodes the result of `encode_reasoning`; returns None for content from another server."""
    if not encoded.startswith(ENCODED):
        return None
    try:
        return base64.b64decode(encoded.removeprefix(ENCODED), b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        return None


@dataclasses.dataclass
class Item:
    """An output item (reasoning, message or function call), made from one Harmony message."""

    index: int
    kind: Kind
    channel: str | None
    call: Call | None
    id: str = ""
    texts: list[str] = dataclasses.field(default_factory=list)
    logprobs: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.id = make_response_id(ID_PREFIXES[self.kind])

    @property
    def text(self) -> str:
        return "".join(self.texts)


class ResponseEvents:
    """Builds a response from deltas; each method returns the stream events.

    `response` is the current JSON of the response. Events hold copies of it.
    """

    def __init__(
        self,
        response: dict[str, Any],
        harmony: Harmony,
        *,
        has_logprobs: bool = False,
        has_encoded_reasoning: bool = False,
    ) -> None:
        """`response` holds the request's settings; output, status and usage are added as they arrive."""
        self.response = {**response, "status": "in_progress", "output": []}
        self._harmony = harmony
        self._has_logprobs, self._has_encoded_reasoning = has_logprobs, has_encoded_reasoning
        self._num_events = 0
        self._message: int | None = None  # index of the Harmony message that `_item` is made from
        self._item: Item | None = None  # the item in progress
        self._num_items = 0
        self._has_result = False  # has a message or a call

    def start(self) -> list[Event]:
        """Returns the first events."""
        return [self._lifecycle("response.created"), self._lifecycle("response.in_progress")]

    def add(self, deltas: Iterable[Delta]) -> list[Event]:
        """Returns the events for the next deltas."""
        events: list[Event] = []
        for delta in deltas:
            if delta.message != self._message:
                events += self._close("completed")
                self._message = delta.message
                events += self._open(delta.kind, delta.channel, delta.call)
            if delta.text or delta.logprobs:
                events.append(self._delta(delta))
        return events

    def finish(self, reason: FinishReason, usage: Mapping[str, Any]) -> list[Event]:
        """Returns the last events; a response that reached its token limit is incomplete."""
        is_cut = reason == "length"
        events = self._close("incomplete" if is_cut else "completed")
        if not (self._has_result or is_cut):  # clients wait for a message
            events += self._open("content", "final", None) + self._close("completed")
        status = "incomplete" if is_cut else "completed"
        self.response["status"] = status
        self.response["incomplete_details"] = {"reason": "max_output_tokens"} if is_cut else None
        self.response["completed_at"] = None if is_cut else int(time.time())
        self.response["usage"] = dict(usage)
        return [*events, self._lifecycle(f"response.{status}")]

    def fail(self, error: ApiError) -> list[Event]:
        """Returns the last events of a response that failed with an error."""
        events = self._close("incomplete")
        self.response["status"] = "failed"
        self.response["error"] = {"code": "server_error", "message": error.message}
        return [*events, self._lifecycle("response.failed")]

    def _event(self, name: str, **data: Any) -> Event:
        event = {"type": name, "sequence_number": self._num_events, **data}
        self._num_events += 1
        return name, event

    def _lifecycle(self, name: str) -> Event:
        return self._event(name, response={**self.response, "output": list(self.response["output"])})

    @property
    def _open_item(self) -> Item:
        assert self._item is not None
        return self._item

    def _item_event(self, name: str, **data: Any) -> Event:
        """Makes an event for the open item, which has a single content part."""
        item = self._open_item
        place: dict[str, Any] = {"item_id": item.id, "output_index": item.index}
        if item.kind != "call":
            place["content_index"] = 0
        return self._event(f"response.{name}", **place, **data)

    def _open(self, kind: Kind, channel: str | None, call: Call | None) -> list[Event]:
        self._item = Item(self._num_items, kind, channel, call)
        self._num_items += 1
        self._has_result |= kind != "reasoning"
        shown = self._json("in_progress")
        events = [self._event("response.output_item.added", output_index=self._open_item.index, item=shown)]
        if kind != "call":
            events.append(self._item_event("content_part.added", part=self._part()))
        return events

    def _delta(self, delta: Delta) -> Event:
        self._open_item.texts.append(delta.text)
        if delta.kind == "call":
            return self._item_event("function_call_arguments.delta", delta=delta.text)
        if delta.kind == "reasoning":
            return self._item_event("reasoning_text.delta", delta=delta.text)
        entries = [logprob_json(self._harmony, entry) for entry in delta.logprobs if self._has_logprobs]
        self._open_item.logprobs += entries
        return self._item_event("output_text.delta", delta=delta.text, logprobs=entries)

    def _close(self, status: str) -> list[Event]:
        """Ends the open item if there is one."""
        item = self._item
        if item is None:
            return []
        if item.kind == "call":
            events = [self._item_event("function_call_arguments.done", arguments=item.text)]
        elif item.kind == "reasoning":
            events = [self._item_event("reasoning_text.done", text=item.text)]
        else:
            logprobs = list(item.logprobs)
            events = [self._item_event("output_text.done", text=item.text, logprobs=logprobs)]
        if item.kind != "call":
            events.append(self._item_event("content_part.done", part=self._part()))
        finished = self._json(status)
        events.append(self._event("response.output_item.done", output_index=item.index, item=finished))
        self.response["output"].append(finished)
        self._item = None
        return events

    def _part(self) -> dict[str, Any]:
        """Returns the content part of the open item."""
        item = self._open_item
        if item.kind == "reasoning":
            return {"type": "reasoning_text", "text": item.text}
        logprobs = list(item.logprobs)
        return {"type": "output_text", "text": item.text, "annotations": [], "logprobs": logprobs}

    def _json(self, status: str) -> dict[str, Any]:
        """Returns the JSON of the open item, without content while in progress."""
        item = self._open_item
        if item.call is not None:
            call = {"call_id": item.call.id, "name": item.call.name, "arguments": item.text}
            return {"type": "function_call", "id": item.id, "status": status, **call}
        content = [] if status == "in_progress" else [self._part()]
        if item.kind == "reasoning":
            fields = {"type": "reasoning", "id": item.id, "summary": [], "content": content, "status": status}
            if self._has_encoded_reasoning and status != "in_progress":
                fields["encrypted_content"] = encode_reasoning(item.text)
            return fields
        phase = {"phase": PHASES[item.channel]} if item.channel is not None and item.channel in PHASES else {}
        fields = {"type": "message", "id": item.id, "role": "assistant", "status": status, "content": content}
        return fields | phase
