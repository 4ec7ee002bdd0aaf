"""Streaming detokenization: tokens to text, with characters that span tokens and with stop strings."""

import codecs
from collections.abc import Sequence
from typing import Protocol

from gptoss_jax.data.tokenizer import Tokenizer


class StopStrings:
    """Cuts text before the first stop string that is complete; `stopped` is then true.

    Text that may be the beginning of a stop string is held back until it is known not to be.
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self.stopped = False
        self._stop_strings = tuple(stop_strings)
        self._held = ""

    def feed(self, new: str) -> str:
        """Returns the text that cannot be part of a stop string."""
        if self.stopped:
            return ""
        text = self._held + new
        starts = ((text.find(stop), stop) for stop in self._stop_strings)
        # The first to be complete, so that the result does not depend on how the text is cut.
        first = min(((start + len(stop), start) for start, stop in starts if start >= 0), default=None)
        if first is not None:
            self.stopped, self._held = True, ""
            return text[: first[1]]
        # The longest suffix that begins a stop string.
        lengths = (n for stop in self._stop_strings for n in range(1, len(stop)) if text.endswith(stop[:n]))
        end = len(text) - max(lengths, default=0)
        self._held = text[end:]
        return text[:end]

    def close(self) -> str:
        """Returns the text that was held back."""
        rest, self._held = self._held, ""
        return rest


class BytesDecoder(Protocol):
    """What detokenization needs of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...
    def decode_bytes(self, tokens: Sequence[int], /) -> bytes: ...


class StreamingDetokenizer:
    """Turns tokens into text as they arrive; never emits part of a UTF-8 character.

    The text ends before the first stop string, see `StopStrings`; `stopped` is then true. Ids that the
    tokenizer does not have (the model's vocabulary may be larger) stand for no text.
    """

    def __init__(self, tokenizer: BytesDecoder, stop_strings: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop_strings = StopStrings(stop_strings)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def stopped(self) -> bool:
        """True after a stop string."""
        return self._stop_strings.stopped

    def feed(self, tokens: Sequence[int]) -> str:
        """Returns the text that these tokens complete; the bytes of an unfinished character wait."""
        known = [token for token in tokens if token < self._tokenizer.vocab_size]
        return self._stop_strings.feed(self._utf8.decode(self._tokenizer.decode_bytes(known)))

    def close(self) -> str:
        """Returns the text that was held back, with U+FFFD for a character that broke off."""
        return self._stop_strings.feed(self._utf8.decode(b"", final=True)) + self._stop_strings.close()


def detokenize(tokenizer: Tokenizer, tokens: Sequence[int], stop_strings: Sequence[str] = ()) -> str:
    """Returns the text of a whole answer, up to the first stop string."""
    detokenizer = StreamingDetokenizer(tokenizer, stop_strings)
    return detokenizer.feed(tokens) + detokenizer.close()
