"""Talking with a model: the loop of `gptoss chat`, in Harmony or, with a base model, as plain completion.

`run` is the whole of it. What the user says comes from any iterable of lines and the answers from a `Source`,
so that both can be scripted.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, TextIO

from gptoss_jax.config import ModelConfig
from gptoss_jax.data import harmony
from gptoss_jax.data.harmony import Harmony, Part
from gptoss_jax.data.tokenizer import Tokenizer
from gptoss_jax.inference.detokenizer import StreamingDetokenizer
from gptoss_jax.inference.generate import stream_with_params

HELP = "/new starts over, /exit or Ctrl-D ends, Ctrl-C stops an answer and keeps what it has said"

# (prompt, most new tokens, seed) -> the new tokens in chunks, up to a stop token, which is not among them.
Source = Callable[[list[int], int, int], Iterator[Sequence[int]]]
# Writes text, dim or not.
Write = Callable[[str, bool], None]
Pieces = list[tuple[Part, str]]


class Reader(Protocol):
    """Makes parts of an answer's tokens, as `harmony.AnswerReader` does."""

    parts: list[Part]

    def feed(self, tokens: Sequence[int]) -> Pieces: ...

    def close(self) -> Pieces: ...


class Conversation(Protocol):
    """What has been said, and how a model is asked to go on."""

    stop_tokens: tuple[int, ...]
    max_new_tokens: int  # where the user asks for nothing else
    temperature: float

    def prompt(self, line: str) -> list[int]:
        """The tokens of all that has been said and of a new line."""

    def reader(self) -> Reader:
        """Reads the answer to a prompt."""

    def keep(self, line: str, answer: list[Part]) -> None:
        """Remembers a line and its answer."""

    def clear(self) -> None:
        """Forgets all lines and answers."""


class HarmonyConversation:
    """A conversation with a chat model."""

    max_new_tokens = 4096
    temperature = 1.0

    def __init__(
        self,
        tokenizer: Tokenizer,
        reasoning: harmony.Reasoning = "medium",
        instructions: str | None = None,
        date: str | None = None,
    ) -> None:
        """`instructions` are the developer's, `date` is today as YYYY-MM-DD; see `harmony.system`."""
        self._format = Harmony(tokenizer)
        self.stop_tokens = tuple(dict.fromkeys((*tokenizer.stop_ids, harmony.RETURN, harmony.CALL)))
        self._first = [harmony.system(reasoning, date)]
        if instructions:
            self._first.append(harmony.developer(instructions))
        self.clear()

    def prompt(self, line: str) -> list[int]:
        return self._format.render([*self._messages, harmony.user(line)])

    def reader(self) -> harmony.AnswerReader:
        return self._format.reader()

    def keep(self, line: str, answer: list[Part]) -> None:
        self._messages += [harmony.user(line), *(part.message() for part in answer)]

    def clear(self) -> None:
        self._messages = list(self._first)


class Completion:
    """Each line is a text of its own, which a base model continues."""

    max_new_tokens = 200
    temperature = 0.8

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.stop_tokens = tokenizer.stop_ids

    def prompt(self, line: str) -> list[int]:
        return [self._tokenizer.bos_id, *self._tokenizer.encode(line)]

    def reader(self) -> "PlainReader":
        return PlainReader(self._tokenizer)

    def keep(self, line: str, answer: list[Part]) -> None:
        pass

    def clear(self) -> None:
        pass


