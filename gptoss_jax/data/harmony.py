"""Harmony, gpt-oss's chat format (https://github.com/openai/harmony): rendering and streaming parsing.

An answer consists of messages in channels: `analysis` is reasoning, `commentary` has preambles and tool
calls, and `final` is the answer to the user. Any tokenizer with the format's special tokens is supported;
with gpt-oss's vocabulary, the tokens equal those of openai-harmony.
"""

import codecs
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from gptoss_jax.data.harmony_tools import tools_section
from gptoss_jax.data.special_tokens import HARMONY_TOKENS
from gptoss_jax.data.tokenizer import Tokenizer

SYSTEM, DEVELOPER, USER, ASSISTANT = "system", "developer", "user", "assistant"
CHANNELS = ("analysis", "commentary", "final")
CONSTRAIN = "<|constrain|>"
FUNCTIONS = "functions."  # the namespace of a developer message's functions
TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
IDENTITY = "You are ChatGPT, a large language model trained by OpenAI."
KNOWLEDGE_CUTOFF = "2024-06"
# Maximum length of a header. Tool names may have 64 characters.
HEADER_TOKENS = 64

Reasoning = Literal["low", "medium", "high"]
Piece = int | str  # a special token's id, or text that is encoded separately


@dataclasses.dataclass(frozen=True)
class Message:
    """A message of a conversation.

    `role` is the role of the author or, for a tool, its name, such as `functions.get_weather`. `recipient` is
    the called tool, or `assistant` for a tool result; `content_type` is the format of the text.
    """

    role: str
    text: str
    channel: str | None = None
    recipient: str | None = None
    content_type: str | None = None

    @property
    def is_call(self) -> bool:
        return self.role == ASSISTANT and self.recipient is not None


@dataclasses.dataclass(eq=False)
class Part:
    """A message of an answer, possibly unfinished. Without a channel, it is malformed text.

    `recipient` is the tool that a message calls, `content_type` the format of its text, such as `json`.
    """

    channel: str | None = None
    recipient: str | None = None
    content_type: str | None = None
    text: str = ""

    def message(self) -> Message:
        """Returns the message for the conversation. Text without a channel, shown as the answer, is final."""
        channel = self.channel or ("commentary" if self.recipient else "final")
        return Message(ASSISTANT, self.text, channel, self.recipient, self.content_type)


# A part, the text that a token completes in it, and the token; without a token, the part has ended.
Step = tuple[Part, str, int | None]


def is_harmony(tokenizer: Tokenizer) -> bool:
    """Returns True if a tokenizer has the format's special tokens."""
    return tokenizer.special_tokens.keys() >= set(HARMONY_TOKENS)


def system(
    reasoning: Reasoning = "medium",
    date: str | None = None,
    knowledge_cutoff: str = KNOWLEDGE_CUTOFF,
    channels: Sequence[str] = CHANNELS,
    has_functions: bool = False,
) -> Message:
    """Returns the system message.

    Args:
      reasoning: reasoning effort.
      date: current date, as YYYY-MM-DD; None omits it.
      knowledge_cutoff: last month of the training data, as YYYY-MM.
      channels: the valid channels of an answer.
      has_functions: True if the developer message declares functions.
    """
    about = [IDENTITY, f"Knowledge cutoff: {knowledge_cutoff}"]
    about += [] if date is None else [f"Current date: {date}"]
    valid = f"# Valid channels: {', '.join(channels)}. Channel must be included for every message."
    if has_functions:
        valid += "\nCalls to these tools must go to the commentary channel: 'functions'."
    return Message(SYSTEM, "\n\n".join(["\n".join(about), f"Reasoning: {reasoning}", valid]))


def developer(
    instructions: str | None = None,
    functions: Sequence[Mapping[str, Any]] = (),
    response_format: str | None = None,
) -> Message:
    """Returns the developer message: instructions, which take precedence over the user's, and functions.

    Each function has `name`, and optionally `description` and `parameters`, a JSON schema. `response_format`
    is a section from `harmony_tools.response_formats_section`.
    """
    sections = [] if instructions is None else ["# Instructions", instructions]
    sections += [tools_section(functions)] if functions else []
    sections += [] if response_format is None else [response_format]
    return Message(DEVELOPER, "\n\n".join(sections))


def user(text: str) -> Message:
    """Returns a user message. Special tokens in the text are encoded as characters."""
    return Message(USER, text)


def call(tool: str, arguments: str) -> Message:
    """Returns the assistant's call of a tool, such as `functions.get_weather`, with arguments as JSON."""
    return Message(ASSISTANT, arguments, "commentary", tool, f"{CONSTRAIN}json")


