"""Prompt rendering for chats: Harmony (gpt-oss's chat format) for chat models, raw text for base models."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from gptoss_jax.checkpoints.run_params import is_run
from gptoss_jax.config import TrainConfig
from gptoss_jax.config.paths import user_path
from gptoss_jax.data import harmony
from gptoss_jax.data.chat_rows import is_chat_source
from gptoss_jax.data.harmony import Harmony, Part
from gptoss_jax.data.tokenizer import Tokenizer
from gptoss_jax.inference.detokenizer import StreamingDetokenizer
from gptoss_jax.inference.generate import generate
from gptoss_jax.inference.sampling_params import SamplingParams
from gptoss_jax.model.transformer import Transformer

# Default sampling parameters for base models.
PLAIN = SamplingParams(max_new_tokens=200, temperature=0.8)


@dataclasses.dataclass(frozen=True)
class ModelKind:
    """How to prompt a model."""

    is_chat: bool  # with Harmony; otherwise with raw text
    has_date: bool  # the system message contains the current date


def find_model_kind(folder: str | os.PathLike, tokenizer: Tokenizer) -> ModelKind:
    """Returns the kind of model in a folder; for an adapter, the kind that it was trained as.

    A model whose tokenizer has Harmony's special tokens is a chat model, except for a training run from
    random weights on plain text: `bpe:SIZE` tokenizers have these tokens too.
    """
    folder = user_path(folder, "folder")
    run = TrainConfig.load(folder / "config.json") if is_run(folder) else None
    on_rows = run is not None and is_chat_source(run.data.source)
    is_base = run is not None and not on_rows and run.init_from is None
    # Chat training data has no date in its system message unless a row specifies one.
    return ModelKind(harmony.is_harmony(tokenizer) and not is_base, has_date=not on_rows)


class HarmonyConversation:
    """A multi-turn conversation with a chat model.

    `params` are the default sampling parameters, including the stop tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        reasoning: harmony.Reasoning = "medium",
        instructions: str | None = None,
        date: str | None = None,
    ) -> None:
        """`instructions` become the developer message; `date` is YYYY-MM-DD, see `harmony.system`."""
        self._format = Harmony(tokenizer)
        stop_tokens = self._format.stop_tokens
        self.params = SamplingParams(max_new_tokens=4096, temperature=1.0, stop_tokens=stop_tokens)
        self._first = [harmony.system(reasoning, date)]
        if instructions:
            self._first.append(harmony.developer(instructions))
        self.clear()

    def prompt(self, text: str) -> list[int]:
        """Returns the tokens of the conversation so far plus a new user message."""
        return self._format.render([*self._messages, harmony.user(text)])

    def ask(self, model: Transformer, text: str, **settings: Any) -> list[Part]:
        """Adds a user message and the model's answer to the conversation; returns the answer.

        `settings` take the place of fields of `params`: `max_new_tokens=200`, `temperature=0.0`.
        """
        params = dataclasses.replace(self.params, **settings)
        (answer,) = generate(model, [self.prompt(text)], params)
        reader = self.reader()
        reader.feed(answer.tokens)
        reader.close()
        self.add(text, reader.parts)
        return reader.parts

    def reader(self) -> harmony.AnswerReader:
        """Returns a streaming parser for one completion."""
        return harmony.AnswerReader(self._format)

    def add(self, text: str, reply: list[Part]) -> None:
        """Appends a user message and the assistant's reply."""
        self._messages += [harmony.user(text), *(part.message() for part in reply)]

    def clear(self) -> None:
        """Removes all turns; the system and developer messages stay."""
        self._messages = list(self._first)


class PlainConversation:
    """Text completion with a base model: each line is an independent prompt, without history.

    Same interface as `HarmonyConversation`.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.params = dataclasses.replace(PLAIN, stop_tokens=tokenizer.stop_ids)
        self._tokenizer = tokenizer

    def prompt(self, text: str) -> list[int]:
        return [self._tokenizer.bos_id, *self._tokenizer.encode(text)]

    def reader(self) -> "PlainReader":
        return PlainReader(self._tokenizer)

    def add(self, text: str, reply: list[Part]) -> None:
        pass

    def clear(self) -> None:
        pass


class PlainReader:
    """The interface of `harmony.AnswerReader` for unformatted text: always a single part."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.parts = [Part()]
        self._detokenizer = StreamingDetokenizer(tokenizer)

    def feed(self, tokens: Sequence[int]) -> list[tuple[Part, str]]:
        return [(self.parts[0], self._detokenizer.feed(tokens))]

    def close(self) -> list[tuple[Part, str]]:
        return [(self.parts[0], self._detokenizer.close())]


Conversation = HarmonyConversation | PlainConversation
Reader = harmony.AnswerReader | PlainReader
