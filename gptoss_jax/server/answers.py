"""Parses model output into typed deltas: reasoning, content and function calls.

No output is an error, and no text is lost: every sampled token is in the text of a delta or belongs to a
message's header or end.
"""

import collections
import dataclasses
import secrets
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Literal

from gptoss_jax.data.harmony import FUNCTIONS, Harmony, Part
from gptoss_jax.data.harmony import AnswerReader as HarmonyReader
from gptoss_jax.inference.detokenizer import StopStrings
from gptoss_jax.inference.sampling_params import Completion
from gptoss_jax.server.sampling_fields import MIN_LOGPROB

Kind = Literal["reasoning", "content", "call"]
FinishReason = Literal["stop", "length", "tool_calls"]


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """Log-probabilities of a sampled token and of the most likely tokens, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Call:
    """A function call. `index` is its position among the calls of a response."""

    index: int
    id: str
    name: str


@dataclasses.dataclass
class Delta:
    """New text of a message: reasoning, content, or the arguments of a call."""

    kind: Kind
    message: int  # index of the message in the response
    text: str
    channel: str | None  # None for text outside Harmony's format
    is_first: bool  # first delta of its message; for a call, `text` may be empty
    call: Call | None = None
    logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)  # of content


class AnswerReader:
    """Streaming parser for one response.

    A message whose recipient is in the namespace `functions`, or is the bare name of a declared function, is
    a call, whatever its channel. Other messages on the channel `analysis` are reasoning, and everything else
    is content, including text outside Harmony's format. Stop strings are matched only in content. If no
    functions are declared, calls are content too.
    """

    def __init__(self, harmony: Harmony, functions: Collection[str] = (), stop: Sequence[str] = ()) -> None:
        """`functions` are the names of the functions that the request declares."""
        self.calls: list[Call] = []
        self.num_tokens = 0  # sampled tokens, up to the one that completes a stop string
        self.num_reasoning_tokens = 0  # those in the text of reasoning messages
        self.finish_reason: FinishReason | None = None
        self._harmony, self._functions, self._stop = harmony, frozenset(functions), tuple(stop)
        self._reader = HarmonyReader(harmony)
        # Log-probabilities of tokens not yet assigned to a message: a header may turn out to be text.
        self._pending: collections.deque[TokenLogprob | None] = collections.deque()
        self._num_begun = 0  # messages that have been started
        self._message: _Message | None = None

    def feed(self, part: Completion) -> list[Delta]:
        """Returns the deltas in the next part of a completion; sets `finish_reason` after the last part."""
        if self._is_finished():
            return []
        deltas: list[Delta] = []
        for i, token in enumerate(part.tokens):
            self.num_tokens += 1
            self._pending.append(_logprob(part, i))
            self._add(deltas, self._reader.steps(token))
            if self._is_finished():
                return deltas
        if part.finish_reason is not None:
            self.num_tokens += part.stop_token is not None
            self._add(deltas, self._reader.last_steps())
            self._finish(part.finish_reason)
        return deltas

    def _is_finished(self) -> bool:
        return self.finish_reason is not None

    def _finish(self, reason: Literal["stop", "length"]) -> None:
        if self.finish_reason is None:
            self.finish_reason = "tool_calls" if self.calls and reason == "stop" else reason

    def _add(self, deltas: list[Delta], steps: Iterator[tuple[Part, str, int | None]]) -> None:
        """Appends the deltas of parser steps; a stop string ends the response."""
        for _, text, token in steps:
            self._begin(deltas)
            message = self._message
            assert message is not None  # a step is of a message
            logprob = None if token is None else self._pending.popleft()
            self.num_reasoning_tokens += token is not None and message.kind == "reasoning"
            text, logprobs = message.add(text, logprob, is_last=token is None)
            self._append(deltas, message, text, logprobs)
            if message.stop.stopped:
                self._finish("stop")
                return
        self._begin(deltas)
        if not self._reader.in_header:
            self._pending.clear()

    def _begin(self, deltas: list[Delta]) -> None:
        """Starts the parser's latest message if it is new."""
        parts = self._reader.parts
        if len(parts) == self._num_begun:
            return
        part, call = parts[-1], None
        name = self._called(part.recipient)
        if name is not None:
            call = Call(len(self.calls), f"call_{secrets.token_hex(12)}", name)
            self.calls.append(call)
        kind: Kind = "call" if call else "reasoning" if part.channel == "analysis" else "content"
        self._message = _Message(
            self._num_begun, kind, part.channel, call, StopStrings(self._stop if kind == "content" else ())
        )
        self._num_begun += 1
        if call is not None:
            self._append(deltas, self._message, "", [])

    def _called(self, recipient: str | None) -> str | None:
        """Returns the name of the function that a recipient refers to; None for, say, `assistant`."""
        if not recipient or not self._functions:
            return None
        name = recipient.removeprefix(FUNCTIONS)
        return name if name and (name != recipient or name in self._functions) else None

    @staticmethod
    def _append(deltas: list[Delta], message: "_Message", text: str, logprobs: list[TokenLogprob]) -> None:
        """Extends the last delta if it belongs to the same message; otherwise appends a new one."""
        begins_call = message.call is not None and not message.has_delta
        if not (text or logprobs or begins_call):
            return
        if deltas and deltas[-1].message == message.index:
            deltas[-1].text += text
            deltas[-1].logprobs += logprobs
            return
        is_first, message.has_delta = not message.has_delta, True
        delta = Delta(message.kind, message.index, text, message.channel, is_first, message.call, logprobs)
        deltas.append(delta)


@dataclasses.dataclass
class _Message:
    """The message being generated."""

    index: int
    kind: Kind
    channel: str | None
    call: Call | None
    stop: StopStrings
    has_delta: bool = False
    # Characters generated and emitted: the difference may be the start of a stop string.
    num_written: int = 0
    num_out: int = 0
    # Start offset of each token whose text has not been emitted; tokens of one character share its offset.
    held: collections.deque[tuple[int, TokenLogprob]] = dataclasses.field(default_factory=collections.deque)

    def add(self, text: str, logprob: TokenLogprob | None, is_last: bool) -> tuple[str, list[TokenLogprob]]:
        """Returns the text now known not to be part of a stop string, and the tokens that begin in it."""
        if logprob is not None and self.kind == "content":
            self.held.append((self.num_written, logprob))
        self.num_written += len(text)
        out = self.stop.feed(text)
        if is_last:
            out += self.stop.close()
        self.num_out += len(out)
        is_out = is_last and not self.stop.stopped
        ready = []
        while self.held and (is_out or self.held[0][0] < self.num_out):
            ready.append(self.held.popleft()[1])
        return out, ready


def _logprob(part: Completion, i: int) -> TokenLogprob | None:
    if part.logprobs is None:
        return None
    top = part.top_logprobs[i] if part.top_logprobs is not None else ()
    return TokenLogprob(part.tokens[i], part.logprobs[i], tuple(top))


def logprob_json(harmony: Harmony, entry: TokenLogprob) -> dict[str, Any]:
    """Returns a token's log-probability in OpenAI's format."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        data = harmony.spelled(token)
        text = data.decode(errors="replace")
        return {"token": text, "logprob": max(logprob, MIN_LOGPROB), "bytes": list(data)}

    return {**one(entry.token, entry.logprob), "top_logprobs": [one(*top) for top in entry.top]}
