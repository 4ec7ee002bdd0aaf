"""Harmony, gpt-oss's chat format, by openai-harmony: conversations to tokens, and an answer's tokens to text.

An answer is messages to channels: `analysis` is the model thinking, `commentary` what it says on the way and
its calls of tools, `final` the answer proper. The format: https://github.com/openai/harmony.
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
# Below the special tokens.
RANKS = 199998
CHANNELS = ("analysis", "commentary", "final")
KNOWLEDGE_CUTOFF = "2024-06"
# A header that is longer is none. Names of tools may have 64 characters.
HEADER_TOKENS = 64
FOLDER = "TIKTOKEN_ENCODINGS_BASE"

Reasoning = Literal["low", "medium", "high"]


@dataclasses.dataclass(eq=False)
class Part:
    """A message of an answer, as far as it has come; without a channel, text that is not in the format.

    `recipient` is the tool that a message calls, `content_type` what its text is, such as `json`.
    """

    channel: str | None = None
    recipient: str | None = None
    content_type: str | None = None
    text: str = ""

    def message(self) -> library.Message:
        """What the conversation remembers; text without a channel was shown as the answer, so it is final."""
        message = library.Message.from_role_and_content(Role.ASSISTANT, self.text)
        message.channel = self.channel or ("commentary" if self.recipient else "final")
        message.recipient, message.content_type = self.recipient, self.content_type
        return message


def is_harmony(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer has the special tokens of the format, with the ids that openai-harmony has."""
    return all(tokenizer.special_tokens.get(f"<|{name}|>") == token for name, token in SPECIAL.items())


def system(
    reasoning: Reasoning = "medium",
    date: str | None = None,
    knowledge_cutoff: str = KNOWLEDGE_CUTOFF,
    channels: Sequence[str] = CHANNELS,
) -> library.Message:
    """The first message: who the model is, what it knows, how much it shall think, and its channels.

    Args:
      reasoning: how much the model thinks before it answers.
      date: today, as YYYY-MM-DD; None says nothing of it.
      knowledge_cutoff: the month that the model's knowledge ends with, as YYYY-MM.
      channels: where the model may speak.
    """
    effort = library.ReasoningEffort[reasoning.upper()]
    content = library.SystemContent(
        reasoning_effort=effort, conversation_start_date=date, knowledge_cutoff=knowledge_cutoff
    )
    return library.Message.from_role_and_content(Role.SYSTEM, content.with_required_channels(list(channels)))


def developer(instructions: str) -> library.Message:
    """The message that says what the user may not change: how to answer, in what language, as whom."""
    content = library.DeveloperContent(instructions=valid_text(instructions))
    return library.Message.from_role_and_content(Role.DEVELOPER, content)


def user(text: str) -> library.Message:
    """What the user says. A special token that it spells is encoded as characters."""
    return library.Message.from_role_and_content(Role.USER, valid_text(text))


def without_old_analysis(messages: Sequence[library.Message]) -> list[library.Message]:
    """A conversation as the model reads it again: what it thought before a final answer is dropped once the
    user has replied to that.

    Analysis that has led to no answer yet stays: the model was interrupted, or has called a tool.
    openai-harmony's own rule (auto_drop_analysis) drops only what stands before the first final answer, and
    takes it back where a later turn has none.
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
    """The format, with the vocabulary of a tokenizer that `is_harmony`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises ValueError for a vocabulary that openai-harmony does not take."""
        self._tokenizer = tokenizer
        self._names = {token: name for name, token in tokenizer.special_tokens.items()}
        self._encoding = _load(tokenizer)

    def render(self, messages: Sequence[library.Message]) -> list[int]:
        """The tokens of a conversation, up to where the model begins to answer; without old analysis."""
        conversation = library.Conversation.from_messages(without_old_analysis(messages))
        # What is to be dropped is gone already.
        keep = library.RenderConversationConfig(auto_drop_analysis=False)
        return self._encoding.render_conversation_for_completion(conversation, Role.ASSISTANT, keep)

    def reader(self) -> "AnswerReader":
        """Reads one answer to what `render` gave."""
        return AnswerReader(self)

    def header(self, tokens: Sequence[int]) -> Part | None:
        """The empty message that a header begins, <|message|> included; None if it is not an assistant's.

        A header with <|start|> names its role; one without goes on from where `render` ends.
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
            # The library takes a single word for a recipient, that of `final <|constrain|>json` too.
            recipient, content_type = None, recipient
        fits = (
            parser.current_role == Role.ASSISTANT
            and parser.current_channel in (None, *CHANNELS)
            and (recipient is None or f"to={recipient}" in written)
            # A marker that is out of place is taken for part of a word.
            and "<|" not in (recipient or "") + (content_type or "").removeprefix("<|constrain|>")
        )
        return Part(parser.current_channel, recipient, content_type) if fits else None

    def spelled(self, token: int) -> bytes:
        """The bytes of a token; those of a special one are its name."""
        if token in self._names or token >= self._tokenizer.vocab_size:
            return self._names.get(token, f"<|reserved_{token}|>").encode()
        return self._tokenizer.decode_bytes([token])


class AnswerReader:
    """The tokens of an answer to its messages, token by token. Nothing that a model may write is an error.

    What is not in the format, or breaks off in a header, becomes text: a part without a channel, in which
    special tokens are spelled out, up to the next <|start|>. A message ends with <|end|>, <|return|> or
    <|call|>, and where they are missing with the next <|start|>.
    """

    def __init__(self, harmony: Harmony) -> None:
        self.parts: list[Part] = []
        self._harmony = harmony
        self._header: list[int] | None = []  # None outside of a header
        self._part: Part | None = None  # what is being read
        self._framed = False  # whether it has a header, and so ends with one of ENDS
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, tokens: Sequence[int]) -> list[tuple[Part, str]]:
        """The parts that have grown with these tokens, in order, each with the text that is new in it.

        The bytes of an unfinished character wait for the rest of it.
        """
        return [piece for token in tokens for piece in self._one(token) if piece[1]]

    def close(self) -> list[tuple[Part, str]]:
        """What is left when no more tokens come: a header without a message, and U+FFFD for a character
        that broke off.
        """
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
    """openai-harmony's encoding, with the ranks of a tokenizer.

    Of its own accord the library takes them from a file that TIKTOKEN_ENCODINGS_BASE names, or from the
    network. The tokenizer has the same ones, so it is given a file of those: byte for byte the published one.
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
