"""Text for terminals: short number formats, and untrusted text made harmless. Standard library only."""

import math
import os
import unicodedata
from collections.abc import Sequence
from typing import IO, TextIO

# Unicode categories that can move the cursor, reverse a line or fail to encode.
UNSAFE_CATEGORIES = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
# For the encodings of old locales.
ASCII = str.maketrans({"…": "...", "·": "-", "–": "-", "—": "-", "×": "x", "━": "=", "│": "|", "’": "'"})


def is_terminal(file: TextIO) -> bool:
    """True if a file is a terminal that understands escape codes."""
    return file.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def has_colors(file: TextIO) -> bool:
    """True if text on a file may be colored: on a terminal, or anywhere if FORCE_COLOR is set, but never if
    NO_COLOR is (https://no-color.org, https://force-color.org)."""
    return not os.environ.get("NO_COLOR") and bool(os.environ.get("FORCE_COLOR") or is_terminal(file))


def printable(text: str) -> str:
    """Arbitrary text made harmless to a terminal: every control character, lone surrogate and direction mark
    except line breaks is escaped (`\\x1b`); tabs become spaces."""

    def escape(character: str) -> str:
        # Scripts and emoji need the two joiners, which are control characters by category.
        is_safe = character in "\n\u200c\u200d" or unicodedata.category(character) not in UNSAFE_CATEGORIES
        return character if is_safe else character.encode("unicode_escape").decode()

    return "".join(map(escape, text.replace("\r\n", "\n").expandtabs(4)))


def encodable(text: str, file: IO[str]) -> str:
    """The text with a substitute for each character that the encoding of a file does not have."""
    encoding = getattr(file, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = text.translate(ASCII)
    return text.encode(encoding, "replace").decode(encoding)


def _with_unit(value: float | None, units: Sequence[str], digits: str) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    unit = 0
    # 999,950 must become 1.0M: the value as it is printed decides.
    while unit + 1 < len(units) and float(format(value, digits)) >= 1000:
        value, unit = value / 1000, unit + 1
    return f"{value:{digits}}{units[unit]}"


def format_count(count: float | None) -> str:
    """A count in a few characters: 950, 1.2K, 105.7M, 20.9B. None gives a dash."""
    if count is not None and abs(count) < 1000:
        return f"{count:.0f}"
    return _with_unit(count, ["", "K", "M", "B", "T"], ".1f")


def format_si(value: float | None, unit: str) -> str:
    """Three digits with an SI prefix: 132 GFLOP/s, 1.05 PFLOPs, 12.5 ms, 22 B. None gives a dash."""
    if unit == "B" and value is not None and abs(value) < 1000:
        return f"{value:.0f} B"  # no fractions of a byte
    units = [f" {prefix}{unit}" for prefix in ("m", "", "k", "M", "G", "T", "P", "E")]
    return _with_unit(value and 1e3 * value, units, "#.3g").replace(". ", " ")


def format_duration(seconds: float | None) -> str:
    """Seconds as 4:12 or 1:02:03. None gives a dash."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    minutes, second = divmod(round(max(seconds, 0)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def format_rate(rate: float) -> str:
    """A learning rate in short scientific notation, 1.2e-3."""
    mantissa, _, exponent = f"{rate:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if rate and exponent else f"{rate:g}"


def format_number(value: float | None, digits: int) -> str:
    """A value with `digits` decimals; a dash for None, NaN and infinities."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"
