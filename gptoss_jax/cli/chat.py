"""`gptoss chat`: a conversation with a chat model in Harmony, or plain completion with a base model."""

import codecs
import dataclasses
import io
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, TextIO

import tyro

from gptoss_jax.cli.arguments import Folder, OptionalText, Sampling, SamplingFlags
from gptoss_jax.cli.model import open_model
from gptoss_jax.config import require
from gptoss_jax.interrupts import patient
from gptoss_jax.status import until_first

if TYPE_CHECKING:
    from gptoss_jax.cli.terminal import Write
    from gptoss_jax.data.harmony import Part
    from gptoss_jax.data.tokenizer import Tokenizer
    from gptoss_jax.inference.chat import Conversation
    from gptoss_jax.inference.sampling_params import SamplingParams
    from gptoss_jax.model.transformer import Transformer

HELP = "/new starts a new conversation, /exit or Ctrl-D exits, Ctrl-C stops an answer and keeps what it said"


@dataclasses.dataclass(frozen=True)
class Chat:
    """Chat with a model in the terminal.

    A chat model answers in Harmony, gpt-oss's chat format. A base model continues each line as a separate
    text. Ctrl-C stops an answer, /new starts a new conversation, and /exit or Ctrl-D leaves.

    Examples:
      gptoss chat runs/quickstart-sft
      gptoss chat hf:openai/gpt-oss-20b --reasoning low --instructions "Answer in French."
      echo "What is 2 + 2?" | gptoss chat hf:openai/gpt-oss-20b --analysis hide
    """

    # Model: a run folder, a Hugging Face folder, or hf:OWNER/NAME to download one from the Hugging Face Hub.
    # It is a chat model if its tokenizer has Harmony's special tokens, unless it is a run that was trained
    # from scratch on plain text.
    folder: Folder
    # LoRA adapter to apply: a PEFT folder, or a run that trained adapters.
    adapter: OptionalText = None
    # Mesh of devices to split the model over, such as tensor=2. (default: one device)
    mesh: OptionalText = None
    # Reasoning effort of a chat model.
    reasoning: Literal["low", "medium", "high"] = "medium"
    # Developer message for a chat model, such as "Answer in French."
    instructions: OptionalText = None
    # Show a chat model's reasoning (dimmed) or hide it.
    analysis: Literal["show", "hide"] = "show"
    # Treat a chat model as a base model.
    plain: tyro.conf.FlagCreatePairsOff[bool] = False
    sampling: Sampling = SamplingFlags()

    def run(self) -> None:
        with open_model(self.folder, self.adapter, self.mesh) as (model, tokenizer):
            self._run(model, tokenizer)

    def _run(self, model: "Transformer", tokenizer: "Tokenizer") -> None:
        from gptoss_jax.cli.terminal import writer
        from gptoss_jax.inference.engine import Engine
        from gptoss_jax.inference.generate import stream_one

        write_error = writer(sys.stderr)

        def note(text: str) -> None:
            write_error(text + "\n", True)

        conversation = self._conversation(tokenizer, note)
        params = self.sampling.update(conversation.params)
        max_context = model.config.max_position_embeddings
        # One for the whole conversation: it keeps what it has read, so each turn reads only what is new.
        engine = Engine(model, tokenizer, num_slots=1)

        def answer(prompt: list[int], params: "SamplingParams") -> Iterator[list[int]]:
            return (part.tokens for part in stream_one(engine, prompt, params))

        # Checks the settings and the start of the conversation; decodes nothing.
        start = conversation.prompt("")
        left = max(max_context - len(start), 1)
        engine.check(start, dataclasses.replace(params, max_new_tokens=min(params.max_new_tokens, left)))
        # Bytes that are not text must not end the chat. The ASCII of LC_ALL=C is read as UTF-8.
        is_ascii = codecs.lookup(sys.stdin.encoding).name == "ascii"
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8" if is_ascii else None, errors="replace")
        if sys.stdin.isatty():
            note(HELP)
        session = Session(
            conversation, params, max_context, answer, writer(sys.stdout), note, self.analysis == "show"
        )
        with patient("stopping the answer; press Ctrl-C again to leave the chat"):
            session.run(read_lines(sys.stdin, "> " if sys.stdout.isatty() else ""))

    def _conversation(self, tokenizer: "Tokenizer", note: Callable[[str], None]) -> "Conversation":
        import datetime

        from gptoss_jax.config.paths import user_text
        from gptoss_jax.inference.chat import HarmonyConversation, PlainConversation, find_model_kind

        kind = find_model_kind(self.folder if self.adapter is None else self.adapter, tokenizer)
        if kind.is_chat and not self.plain:
            instructions = None if self.instructions is None else user_text(self.instructions)
            today = datetime.date.today().isoformat() if kind.has_date else None
            return HarmonyConversation(tokenizer, self.reasoning, instructions, today)
        unused = "must be left out for plain completion"
        require(self.instructions is None, "instructions", self.instructions, unused)
        note("plain completion: every line is a separate text to continue")
        return PlainConversation(tokenizer)