class PlainReader:
    """A Reader of text without a format."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.parts = [Part()]
        self._vocab_size = tokenizer.vocab_size
        self._text = StreamingDetokenizer(tokenizer.decode_bytes)

    def feed(self, tokens: Sequence[int]) -> Pieces:
        # The model's table may have more rows than the tokenizer has tokens.
        return [(self.parts[0], self._text.feed([token for token in tokens if token < self._vocab_size]))]

    def close(self) -> Pieces:
        return [(self.parts[0], self._text.close())]


def talk(
    conversation: Conversation,
    lines: Iterable[str],
    source: Source,
    write: Write,
    note: Callable[[str], None],
    context: int,
    max_new_tokens: int,
    *,
    seed: int = 0,
    show_analysis: bool = True,
) -> None:
    """Answers each line until there are no more.

    Args:
      conversation: what to remember, and how to ask.
      lines: what the user says; /new, /help and /exit are commands, and empty lines are nothing.
      source: the model.
      write: shows the answer as it comes; analysis is dim.
      note: shows a line about the chat itself.
      context: the most tokens that the model reads, answer included.
      max_new_tokens: the most tokens of an answer.
      seed: of the first answer; each further one has the next.
      show_analysis: whether the model's thinking is written at all.
    """
    answers = 0
    for line in lines:
        command = line.strip()
        if command == "/exit":
            return
        if command == "/help":
            note(HELP)
        elif command == "/new":
            conversation.clear()
            note("a new conversation")
        elif command:
            prompt = conversation.prompt(line)
            room = min(max_new_tokens, context - len(prompt))
            if room < 1:
                has = f"{len(prompt):,} tokens with this line, and the model reads at most {context:,}"
                note(f"not sent: the conversation has {has}; /new starts over")
                continue
            reader, screen = conversation.reader(), _Screen(write, show_analysis)
            chunks = source(prompt, room, (seed + answers) % 2**32)
            counts, times, interrupted = _read(chunks, reader, screen)
            full = sum(counts) >= room
            # Of what was cut off, half a character or half a header is shown but not remembered.
            parts = [dataclasses.replace(part) for part in reader.parts]
            screen.show(reader.close())
            screen.end()
            said = [part for part in (parts if interrupted or full else reader.parts) if part.text]
            conversation.keep(line, said)
            answers += 1
            remarks = [speed(counts, times)]
            if interrupted:
                remarks.append("stopped")
            elif full and room == max_new_tokens:
                remarks.append(f"stopped at --max-new-tokens {max_new_tokens}")
            elif full:
                remarks.append(f"stopped: the model reads at most {context:,} tokens; /new starts over")
            elif said and said[-1].recipient:
                remarks.append(f"a call of {said[-1].recipient}, but no tools are connected")
            note(" · ".join(remarks))


def _read(
    chunks: Iterator[Sequence[int]], reader: Reader, screen: "_Screen"
) -> tuple[list[int], list[float], bool]:
    """Shows an answer while it comes: how many tokens came in each chunk and when, and whether Ctrl-C ended
    it.
    """
    counts, times = [], []
    try:
        for tokens in chunks:
            counts.append(len(tokens))
            times.append(time.monotonic())
            screen.show(reader.feed(tokens))
    except KeyboardInterrupt:
        return counts, times, True
    return counts, times, False


class _Screen:
    """Shows the parts of one answer, a blank line between them."""

    def __init__(self, write: Write, show_analysis: bool) -> None:
        self._write, self._show_analysis = write, show_analysis
        self._part: Part | None = None  # the one that was written last
        self._tail = ""  # its last two characters

    def show(self, pieces: Pieces) -> None:
        for part, text in pieces:
            thought = part.channel == "analysis" and part.recipient is None
            if not text or (thought and not self._show_analysis):
                continue
            if part is not self._part:
                if self._part is not None:
                    self._line_feeds(2)
                if part.recipient:
                    self._write(f"to {part.recipient}: ", True)
                self._part = part
            self._write(text, thought)
            self._tail = (self._tail + text)[-2:]

    def end(self) -> None:
        self._line_feeds(1)

    def _line_feeds(self, count: int) -> None:
        there = len(self._tail) - len(self._tail.rstrip("\n"))
        self._write("\n" * (count - there), False)
        self._tail = ""


def speed(counts: Sequence[int], times: Sequence[float]) -> str:
    """How many tokens came in chunks of `counts` tokens at `times` in seconds, and how fast."""
    rate = "–"
    if times and times[-1] > times[0]:
        # The first chunk has waited for the prompt and the compiler, which says nothing of decoding.
        rate = f"{sum(counts[1:]) / (times[-1] - times[0]):,.1f}"
    made = sum(counts)
    return f"{made:,} token{'s' * (made != 1)} · {rate} tokens/s"


def typed_lines(file: TextIO, sign: str) -> Iterator[str]:
    """The lines of a file; those of a terminal are asked for with a sign, and can be edited and recalled.

    Ctrl-D ends them, and so does Ctrl-C where nothing has been typed; else it drops what has.
    """
    if not file.isatty():
        for line in file:
            yield line.removesuffix("\n")
        return
    try:
        import readline  # input() uses it once it is there

        typed = readline.get_line_buffer
    except ImportError:
        typed = str
    while True:
        try:
            line = input(sign)
        except (EOFError, KeyboardInterrupt) as error:
            print()
            if isinstance(error, KeyboardInterrupt) and typed():
                continue
            return
        yield line


def run(
    config: ModelConfig,
    params: dict,
    conversation: Conversation,
    lines: Iterable[str],
    write: Write,
    note: Callable[[str], None],
    *,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 0,
    show_analysis: bool = True,
) -> None:
    """`talk` with a model. None for `max_new_tokens` and `temperature` is what suits the conversation.

    Raises ValueError before the first line is read for settings that `generate.generate` does not take, and
    where the model has too small a vocabulary or context for the conversation's beginning.
    """
    if max_new_tokens is None:
        max_new_tokens = conversation.max_new_tokens
    if temperature is None:
        temperature = conversation.temperature

    def source(prompt: list[int], most: int, seed: int) -> Iterator[Sequence[int]]:
        chunks = stream_with_params(
            config, params, [prompt], most, temperature, top_k, top_p, min_p,
            stop_tokens=conversation.stop_tokens, seed=seed,
        )  # fmt: skip
        return (tokens for (tokens,) in chunks)

    context = config.max_position_embeddings
    beginning = conversation.prompt("")
    source(beginning, min(max_new_tokens, max(context - len(beginning), 1)), seed)  # checks, and does not run
    talk(
        conversation, lines, source, write, note, context, max_new_tokens, seed=seed,
        show_analysis=show_analysis,
    )  # fmt: skip
