"""Incremental detokenization: UTF-8 characters may span tokens, and stop strings end the text."""

import codecs
from collections.abc import Sequence
from typing import Protocol

from gptoss_jax.data.tokenizer import Tokenizer


class StopStrings:
    """Truncates streamed text before the first stop string to be completed, and then sets `stopped`.

    Text that could be the start of a stop string is held back until it is ruled out.
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self.stopped = False
        self._stop_strings = tuple(stop_strings)
        self._held = ""

    def feed(self, new: str) -> str:
        """Returns the text that is now known not to be part of a stop string."""
        if self.stopped:
            return ""
        text = self._held + new
        starts = ((text.find(stop), stop) for stop in self._stop_strings)
        # Take the match that ends first, so that the result does not depend on how the text was split.
        first = min(((start + len(stop), start) for start, stop in starts if start >= 0), default=None)
        if first is not None:
            self.stopped, self._held = True, ""
            return text[: first[1]]
        # The longest suffix that is a proper prefix of a stop string.
        lengths = (n for stop in self._stop_strings for n in range(1, len(stop)) if text.endswith(stop[:n]))
        end = len(text) - max(lengths, default=0)
        self._held = text[end:]
        return text[:end]

    def close(self) -> str:
        """Returns the text that is still held back."""
        rest, self._held = self._held, ""
        return rest


class BytesDecoder(Protocol):
    """What detokenization needs of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...
    def decode_bytes(self, tokens: Sequence[int], /) -> bytes: ...


class StreamingDetokenizer:
    """Decodes tokens to text as they arrive; never emits a partial UTF-8 character.

    The text ends before the first stop string, and `stopped` is then True; see `StopStrings`. Token ids
    outside the tokenizer's vocabulary (the model's may be padded) are skipped.
    """

    def __init__(self, tokenizer: BytesDecoder, stop_strings: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop_strings = StopStrings(stop_strings)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def stopped(self) -> bool:
        """True once a stop string has been found."""
        return self._stop_strings.stopped

    def feed(self, tokens: Sequence[int]) -> str:
        """Returns the newly completed text; the bytes of an incomplete character are held back."""
        known = [token for token in tokens if token < self._tokenizer.vocab_size]
        return self._stop_strings.feed(self._utf8.decode(self._tokenizer.decode_bytes(known)))

    def close(self) -> str:
        """Returns the text that is still held back, with U+FFFD for an incomplete character."""
        return self._stop_strings.feed(self._utf8.decode(b"", final=True)) + self._stop_strings.close()


def detokenize(tokenizer: Tokenizer, tokens: Sequence[int], stop_strings: Sequence[str] = ()) -> str:
    """Returns the text of a complete token sequence, up to the first stop string."""
    detokenizer = StreamingDetokenizer(tokenizer, stop_strings)
    return detokenizer.feed(tokens) + detokenizer.close()