@dataclasses.dataclass
class Session:
    """Answers the user's lines in one conversation."""

    conversation: "Conversation"
    params: "SamplingParams"  # of the first answer; each later one has the next seed
    max_context: int  # tokens of a prompt and its answer
    answer: Callable[[list[int], "SamplingParams"], Iterator[Sequence[int]]]  # streams tokens
    write: "Write"
    note: Callable[[str], None]  # prints a line about the chat itself
    show_analysis: bool = True
    num_answers: int = 0

    def run(self, lines: Iterable[str]) -> None:
        """Handles lines until they end or one is /exit. Empty lines are skipped."""
        for line in lines:
            command = line.strip()
            if command == "/exit":
                return
            if command == "/help":
                self.note(HELP)
            elif command == "/new":
                self.conversation.clear()
                self.note("new conversation")
            elif command:
                self._answer(line)

    def _answer(self, line: str) -> None:
        from gptoss_jax.cli.terminal import Throughput

        prompt = self.conversation.prompt(line)
        left = self.max_context - len(prompt)
        if left < 1:
            has = f"{len(prompt):,} tokens with this line; the model's limit is {self.max_context:,}"
            self.note(f"not sent: the conversation has {has}. /new starts a new one")
            return
        params = dataclasses.replace(
            self.params,
            max_new_tokens=min(self.params.max_new_tokens, left),
            seed=(self.params.seed + self.num_answers) % 2**32,
        )
        self.num_answers += 1
        reader, printer = self.conversation.reader(), _Printer(self.write, self.show_analysis)
        throughput, is_interrupted = Throughput(), False
        # A longer conversation may compile again, for a longer cache.
        waiting = "compiling" if self.num_answers == 1 else "reading"
        answer = until_first(waiting, self.answer(prompt, params))
        try:
            for tokens in throughput.count(answer):
                printer.show(reader.feed(tokens))
        except KeyboardInterrupt:
            is_interrupted = True
        is_full = throughput.num_tokens >= params.max_new_tokens
        # Of an answer that was cut off, half a character or half a header is shown but not remembered.
        parts = [dataclasses.replace(part) for part in reader.parts]
        printer.show(reader.close())
        printer.end()
        parts = [part for part in (parts if is_interrupted or is_full else reader.parts) if part.text]
        self.conversation.add(line, parts)
        remarks = [str(throughput)]
        if is_interrupted:
            remarks.append("stopped")
        elif is_full and params.max_new_tokens == self.params.max_new_tokens:
            remarks.append(f"stopped at --max-new-tokens {params.max_new_tokens}")
        elif is_full:
            remarks.append(f"stopped at the model's limit of {self.max_context:,} tokens; /new starts over")
        elif parts and parts[-1].recipient:
            remarks.append(f"calls {parts[-1].recipient}, but no tools are connected")
        self.note(" · ".join(remarks))


class _Printer:
    """Prints the parts of one answer, separated by blank lines."""

    def __init__(self, write: "Write", show_analysis: bool) -> None:
        self._write, self._show_analysis = write, show_analysis
        self._part: Part | None = None  # the latest one
        self._tail = ""  # its last two characters

    def show(self, pieces: "Iterable[tuple[Part, str]]") -> None:
        for part, text in pieces:
            is_analysis = part.channel == "analysis" and part.recipient is None
            if not text or (is_analysis and not self._show_analysis):
                continue
            if part is not self._part:
                if self._part is not None:
                    self._end_lines(2)
                if part.recipient:
                    self._write(f"to {part.recipient}: ", True)
                self._part = part
            self._write(text, is_analysis)
            self._tail = (self._tail + text)[-2:]

    def end(self) -> None:
        self._end_lines(1)

    def _end_lines(self, count: int) -> None:
        """Completes the text to `count` line feeds at its end."""
        written = len(self._tail) - len(self._tail.rstrip("\n"))
        self._write("\n" * (count - written), False)
        self._tail = ""


def read_lines(file: TextIO, prompt: str) -> Iterator[str]:
    """Yields the lines of a file; on a terminal it prompts for them, with editing and history.

    Ctrl-D ends them, and so does Ctrl-C on an empty line; on a line with text Ctrl-C drops the text.
    """
    if not file.isatty():
        for line in file:
            yield line.removesuffix("\n")
        return
    try:
        import readline  # input() then uses it

        typed = readline.get_line_buffer
    except ImportError:
        typed = str
    while True:
        try:
            line = input(prompt)
        except (EOFError, KeyboardInterrupt) as error:
            print()
            if isinstance(error, KeyboardInterrupt) and typed():
                continue
            return
        yield line