def result(tool: str, text: str) -> Message:
    """Returns a tool's result."""
    return Message(tool, text, "commentary", ASSISTANT)


def without_old_analysis(messages: Sequence[Message]) -> list[Message]:
    """Drops the analysis before the last final answer that the user has replied to.

    Analysis without a final answer is kept: the model was interrupted, or has called a tool. In contrast,
    openai-harmony (auto_drop_analysis) drops only analysis before the first final answer, and restores it if
    a later turn has none.
    """
    return [messages[i] for i in shown_messages(messages)]


def shown_messages(messages: Sequence[Message]) -> list[int]:
    """Returns the indices of the messages that `without_old_analysis` keeps."""
    kinds = [(message.role, message.channel) for message in messages]
    replied = max((i for i, (role, _) in enumerate(kinds) if role == USER), default=0)
    old = max((i for i in range(replied) if kinds[i] == (ASSISTANT, "final")), default=0)
    return [i for i, kind in enumerate(kinds) if i >= old or kind != (ASSISTANT, "analysis")]


class Harmony:
    """Renders and parses the format with a tokenizer for which `is_harmony` is True."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises ValueError for a tokenizer without the format's special tokens."""
        missing = [name for name in HARMONY_TOKENS if name not in tokenizer.special_tokens]
        if missing:
            raise ValueError(
                f"data.tokenizer is {tokenizer.name!r}: a chat needs Harmony's special tokens, and it has no "
                f"{', '.join(missing)}; o200k_harmony and bpe:SIZE have them"
            )
        self._tokenizer = tokenizer
        self._names = {token: name for name, token in tokenizer.special_tokens.items()}
        ids = [tokenizer.special_tokens[name] for name in HARMONY_TOKENS]
        self.return_id, self.constrain, self.channel, self.start, self.end, self.message, self.call = ids
        self.ends = (self.return_id, self.end, self.call)

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The tokens that end an answer. <|end|> is none of them: more messages follow, such as the final one
        after reasoning."""
        return tuple(dict.fromkeys((*self._tokenizer.stop_ids, self.return_id, self.call)))

    def render(self, messages: Sequence[Message]) -> list[int]:
        """Returns the prompt of a conversation, without old analysis, up to the start of the answer."""
        pieces = [piece for message in without_old_analysis(messages) for piece in self.pieces(message)]
        return [token for tokens in self.encode([*pieces, self.start, ASSISTANT]) for token in tokens]

    def pieces(self, message: Message, is_last: bool = False) -> list[Piece]:
        """Returns a message as special tokens and texts; the first two contain its role.

        Args:
          message: the message.
          is_last: True if it ends an answer to train on: with <|return|>, unless it calls a tool.
        """
        pieces: list[Piece] = [self.start, message.role]
        if message.recipient not in (None, "all"):
            pieces.append(f" to={message.recipient}")
        if message.channel is not None:
            pieces += [self.channel, message.channel]
        if message.content_type is not None and message.content_type.startswith(CONSTRAIN):
            pieces += [" ", self.constrain, message.content_type.removeprefix(CONSTRAIN)]
        elif message.content_type is not None:
            pieces.append(f" {message.content_type}")
        end = self.call if message.is_call else self.return_id if is_last else self.end
        return [*pieces, self.message, message.text, end]

    def encode(self, pieces: Sequence[Piece]) -> list[list[int]]:
        """Returns the tokens of each piece. Encodes equal texts once, on all cores."""
        texts = list(dict.fromkeys(piece for piece in pieces if isinstance(piece, str)))
        encoded = {
            text: ids.tolist() for text, ids in zip(texts, self._tokenizer.encode_batch(texts), strict=True)
        }
        return [encoded[piece] if isinstance(piece, str) else [piece] for piece in pieces]

    def header(self, tokens: Sequence[int]) -> Part | None:
        """Parses a header before <|message|> to an empty message; None if it is not an assistant header.

        A header with <|start|> contains its role; one without continues the prompt of `render`.
        """
        has_role = tokens[0] == self.start
        try:
            text = b"".join(map(self.spelled, tokens[has_role:-1])).decode()
        except UnicodeDecodeError:
            return None
        before, mark, after = text.partition("<|channel|>")
        first_word = re.match(r"[^\s<]*", after) if mark else None
        channel = first_word[0] if first_word else None
        rest = before + after[len(channel or "") :]
        words = re.findall(r"[^ \t\n\r\f]+", rest.strip().replace(CONSTRAIN, f" {CONSTRAIN}"))
        if words[:1] == [ASSISTANT]:
            words.pop(0)
        elif has_role:
            return None
        recipient = words.pop(0).removeprefix("to=") if words and words[0].startswith("to=") else None
        content_type = words.pop(0) if words else None
        # A misplaced marker or a second recipient is not part of a word.
        named = (recipient or "") + (content_type or "").removeprefix(CONSTRAIN)
        is_named = "<|" not in named and recipient != "" and not (content_type or "").startswith("to=")
        is_valid = not words and is_named and channel in (None, *CHANNELS)
        return Part(channel, recipient, content_type) if is_valid else None

    def spelled(self, token: int) -> bytes:
        """Returns the bytes of a token; for a special token, its name."""
        if token in self._names or token >= self._tokenizer.vocab_size:
            return self._names.get(token, f"<|reserved_{token}|>").encode()
        return self._tokenizer.decode_bytes([token])

    def spelled_text(self, tokens: Sequence[int]) -> str:
        """Returns the text of tokens, including the names of special tokens."""
        return b"".join(map(self.spelled, tokens)).decode(errors="replace")

    def prompt_of_last_turn(self, tokens: Sequence[int]) -> tuple[list[int], list[int]]:
        """Returns the prompt of a rendered conversation up to the answer to its last user message, and the
        tokens of that message's text."""
        (start, user), (_, assistant) = self.encode([self.start, USER]), self.encode([self.start, ASSISTANT])
        header = [*start, *user, self.message]
        first = max(i for i in range(len(tokens)) if tokens[i : i + len(header)] == header)
        end = tokens.index(self.end, first) + 1
        return [*tokens[:end], *start, *assistant], list(tokens[first + len(header) : end - 1])


