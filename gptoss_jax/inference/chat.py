"""Conversations as prompts: in Harmony, gpt-oss's chat format, or as plain completion for a base model."""

import dataclasses
from collections.abc import Sequence

from gptoss_jax.data import harmony
from gptoss_jax.data.harmony import Harmony, Part
from gptoss_jax.data.tokenizer import Tokenizer
from gptoss_jax.inference.detokenizer import StreamingDetokenizer
from gptoss_jax.inference.sampling_params import SamplingParams

# Defaults for text that a base model continues.
PLAIN = SamplingParams(max_new_tokens=200, temperature=0.8)


class HarmonyConversation:
    """A conversation with a chat model.

    `params` are the default sampling parameters of an answer, stop tokens included.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        reasoning: harmony.Reasoning = "medium",
        instructions: str | None = None,
        date: str | None = None,
    ) -> None:
        """`instructions` go into the developer message; `date` is YYYY-MM-DD, see `harmony.system`."""
        self._format = Harmony(tokenizer)
        ends = (*tokenizer.stop_ids, self._format.return_id, self._format.call)
        stop_tokens = tuple(dict.fromkeys(ends))
        self.params = SamplingParams(max_new_tokens=4096, temperature=1.0, stop_tokens=stop_tokens)
        self._first = [harmony.system(reasoning, date)]
        if instructions:
            self._first.append(harmony.developer(instructions))
        self.clear()

    def prompt(self, text: str) -> list[int]:
        """Returns the tokens of the conversation with a new message of the user."""
        return self._format.render([*self._messages, harmony.user(text)])

    def reader(self) -> harmony.AnswerReader:
        """Returns a parser for one answer."""
        return harmony.AnswerReader(self._format)

    def add(self, text: str, answer: list[Part]) -> None:
        """Appends a message of the user and its answer."""
        self._messages += [harmony.user(text), *(part.message() for part in answer)]

    def clear(self) -> None:
        """Removes all messages of the user and their answers."""
        self._messages = list(self._first)


class PlainConversation:
    """Plain completion with a base model: every line is a separate text to continue.

    Has the methods of `HarmonyConversation`.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.params = dataclasses.replace(PLAIN, stop_tokens=tokenizer.stop_ids)
        self._tokenizer = tokenizer

    def prompt(self, text: str) -> list[int]:
        return [self._tokenizer.bos_id, *self._tokenizer.encode(text)]

    def reader(self) -> "PlainReader":
        return PlainReader(self._tokenizer)

    def add(self, text: str, answer: list[Part]) -> None:
        pass

    def clear(self) -> None:
        pass


class PlainReader:
    """`harmony.AnswerReader` for text without a format: a single part."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.parts = [Part()]
        self._detokenizer = StreamingDetokenizer(tokenizer)

    def feed(self, tokens: Sequence[int]) -> list[tuple[Part, str]]:
        return [(self.parts[0], self._detokenizer.feed(tokens))]

    def close(self) -> list[tuple[Part, str]]:
        return [(self.parts[0], self._detokenizer.close())]


Conversation = HarmonyConversation | PlainConversation
Reader = harmony.AnswerReader | PlainReader
