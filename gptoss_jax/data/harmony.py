"""Harmony, gpt-oss's chat format (https://github.com/openai/harmony): rendering and streaming parsing.

An answer has messages in channels: `analysis` is reasoning, `commentary` has preambles and tool calls, and
`final` is the answer for the user.
"""

import base64
import codecs
import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Literal

import openai_harmony as library
from openai_harmony import Role

from gptoss_jax.data.tokenizer import Tokenizer, valid_text

RETURN, CHANNEL, START, END, MESSAGE, CALL = 200002, 200005, 200006, 200007, 200008, 200012
SPECIAL = {"return": RETURN, "channel": CHANNEL, "start": START, "end": END, "message": MESSAGE, "call": CALL}
ENDS = (RETURN, END, CALL)
RANKS = 199998  # tokens below the special ones
CHANNELS = ("analysis", "commentary", "final")
KNOWLEDGE_CUTOFF = "2024-06"
# Longest header. Names of tools may have 64 characters.
HEADER_TOKENS = 64
FOLDER = "TIKTOKEN_ENCODINGS_BASE"

Reasoning = Literal["low", "medium", "high"]


@dataclasses.dataclass(eq=False)
class Part:
    """A message of an answer, possibly unfinished; without a channel, text that is not in the format.

    `recipient` is the tool that a message calls, `content_type` the format of its text, such as `json`.
    """

    channel: str | None = None
    recipient: str | None = None
    content_type: str | None = None
    text: str = ""

    def message(self) -> library.Message:
        """Returns the message for the conversation. Text without a channel was shown as the answer: final."""
        message = library.Message.from_role_and_content(Role.ASSISTANT, self.text)
        message.channel = self.channel or ("commentary" if self.recipient else "final")
        message.recipient, message.content_type = self.recipient, self.content_type
        return message


def is_harmony(tokenizer: Tokenizer) -> bool:
    """Returns True if a tokenizer has the format's special tokens, with the ids of openai-harmony."""
    return all(tokenizer.special_tokens.get(f"<|{name}|>") == token for name, token in SPECIAL.items())


def system(
    reasoning: Reasoning = "medium",
    date: str | None = None,
    knowledge_cutoff: str = KNOWLEDGE_CUTOFF,
    channels: Sequence[str] = CHANNELS,
) -> library.Message:
    """Returns the system message.

    Args:
      reasoning: reasoning effort.
      date: today, as YYYY-MM-DD; None leaves it out.
      knowledge_cutoff: last month of the training data, as YYYY-MM.
      channels: the valid channels of an answer.
    """
    effort = library.ReasoningEffort[reasoning.upper()]
    content = library.SystemContent(
        reasoning_effort=effort, conversation_start_date=date, knowledge_cutoff=knowledge_cutoff
    )
    return library.Message.from_role_and_content(Role.SYSTEM, content.with_required_channels(list(channels)))


def developer(instructions: str) -> library.Message:
    """Returns the developer message, whose instructions take precedence over the user's."""
    content = library.DeveloperContent(instructions=valid_text(instructions))
    return library.Message.from_role_and_content(Role.DEVELOPER, content)


def user(text: str) -> library.Message:
    """Returns a user message. Special tokens in the text are encoded as characters."""
    return library.Message.from_role_and_content(Role.USER, valid_text(text))


def without_old_analysis(messages: Sequence[library.Message]) -> list[library.Message]:
    """Drops the analysis before the last final answer that the user has replied to.

    Analysis without an answer yet stays: the model was interrupted, or has called a tool. openai-harmony's
    own rule (auto_drop_analysis) drops only analysis before the first final answer, and restores it if a
    later turn has none.
    """
    said = [message.author.role for message in messages]
    replied = len(said) - said[::-1].index(Role.USER) - 1 if Role.USER in said else 0
    finals = [i for i in range(replied) if said[i] == Role.ASSISTANT and messages[i].channel == "final"]
    old = finals[-1] if finals else 0
    return [
        message
        for i, message in enumerate(messages)
        if i >= old or said[i] != Role.ASSISTANT or message.channel != "analysis"
    ]


