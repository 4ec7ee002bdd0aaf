"""Conversations as prompts: in Harmony, gpt-oss's chat format, or as plain completion for a base model."""

import dataclasses
import os
from collections.abc import Sequence

from gptoss_jax.checkpoints.run_params import is_run
from gptoss_jax.config import TrainConfig
from gptoss_jax.config.paths import user_path
from gptoss_jax.data import harmony
from gptoss_jax.data.chat_rows import is_chat_source
from gptoss_jax.data.harmony import Harmony, Part
from gptoss_jax.data.tokenizer import Tokenizer
from gptoss_jax.inference.detokenizer import StreamingDetokenizer
from gptoss_jax.inference.sampling_params import SamplingParams

# Defaults for text that a base model continues.
PLAIN = SamplingParams(max_new_tokens=200, temperature=0.8)


@dataclasses.dataclass(frozen=True)
class ModelKind:
    """How a model is prompted."""

    is_chat: bool  # in Harmony; else plain completion
    has_date: bool  # its system message names today's date


def find_model_kind(folder: str | os.PathLike, tokenizer: Tokenizer) -> ModelKind:
    """Returns the kind of the model in a folder: that of the adapter, if there is one.

    A tokenizer with Harmony's special tokens marks a chat model, except in a run of train.py that began at
    random on plain text: `bpe:SIZE` has these tokens, too.
    """
    folder = user_path(folder, "folder")
    run = TrainConfig.load(folder / "config.json") if is_run(folder) else None
    on_rows = run is not None and is_chat_source(run.data.source)
    is_base = run is not None and not on_rows and run.init_from is None
    # Rows of conversations have no date unless they name one.
    return ModelKind(harmony.is_harmony(tokenizer) and not is_base, has_date=not on_rows)


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
