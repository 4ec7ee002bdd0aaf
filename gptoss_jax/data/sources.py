"""Text sources (`data.source`), read as streams of documents, some of which are held out.

A source is `stdlib`, `text:GLOB`, `jsonl:GLOB#field`, `parquet:GLOB#field` or `hf:NAME:CONFIG:SPLIT#field`;
for conversations, see `chat_rows.py`. The path of an existing file or folder is never interpreted as a
pattern or split at separators.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import math
import os
import pathlib
import platform
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from gptoss_jax.config import require
from gptoss_jax.config.base import listed, one_line
from gptoss_jax.config.paths import path_exists, user_path, user_text
from gptoss_jax.data import files
from gptoss_jax.data.files import INSTALL_HF, SHOWN_NAMES

KINDS = (
    "stdlib, text:GLOB, jsonl:GLOB#field, parquet:GLOB#field or hf:NAME:CONFIG:SPLIT#field "
    "(#field, :CONFIG and :SPLIT may be left out); for conversations chat:GLOB or stdlib-chat; "
    "for pairs of answers preferences:GLOB or stdlib-preferences"
)
HF_SPEC = "hf:NAME:CONFIG:SPLIT"
# In the path of a local folder, the datasets library interprets these as a pattern or a chain of archives.
UNREADABLE = ("*", "?", "[", "::", "\n")
Item = TypeVar("Item")
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclasses.dataclass(frozen=True)
class Source:
    """A data source. Its `fingerprint` changes with its content."""

    source: str
    fingerprint: str
    _read: Callable[[], Iterable[Any]] = dataclasses.field(repr=False)
    # Sizes and times of the files, the last part of the fingerprint; None if there are no files to check.
    _stamps: Callable[[], str] | None = dataclasses.field(default=None, repr=False)

    def check_unchanged(self) -> None:
        """Raises ValueError if the files have changed since the source was opened."""
        unchanged = self._stamps is None or self.fingerprint.endswith(self._stamps())
        require(unchanged, "data.source", self.source, "its files changed while they were read; start again")


class Corpus(Source):
    """A source of documents."""

    def documents(self, skipped: collections.Counter[str] | None = None) -> Iterator[str]:
        """Yields the documents, always in the same order, without byte order marks and blank documents.

        Args:
          skipped: counts, as "null", the records whose field is null, which are left out.

        Raises ValueError while it runs for text that cannot be read; at the end, if there was no text.
        """
        skipped = collections.Counter() if skipped is None else skipped
        empty, before = True, skipped["null"]
        for text in self._read():
            if text is None:
                skipped["null"] += 1
                continue
            text = text.removeprefix("\ufeff")
            if text and not text.isspace():
                empty = False
                yield text
        nulls = skipped["null"] - before
        allowed = "holds no text" + (f" (records whose field is null: {nulls:,})" if nulls else "")
        require(not empty, "data.source", self.source, allowed)


def open_corpus(source: str) -> Corpus:
    """Opens a source. Raises ValueError for an unknown kind, and for a missing file or dataset."""
    if source == "stdlib":
        return _open_stdlib()
    kind, _, rest = source.partition(":")
    readers: dict[str, Callable[..., Iterator[str | None]]] = {
        "text": files.read_text,
        "jsonl": files.read_jsonl,
        "parquet": files.read_parquet,
    }
    require(bool(rest) and (kind in readers or kind == "hf"), "data.source", source, f"must be {KINDS}")
    name, field = (rest, "text") if kind == "text" else _split_field(source, rest)
    if kind == "hf":
        return _open_dataset(source, name, field)
    paths = files.find_files(name, source)
    stamps = functools.partial(files.stamps, paths)

    def read() -> Iterator[str | None]:
        for path in paths:
            yield from readers[kind](path, *([] if kind == "text" else [field]))

    return Corpus(source, f"{source}\n{stamps()}", read, stamps)


def _split_field(source: str, rest: str) -> tuple[str, str]:
    """Splits `NAME#field`. A # in an existing path belongs to the path."""
    if "#" not in rest or path_exists(rest, "data.source"):
        return rest, "text"
    folder, base = os.path.split(rest)
    if "#" not in base and path_exists(folder, "data.source"):
        return rest, "text"
    name, _, field = rest.rpartition("#")
    require(bool(name and field), "data.source", source, f"must be {source.partition(':')[0]}:NAME#field")
    return name, user_text(field)


def stdlib_files() -> tuple[pathlib.Path, list[str], str]:
    """Returns the folder of Python's standard library, its sorted files (no tests), and their fingerprint."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled"}
    found: list[pathlib.Path] = []
    for folder, folders, names in os.walk(root):
        inside = pathlib.Path(folder).relative_to(root)
        folders[:] = [name for name in folders if name not in skipped and not name.startswith("config-")]
        found += [inside / n for n in names if n.endswith(".py") and not n.startswith("test_")]
    paths = sorted(path.as_posix() for path in found)
    # Without times and absolute paths, so that the same Python installed elsewhere is the same corpus.
    sizes = "\n".join(f"{path} {(root / path).stat().st_size}" for path in paths)
    return root, paths, f"stdlib of Python {platform.python_version()}\n{sizes}"


def _open_stdlib() -> Corpus:
    """Opens the source code of Python's standard library, without its tests."""
    root, paths, fingerprint = stdlib_files()

    def read() -> Iterator[str]:
        for path in paths:
            with files.readable(root / path):
                data = (root / path).read_bytes()
            yield files.decode(data, str(root / path))

    return Corpus("stdlib", fingerprint, read)


