"""Rows with a chosen and a rejected answer, as two conversations with the same history.

Both answers are text or messages, after a shared `prompt` (text or messages), or whole conversations: as
messages, which then may repeat the prompt, or as transcripts in the form of Anthropic's HH-RLHF, whose turns
begin with "\\n\\nHuman: " and "\\n\\nAssistant: ".
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from gptoss_jax.data.chat_messages import TrainMessage, harmony_messages
from gptoss_jax.data.chat_rows import Row, RowError, kind_of, read_conversation, without_none
from gptoss_jax.data.harmony import USER, Reasoning

CHOSEN, REJECTED = "chosen", "rejected"
# Other fields of a row that are used. Some datasets repeat the chosen conversation, as `messages`.
SHARED_FIELDS = ("system", "tools", "reasoning_effort", "chat_template_kwargs", "date")
FORMAT = "pairs (chosen, rejected)"
TRANSCRIPT = re.compile(r"(?:^|\n\n)(Human|Assistant):[ \t]?")
TRANSCRIPT_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclasses.dataclass(frozen=True)
class Pair:
    """The messages of both conversations of a row."""

    chosen: list[TrainMessage]
    rejected: list[TrainMessage]


def read_pair(row: Row, default_effort: Reasoning = "medium") -> Pair:
    """Converts a row to messages.

    Only the last turn is trained on. Raises RowError for a row that is no pair, whose answers are equal, or
    whose conversations differ before the answers.
    """
    row = without_none(row)
    missing = [name for name in (CHOSEN, REJECTED) if name not in row]
    if missing:
        fields = ", ".join(sorted(map(str, row))) or "none"
        raise RowError("unknown format", f"has no {' and no '.join(missing)}; its fields are {fields}")
    sides = {name: _messages(row, name, default_effort) for name in (CHOSEN, REJECTED)}
    histories = [[one.message for one in side[: history_length(side)]] for side in sides.values()]
    if histories[0] != histories[1]:
        raise RowError("different prompts", "chosen and rejected differ before the last answer")
    if [one.message for one in sides[CHOSEN]] == [one.message for one in sides[REJECTED]]:
        raise RowError("equal answers", "chosen and rejected are equal")
    return Pair(sides[CHOSEN], sides[REJECTED])


def _messages(row: Row, name: str, default_effort: Reasoning) -> list[TrainMessage]:
    """Returns the Harmony messages of one side."""
    rest = {field: row[field] for field in SHARED_FIELDS if field in row}
    answer = row[name]
    is_whole = isinstance(answer, list) and any(
        isinstance(one, dict) and one.get("role") == USER for one in answer
    )
    if "prompt" in row and not is_whole:
        given = {"prompt": row["prompt"], "completion": answer}
    else:
        given = {"messages": answer if isinstance(answer, list) else _transcript(answer, name)}
    try:
        return harmony_messages(read_conversation(rest | given), default_effort)
    except RowError as error:
        # Names of fields in the conversation that was made of the row.
        reason = re.sub(r"\b(completion|messages)\b", name, str(error))
        raise RowError(error.kind, reason) from None


def _transcript(text: Any, name: str) -> list[dict[str, str]]:
    """Returns the messages of a transcript."""
    if not isinstance(text, str):
        raise RowError("bad content", f"{name} is {kind_of(text)}: must be text or messages")
    parts = TRANSCRIPT.split(text)
    if parts[0].strip() or len(parts) < 3:
        allowed = (
            'must have a prompt, be messages, or be a transcript with "\\n\\nHuman: " and "\\n\\nAssistant: "'
        )
        raise RowError("no prompt", f"{name} is text without a prompt: {allowed}")
    turns = zip(parts[1::2], parts[2::2], strict=True)
    return [{"role": TRANSCRIPT_ROLES[speaker], "content": said.strip()} for speaker, said in turns]


def history_length(messages: Sequence[TrainMessage]) -> int:
    """Returns the number of messages before the last answer: up to the user's last one."""
    return 1 + max(i for i, one in enumerate(messages) if one.message.role == USER)
