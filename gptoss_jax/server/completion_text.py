"""Incremental text and log-probabilities of one choice of `/v1/completions`."""

import codecs
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from gptoss_jax.data.tokenizer import Tokenizer
from gptoss_jax.inference.detokenizer import StreamingDetokenizer
from gptoss_jax.inference.sampling_params import Completion
from gptoss_jax.server.sampling_fields import MIN_LOGPROB
from gptoss_jax.server.tokenization import TokenTexts


@dataclasses.dataclass(frozen=True)
class TextOptions:
    """Options for converting a choice's tokens to text."""

    tokenizer: Tokenizer
    stop_strings: tuple[str, ...] = ()
    skip_special_tokens: bool = True
    # Write tokens in `logprobs` as `token_id:ID`.
    tokens_as_ids: bool = False
    # Number of most likely tokens per position; None: no log-probabilities.
    logprobs: int | None = None

    @functools.cached_property
    def spelled(self) -> TokenTexts:
        """The tokenizer, with special tokens decoded to their names."""
        return TokenTexts(self.tokenizer)

    @property
    def text_tokenizer(self) -> Tokenizer | TokenTexts:
        """The tokenizer used to decode the text."""
        return self.tokenizer if self.skip_special_tokens else self.spelled

    def decode(self, tokens: Sequence[int]) -> str:
        """Decodes a prompt's tokens."""
        tokenizer = self.text_tokenizer
        known = [token for token in tokens if token < tokenizer.vocab_size]
        return tokenizer.decode_bytes(known).decode(errors="replace")

    def name(self, token: int) -> str:
        """Returns a token as it is written in `logprobs`."""
        return f"token_id:{token}" if self.tokens_as_ids else self.spelled.name(token)


@dataclasses.dataclass
class LogprobEntry:
    """A token, its character offset in the text, and its log-probabilities."""

    offset: int
    token: int
    logprob: float | None
    top: Sequence[tuple[int, float]]


class ChoiceText:
    """The text of one choice, which ends before the first stop string.

    Log-probabilities are returned for the tokens that begin in the text sent so far.
    """

    def __init__(self, options: TextOptions, start: int = 0) -> None:
        """`start` is the number of characters before the completion: the length of an echoed prompt."""
        self.num_tokens = 0  # sampled tokens, including the stop token and those of a stop string
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self._options = options
        self._detokenizer = StreamingDetokenizer(options.text_tokenizer, options.stop_strings)
        self._offsets = Offsets(options.text_tokenizer, start)
        self._end = start  # end offset of the text sent so far
        self._entries: list[LogprobEntry] = []  # not sent yet

    def feed(self, part: Completion) -> tuple[str, list[int], dict[str, Any] | None]:
        """Returns the new text, the new tokens and their log-probabilities."""
        text, tokens = "", []
        for i, token in enumerate(part.tokens):
            tokens.append(token)
            if part.logprobs is not None:
                top = part.top_logprobs[i] if part.top_logprobs else ()
                self._entries.append(LogprobEntry(self._offsets.next(token), token, part.logprobs[i], top))
            text += self._detokenizer.feed([token])
            if self._detokenizer.stopped:
                self.finish_reason = "stop"
                break
        self.num_tokens += len(tokens)
        if self.finish_reason is None and part.finish_reason is not None:
            self.num_tokens += part.stop_token is not None
            text += self._detokenizer.close()
            self.finish_reason = part.finish_reason
        self.tokens += tokens
        self._end += len(text)
        return text, tokens, self._logprobs()

    def _logprobs(self) -> dict[str, Any] | None:
        if self._options.logprobs is None:
            return None
        stopped, finished = self._detokenizer.stopped, self.finish_reason is not None
        ready = [entry for entry in self._entries if entry.offset < self._end or (finished and not stopped)]
        self._entries = [] if finished else self._entries[len(ready) :]
        return logprobs_object(self._options, ready)


class Offsets:
    """Computes the start offsets of tokens, in characters; tokens of the same character share its offset."""

    def __init__(self, tokenizer: Tokenizer | TokenTexts, start: int = 0) -> None:
        self.length = start
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def next(self, token: int) -> int:
        """Returns the offset of the next token."""
        offset = self.length
        if token < self._tokenizer.vocab_size:
            self.length += len(self._utf8.decode(self._tokenizer.decode_bytes([token])))
        return offset


def logprobs_object(options: TextOptions, entries: Sequence[LogprobEntry]) -> dict[str, Any]:
    """Returns the `logprobs` object of OpenAI's completions; `top_logprobs` include the sampled token."""
    names = [options.name(entry.token) for entry in entries]
    return {
        "tokens": names,
        "token_logprobs": [None if entry.logprob is None else finite(entry.logprob) for entry in entries],
        "top_logprobs": [_top(options.name, *pair) for pair in zip(entries, names, strict=True)],
        "text_offset": [entry.offset for entry in entries],
    }


def finite(logprob: float) -> float:
    """Replaces a non-finite log-probability, which JSON cannot represent, by MIN_LOGPROB."""
    return logprob if math.isfinite(logprob) else MIN_LOGPROB


def _top(name_of: Callable[[int], str], entry: LogprobEntry, name: str) -> dict[str, float] | None:
    if entry.logprob is None:
        return None
    top: dict[str, float] = {}
    for token, logprob in (*entry.top, (entry.token, entry.logprob)):
        # Several tokens may have the same text: keep the most likely one.
        top.setdefault(name_of(token), finite(logprob))
    top[name] = finite(entry.logprob)
    return top
