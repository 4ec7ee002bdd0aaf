"""Text on a terminal: dimmed on request, and safe for anything that a model wrote."""

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, TextIO

from gptoss_jax.terminal import encodable, has_colors, is_terminal, printable


class Write(Protocol):
    """A function that writes text, dimmed on request."""

    def __call__(self, text: str, dim: bool = False) -> None: ...


def writer(file: TextIO) -> Write:
    """Returns a function that writes text at once. On a terminal, control characters are spelled out."""
    on_terminal, is_styled = is_terminal(file), has_colors(file)

    def write(text: str, dim: bool = False) -> None:
        text = encodable(text, file)
        if on_terminal:
            text = printable(text)
        if dim and text and is_styled:
            text = f"\x1b[2m{text}\x1b[0m"
        file.write(text)
        file.flush()

    return write


class Throughput:
    """Counts tokens as they arrive."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self._first: tuple[int, float] | None = None  # number of tokens and time of the first chunk
        self._last = 0.0

    def count(self, chunks: Iterable[Sequence[int]]) -> Iterator[Sequence[int]]:
        """Yields the chunks, counted."""
        for tokens in chunks:
            self.num_tokens += len(tokens)
            self._last = time.monotonic()
            self._first = self._first or (len(tokens), self._last)
            yield tokens

    def __str__(self) -> str:
        rate = "–"
        if self._first and self._last > self._first[1] and self.num_tokens > self._first[0]:
            # The first chunk waited for the prompt and the compiler.
            rate = f"{(self.num_tokens - self._first[0]) / (self._last - self._first[1]):,.1f}"
        return f"{self.num_tokens:,} token{'s' * (self.num_tokens != 1)} · {rate} tokens/s"
