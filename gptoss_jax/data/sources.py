"""Where text comes from: a source named by a short spec, read as a stream of documents, and a share held out.

The spec is `data.source`: one of `stdlib`, `text:GLOB`, `jsonl:GLOB#field`, `parquet:GLOB#field`,
`hf:NAME:CONFIG:SPLIT#field`. A file or folder that exists is never read as a pattern or as parts of a spec.
"""

import collections
import dataclasses
import functools
import itertools
import math
import os
import pathlib
import platform
import sysconfig
from collections.abc import Callable, Iterable, Iterator

from gptoss_jax.config import require
from gptoss_jax.config.paths import path_exists, user_text
from gptoss_jax.data.files import decode, find_files, readable, stamps
from gptoss_jax.data.hub import open_dataset
from gptoss_jax.data.records import read_jsonl, read_parquet, read_text

KINDS = (
    "stdlib, text:GLOB, jsonl:GLOB#field, parquet:GLOB#field or hf:NAME:CONFIG:SPLIT#field "
    "(#field, :CONFIG and :SPLIT may be left out)"
)
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A named source of documents.

    `fingerprint` is a text that stays the same as long as the content does.
    """

    source: str
    fingerprint: str
    _read: Callable[[], Iterable[str | None]] = dataclasses.field(repr=False)
    # Size and time of the files, as they are in the fingerprint; None where there are no files to check.
    _stamps: Callable[[], str] | None = dataclasses.field(default=None, repr=False)

    def documents(self, skipped: collections.Counter[str] | None = None) -> Iterator[str]:
        """A fresh pass over the documents, in one order. Those of only whitespace are left out.

        The byte order mark at the start of a document is dropped, whatever kind of source it comes from.

        Args:
          skipped: counts, as "null", the records whose field is null. They are left out too.

        Raises ValueError, on the way, for text that cannot be read; at the end, if there was no text.
        """
        empty, nulls = True, 0
        for text in self._read():
            if text is None:
                nulls += 1
                if skipped is not None:
                    skipped["null"] += 1
                continue
            text = text.removeprefix("\ufeff")
            if text and not text.isspace():
                empty = False
                yield text
        allowed = "holds no text" + (f" (records whose field is null: {nulls:,})" if nulls else "")
        require(not empty, "data.source", self.source, allowed)

    def check_unchanged(self) -> None:
        """Raises ValueError if the files have changed since the corpus was opened."""
        unchanged = self._stamps is None or self.fingerprint.endswith(self._stamps())
        require(unchanged, "data.source", self.source, "its files changed while they were read; start again")


def open_corpus(source: str) -> Corpus:
    """Opens the source of a spec. Raises ValueError for an unknown kind or files that are not there."""
    kind, _, rest = source.partition(":")
    if source == "stdlib":
        return _stdlib()
    readers = {"text": read_text, "jsonl": read_jsonl, "parquet": read_parquet}
    require(bool(rest) and (kind in readers or kind == "hf"), "data.source", source, f"must be {KINDS}")
    name, field = (rest, "text") if kind == "text" else _split_field(source, rest)
    if kind == "hf":
        return Corpus(source, *open_dataset(source, name, field))
    paths = find_files(name, source)
    read = readers[kind] if kind == "text" else functools.partial(readers[kind], field=field)
    return Corpus(
        source,
        f"{source}\n{stamps(paths)}",
        lambda: itertools.chain.from_iterable(map(read, paths)),
        lambda: stamps(paths),
    )


def _split_field(source: str, rest: str) -> tuple[str, str]:
    """Returns the name and the field of `NAME#field`. The # of an existing path belongs to its name.

    The field need not be a valid path, nor text that the locale's encoding has.
    """
    if "#" not in rest or path_exists(rest, "data.source"):
        return rest, "text"
    folder, base = os.path.split(rest)
    if "#" not in base and path_exists(folder, "data.source"):
        return rest, "text"
    name, _, field = rest.rpartition("#")
    require(bool(name and field), "data.source", source, f"must be {source.partition(':')[0]}:NAME#field")
    return name, user_text(field)


def split(
    documents: Iterable[str], share: float, max_bytes: int = 8 << 20, source: str = ""
) -> Iterator[tuple[str, bool]]:
    """Marks a share of the documents as held out, in one pass and without knowing how many there are.

    Args:
      documents: texts, in an order that must be the same each time for the marks to be the same.
      share: part of the documents to hold out, above 0 and at most 0.5.
      max_bytes: most UTF-8 bytes to hold out; from there on everything is kept.
      source: the `data.source` of the documents, for the error message.

    Yields:
      (text, is_held_out) in the order of `documents`. At least one is held out and at least one is kept:
      where that needs it a document is cut in two, and its end is held out.

    Raises ValueError if there is nothing but one document of one character.
    """
    held_bytes, closed = 0, False
    # One document ahead, because the last of them may have to be held out whatever its number.
    for index, (text, following) in enumerate(itertools.pairwise(itertools.chain(documents, (None,)))):
        is_last = following is None
        if is_last and index == 0:
            allowed = "holds a single character: too little to hold some of it out for evaluation"
            require(len(text) > 1, "data.source", source, allowed)
            yield from _cut(text, share, max_bytes)
            return
        # Multiples of the golden ratio fill the unit interval evenly: any stretch of text gives its share.
        picked = (index + 1) * GOLDEN % 1 >= 1 - share
        if closed or not (picked or (is_last and held_bytes == 0)):
            yield text, False
            continue
        size = len(text.encode())
        if held_bytes + size <= max_bytes:
            held_bytes += size
            yield text, True
        else:
            closed = True
            yield from _cut(text, 1.0, max_bytes) if held_bytes == 0 else [(text, False)]


def _cut(text: str, share: float, max_bytes: int) -> Iterator[tuple[str, bool]]:
    """Cuts a document so that about `share` of it, at most `max_bytes` and not all, is its held-out end."""
    first = max(1, len(text) - len(text.encode()[-max_bytes:].decode(errors="ignore")))
    target = min(max(int((1 - share) * len(text)), first), len(text) - 1)
    slack = int(share * len(text) / 2)
    low, high = max(target - slack, first), min(target + slack, len(text) - 1)
    for mark in "\n", " ":
        # A cut at `c` comes after the mark text[c - 1].
        before = text.rfind(mark, low - 1, target) + 1
        after = text.find(mark, target, high) + 1
        found = [cut for cut in (before, after) if cut]
        if found:
            target = min(found, key=lambda cut: abs(cut - target))
            break
    yield text[:target], False
    yield text[target:], True


def _stdlib() -> Corpus:
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled"}
    paths = []
    for folder, folders, names in os.walk(root):
        inside = pathlib.Path(folder).relative_to(root)
        folders[:] = [name for name in folders if name not in skipped and not name.startswith("config-")]
        paths += [inside / n for n in names if n.endswith(".py") and not n.startswith("test_")]
    paths = sorted(path.as_posix() for path in paths)
    # No times and no absolute paths: the same Python installed elsewhere is the same corpus.
    stamps = "\n".join(f"{path} {(root / path).stat().st_size}" for path in paths)
    fingerprint = f"stdlib of Python {platform.python_version()}\n{stamps}"
    files = [root / path for path in paths]
    return Corpus("stdlib", fingerprint, lambda: map(_read_whole, files))


def _read_whole(path: pathlib.Path) -> str:
    with readable(path):
        data = path.read_bytes()
    return decode(data, str(path))