class AnswerReader:
    """Streaming parser of an answer. Never fails, regardless of the generated tokens.

    Malformed tokens, or an unfinished header, become a part without a channel, with the names of special
    tokens as text, up to the next <|start|>. A message ends with <|end|>, <|return|> or <|call|>, or at the
    next <|start|>.
    """

    def __init__(self, harmony: Harmony) -> None:
        self.parts: list[Part] = []
        self._harmony = harmony
        self._header: list[int] | None = []  # None outside of a header
        self._part: Part | None = None  # current part
        self._framed = False  # the part has a header, so an end token ends it
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, tokens: Sequence[int]) -> list[tuple[Part, str]]:
        """Returns the parts with new text, each with that text. Incomplete characters are buffered."""
        pieces = (piece for token in tokens for piece in self.steps(token))
        return [(part, text) for part, text, _ in pieces if text]

    def close(self) -> list[tuple[Part, str]]:
        """Returns the remaining text: a header without a message, U+FFFD for an incomplete character."""
        return [(part, text) for part, text, _ in self.last_steps() if text]

    @property
    def in_header(self) -> bool:
        """True if the last tokens may be an unfinished header; if it turns out invalid, they become text."""
        return bool(self._header)

    def steps(self, token: int) -> Iterator[Step]:
        """Yields the steps that a token causes."""
        harmony = self._harmony
        if token == harmony.start:
            yield from self.last_steps()
            self._header = [token]
        elif self._header is not None:
            self._header.append(token)
            if token == harmony.message and (part := harmony.header(self._header)):
                self._begin(part, framed=True)
            elif token in (harmony.message, *harmony.ends) or len(self._header) > HEADER_TOKENS:
                yield from self._header_as_text()
        elif self._framed and token in harmony.ends:
            yield from self.last_steps()
        else:
            yield self._add(harmony.spelled(token), token)

    def last_steps(self) -> Iterator[Step]:
        """Yields the steps that the end of the answer causes."""
        if self._header:
            yield from self._header_as_text()
        if self._part is not None:
            yield self._add(b"", None)
        self._part, self._framed, self._header = None, False, None

    def _begin(self, part: Part, framed: bool) -> None:
        self.parts.append(part)
        self._part, self._framed, self._header = part, framed, None

    def _header_as_text(self) -> Iterator[Step]:
        tokens = self._header or []
        self._begin(Part(), framed=False)
        for token in tokens:
            yield self._add(self._harmony.spelled(token), token)

    def _add(self, data: bytes, token: int | None) -> Step:
        """Adds the bytes of a token; None ends the part."""
        part = self._part
        if part is None:
            part = Part()
            self._begin(part, framed=False)
        text = self._utf8.decode(data, final=token is None)
        part.text += text
        return part, text, token
