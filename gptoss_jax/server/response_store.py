"""In-memory store of responses, for `previous_response_id`, `item_reference` and `GET`."""

import collections
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

Item = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class StoredResponse:
    """A response, and all items of its conversation including its output."""

    response: Mapping[str, Any]
    items: tuple[Item, ...]
    # Size as JSON. Items shared by several responses count for each.
    num_bytes: int


class ResponseStore:
    """Stores responses with least-recently-used eviction by number and bytes."""

    def __init__(self, max_responses: int = 1024, max_bytes: int = 64 << 20) -> None:
        self.max_responses, self.max_bytes = max_responses, max_bytes
        self.num_bytes = 0
        self._responses: collections.OrderedDict[str, StoredResponse] = collections.OrderedDict()
        self._items: dict[str, Item] = {}  # output items by id

    def __len__(self) -> int:
        return len(self._responses)

    def put(self, response: Mapping[str, Any], items: Sequence[Item], items_bytes: int) -> None:
        """Stores a response and its conversation; `items` are those before its output.

        Evicts the least recently used responses. A response that exceeds the limit alone is not stored.
        """
        output = response["output"]
        num_bytes = num_json_bytes(response) + items_bytes
        if num_bytes > self.max_bytes or self.max_responses < 1:
            return
        self._responses[response["id"]] = StoredResponse(response, (*items, *output), num_bytes)
        self._items |= {item["id"]: item for item in output}
        self.num_bytes += num_bytes
        while len(self._responses) > self.max_responses or self.num_bytes > self.max_bytes:
            self.delete(next(iter(self._responses)))

    def get(self, name: str) -> StoredResponse | None:
        """Returns a response and marks it as most recently used; None if it is not stored."""
        if name in self._responses:
            self._responses.move_to_end(name)
        return self._responses.get(name)

    def item(self, name: str) -> Item | None:
        """Returns an output item of a stored response; None if it is not stored."""
        return self._items.get(name)

    def delete(self, name: str) -> bool:
        """Deletes a response; returns False if it is not stored."""
        stored = self._responses.pop(name, None)
        if stored is None:
            return False
        self.num_bytes -= stored.num_bytes
        for item in stored.response["output"]:
            self._items.pop(item["id"], None)
        return True


def num_json_bytes(value: Any) -> int:
    """Returns the size of a value in bytes as ASCII JSON."""
    return len(json.dumps(value))