def _open_dataset(source: str, name: str, field: str) -> Corpus:
    """Opens a dataset on the Hugging Face Hub, or a local folder that the datasets library can read.

    Defaults to the dataset's default config, and to the split `train` or the only one. Raises ValueError if
    the dataset cannot be loaded, with the available configs or splits.
    """
    name, config, split_name = _parse_dataset(source, name)
    try:
        import datasets
    except ImportError:
        raise ValueError(f"data.source is {source!r}: hf needs datasets: {INSTALL_HF}") from None
    try:
        builder = datasets.load_dataset_builder(name, config)
        splits = builder.as_streaming_dataset()
    except Exception as error:  # not found, unreachable, no such config, no files in a known format, …
        problem, configs = f"cannot be loaded ({one_line(error)})", []
        with contextlib.suppress(Exception):
            configs = datasets.get_dataset_config_names(name)
        if configs and config not in configs and (config or len(configs) > 1):
            missing = f"has no config {config!r}" if config else "needs a config"
            problem = f"{missing}; it has {listed(configs, SHOWN_NAMES)}: name one, as in {HF_SPEC}"
        raise ValueError(f"data.source is {source!r}: {problem}") from error
    if split_name is None:
        split_name = next(iter(splits)) if len(splits) == 1 else "train"
    known = f"it has {listed(splits, SHOWN_NAMES)}: name one, as in {HF_SPEC}"
    require(split_name in splits, "data.source", source, f"has no split {split_name!r}; {known}")
    # The hash identifies the commit on the hub.
    content, stamps = f"{builder.hash} {builder.info.version} {builder.info.dataset_size}", None
    if os.path.isdir(name):
        paths = sorted(str(path) for path in pathlib.Path(name).resolve().rglob("*") if path.is_file())
        stamps = functools.partial(files.stamps, paths)
        content = stamps()

    def read() -> Iterator[str | None]:
        for number, row in enumerate(files.guarded(splits[split_name], source)):
            yield files.text_of(row, field, f"{name} row {number}")

    return Corpus(source, f"{source}\n{builder.config.name} {content}", read, stamps)


def _parse_dataset(source: str, name: str) -> tuple[str, str | None, str | None]:
    """Returns name or folder, config and split of `NAME:CONFIG:SPLIT`; None for omitted or empty parts.

    Colons in the path of an existing folder belong to the path.
    """
    words = name.split(":")
    for count in range(len(words), 0, -1):
        joined = ":".join(words[:count])
        if joined and os.path.isdir(folder := user_path(joined, "data.source")):
            for sign in UNREADABLE:
                allowed = f"the datasets library cannot read a path that holds {sign!r}; rename the folder"
                require(sign not in os.path.abspath(folder), "data.source", source, allowed)
            name = os.fspath(folder)
            break
    else:
        name, count = words[0], 1
    rest = words[count:]
    require(bool(words[0]) and len(rest) <= 2, "data.source", source, f"must be {HF_SPEC}#field")
    config, split_name = [*rest, "", ""][:2]
    return name, config or None, split_name or None


def split(
    documents: Iterable[str], share: float, max_bytes: int = 8 << 20, source: str = ""
) -> Iterator[tuple[str, bool]]:
    """Holds out a fraction of the documents, deterministically, in one pass over a stream of unknown length.

    Args:
      documents: the texts.
      share: fraction of the documents to hold out, above 0 and at most 0.5.
      max_bytes: maximum number of UTF-8 bytes to hold out.
      source: the `data.source`, for the error message.

    Yields:
      (text, is_held_out) in the order of `documents`. At least one is held out and one is kept; if necessary,
      a document is split and its end is held out.

    Raises ValueError if the only document has a single character.
    """
    held_bytes, closed = 0, False
    # Looks one document ahead, because the last one may have to be held out.
    for index, (text, following) in enumerate(with_next(documents)):
        is_last = following is None
        if is_last and index == 0:
            allowed = "holds a single character: too little to hold some of it out for evaluation"
            require(len(text) > 1, "data.source", source, allowed)
            yield from _cut(text, share, max_bytes)
            return
        picked = is_picked(index, share)
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


def with_next(items: Iterable[Item]) -> Iterator[tuple[Item, Item | None]]:
    """Yields each item with its successor, which is None for the last."""
    end: Any = None
    return itertools.pairwise(itertools.chain(items, (end,)))


def is_picked(index: int, share: float) -> bool:
    """Returns True for a fraction `share` of all indices, evenly spread."""
    # Multiples of the golden ratio fill the unit interval evenly, so each stretch of text contributes
    # equally.
    return (index + 1) * GOLDEN % 1 >= 1 - share


def _cut(text: str, share: float, max_bytes: int) -> Iterator[tuple[str, bool]]:
    """Splits a document in two: the end, about `share` of it and at most `max_bytes`, is held out."""
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
