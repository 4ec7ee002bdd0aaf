"""Tokens to text as they come: characters that are spread over tokens, and strings that end an answer."""

import codecs
from collections.abc import Callable, Sequence


class StreamingDetokenizer:
    """Tokens to text, piece by piece, where a character may be spread over several tokens.

    With stop strings the text ends where the first of them that is complete begins, `stopped` then is true,
    and text that may be the beginning of one waits until it is known.
    """

    def __init__(self, decode_bytes: Callable[[Sequence[int]], bytes], stop_strings: Sequence[str] = ()):
        """`decode_bytes`: that of a Tokenizer."""
        self._decode_bytes = decode_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = tuple(stop_strings)
        self._held = ""
        self.stopped = False

    def feed(self, tokens: Sequence[int]) -> str:
        """The text that is complete with these tokens; the bytes of an unfinished character wait."""
        return self._until_stop(self._utf8.decode(self._decode_bytes(tokens)))

    def close(self) -> str:
        """What is left at the end: what waited, and U+FFFD for a character that broke off."""
        rest = self._until_stop(self._utf8.decode(b"", final=True)) + self._held
        self._held = ""
        return rest

    def _until_stop(self, more: str) -> str:
        if self.stopped:
            return ""
        text = self._held + more
        places = ((text.find(stop), stop) for stop in self._stops)
        # The first to be complete, so that it does not matter in what pieces the text comes.
        found = min(((place + len(stop), place) for place, stop in places if place >= 0), default=None)
        if found is not None:
            self.stopped, self._held = True, ""
            return text[: found[1]]
        # The longest end of the text that begins a stop string.
        lengths = (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
        known = len(text) - max(lengths, default=0)
        self._held = text[known:]
        return text[:known]
