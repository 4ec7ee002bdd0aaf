"""Rows with a prompt, whose answers are sampled and rewarded."""

from collections.abc import Mapping
from typing import Any

from gptoss_jax.data.chat_messages import TrainMessage, harmony_messages
from gptoss_jax.data.chat_rows import PAIRS, Row, RowError, read_conversation, without_none
from gptoss_jax.data.harmony import ASSISTANT, Reasoning
from gptoss_jax.data.preference_rows import SHARED_FIELDS, history_length

FORMAT = "prompts"
# Fields with the text or the messages of a prompt, in the order of preference.
QUESTIONS = ("prompt", *dict.fromkeys(pair[0] for pair in PAIRS if pair[0] != "prompt"), "problem")
ALLOWED = "prompt, messages, conversations, question, query, problem, or instruction"
# Fields with the expected answer, in the order of preference.
ANSWERS = ("answer", "solution", "completion", "response", "output")
# Fields with messages, and the fields of the answer that is added to those that have none.
CONVERSATIONS: Mapping[str, Mapping[str, str]] = {
    "messages": {"role": ASSISTANT, "content": "."},
    "conversations": {"from": "gpt", "value": "."},
}


def read_prompt(row: Row, default_effort: Reasoning = "medium") -> list[TrainMessage]:
    """Returns the messages of a row up to the user's last one.

    A row has `prompt` (text or messages), or one of the formats of conversations, whose last answer may be
    missing. Raises RowError for another row.
    """
    row = without_none(row)
    rest = {field: row[field] for field in SHARED_FIELDS if field in row}
    asked = next((name for name in QUESTIONS if name in row), None)
    conversation = next((name for name in CONVERSATIONS if name in row), None)
    given: dict[str, Any]
    if conversation is not None and "prompt" not in row:
        messages = row[conversation]
        is_list = isinstance(messages, list)
        given = {conversation: [*messages, CONVERSATIONS[conversation]] if is_list else messages}
        if is_list and _ends_with_answer(messages):
            given[conversation] = messages
    elif asked is not None:
        is_answered = isinstance(row[asked], list) and _ends_with_answer(row[asked])
        given = {"messages": row[asked]} if is_answered else {"prompt": row[asked], "completion": "."}
    elif "instruction" in row:
        given = {name: row[name] for name in ("instruction", "input", "history") if name in row}
        given["output"] = "."
    else:
        fields = ", ".join(sorted(map(str, row))) or "none"
        raise RowError("unknown format", f"its fields are {fields}: must be {ALLOWED}")
    messages = harmony_messages(read_conversation(rest | given), default_effort)
    return messages[: history_length(messages)]


def _ends_with_answer(messages: list[Any]) -> bool:
    last = messages[-1] if messages and isinstance(messages[-1], dict) else {}
    return last.get("role", last.get("from")) in (ASSISTANT, "gpt", "chatgpt", "function_call")


def expected_answer(row: Row) -> str | None:
    """Returns the answer that a row expects: one of its `ANSWERS`, or the last message of the assistant; None
    if it has neither, or only blank ones."""
    found = [row.get(name) for name in ANSWERS]
    for name, content in (("messages", "content"), ("conversations", "value")):
        messages = row.get(name)
        if isinstance(messages, list) and _ends_with_answer(messages):
            found.append(messages[-1].get(content))
    texts = (
        str(one).strip() for one in found if isinstance(one, str | int | float) and not isinstance(one, bool)
    )
    return next(filter(None, texts), None)