class Harmony:
    """Renders and parses the format with the vocabulary of a tokenizer that `is_harmony`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises ValueError for a vocabulary that openai-harmony does not accept."""
        self._tokenizer = tokenizer
        self._names = {token: name for name, token in tokenizer.special_tokens.items()}
        self._encoding = _load(tokenizer)

    def render(self, messages: Sequence[library.Message]) -> list[int]:
        """Returns the prompt of a conversation, without old analysis, up to the start of the answer."""
        conversation = library.Conversation.from_messages(without_old_analysis(messages))
        keep = library.RenderConversationConfig(auto_drop_analysis=False)
        return self._encoding.render_conversation_for_completion(conversation, Role.ASSISTANT, keep)

    def header(self, tokens: Sequence[int]) -> Part | None:
        """Parses a header up to <|message|> to an empty message; None if it is not one of the assistant.

        A header with <|start|> names its role; one without continues the prompt of `render`.
        """
        parser = library.StreamableParser(self._encoding, None if START in tokens else Role.ASSISTANT)
        try:
            for token in tokens:
                parser.process(token)
        except library.HarmonyError:
            return None
        recipient, content_type = parser.current_recipient, parser.current_content_type
        written = b"".join(map(self.spelled, tokens)).decode(errors="replace")
        if recipient and content_type is None and f"to={recipient}" not in written:
            # The library parses a single word as a recipient, even in `final <|constrain|>json`.
            recipient, content_type = None, recipient
        fits = (
            parser.current_role == Role.ASSISTANT
            and parser.current_channel in (None, *CHANNELS)
            and (recipient is None or f"to={recipient}" in written)
            # The library parses a misplaced marker as part of a word.
            and "<|" not in (recipient or "") + (content_type or "").removeprefix("<|constrain|>")
        )
        return Part(parser.current_channel, recipient, content_type) if fits else None

    def spelled(self, token: int) -> bytes:
        """The bytes of a token; for a special token, its name."""
        if token in self._names or token >= self._tokenizer.vocab_size:
            return self._names.get(token, f"<|reserved_{token}|>").encode()
        return self._tokenizer.decode_bytes([token])


class AnswerReader:
    """Streaming parser of an answer, for any tokens: nothing that a model may generate is an error.

    Tokens that are not in the format, or an unfinished header, become a part without a channel, in which
    special tokens are spelled out, up to the next <|start|>. A message ends with <|end|>, <|return|> or
    <|call|>, or else at the next <|start|>.
    """

    def __init__(self, harmony: Harmony) -> None:
        self.parts: list[Part] = []
        self._harmony = harmony
        self._header: list[int] | None = []  # None outside of a header
        self._part: Part | None = None  # current part
        self._framed = False  # the part has a header, so it ends with one of ENDS
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, tokens: Sequence[int]) -> list[tuple[Part, str]]:
        """Returns the parts with new text, each with that text. Incomplete characters are buffered."""
        return [piece for token in tokens for piece in self._one(token) if piece[1]]

    def close(self) -> list[tuple[Part, str]]:
        """Returns the remaining text: a header without a message, U+FFFD for an incomplete character."""
        return [piece for piece in self._finish() if piece[1]]

    def _one(self, token: int) -> Iterator[tuple[Part, str]]:
        if token == START:
            yield from self._finish()
            self._header = [token]
        elif self._header is not None:
            self._header.append(token)
            if token == MESSAGE and (part := self._harmony.header(self._header)):
                self._begin(part, framed=True)
            elif token in (MESSAGE, *ENDS) or len(self._header) > HEADER_TOKENS:
                yield from self._header_as_text()
        elif self._framed and token in ENDS:
            yield from self._finish()
        else:
            yield self._add(self._harmony.spelled(token))

    def _begin(self, part: Part, framed: bool) -> None:
        self.parts.append(part)
        self._part, self._framed, self._header = part, framed, None

    def _finish(self) -> Iterator[tuple[Part, str]]:
        if self._header:
            yield from self._header_as_text()
        if self._part is not None:
            yield self._add(b"", final=True)
        self._part, self._framed, self._header = None, False, None

    def _header_as_text(self) -> Iterator[tuple[Part, str]]:
        tokens = self._header
        self._begin(Part(), framed=False)
        for token in tokens:
            yield self._add(self._harmony.spelled(token))

    def _add(self, data: bytes, final: bool = False) -> tuple[Part, str]:
        if self._part is None:
            self._begin(Part(), framed=False)
        text = self._utf8.decode(data, final)
        self._part.text += text
        return self._part, text


def _load(tokenizer: Tokenizer) -> library.HarmonyEncoding:
    """Loads openai-harmony's encoding with the ranks of a tokenizer.

    The library reads them from a file in TIKTOKEN_ENCODINGS_BASE, or from the network. The tokenizer has the
    same ranks, so we write them to such a file, equal to the published one.
    """
    lines = (b"%s %d\n" % (base64.b64encode(tokenizer.decode_bytes([rank])), rank) for rank in range(RANKS))
    before = os.environ.get(FOLDER)
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / "o200k_base.tiktoken").write_bytes(b"".join(lines))
        os.environ[FOLDER] = folder
        try:
            return library.load_harmony_encoding(library.HarmonyEncodingName.HARMONY_GPT_OSS)
        except library.HarmonyError as error:
            reason = f"openai-harmony does not take its vocabulary ({error})"
            raise ValueError(f"tokenizer is {tokenizer.name!r}: {reason}") from None
        finally:
            if before is None:
                del os.environ[FOLDER]
            else:
                os.environ[FOLDER] = before
