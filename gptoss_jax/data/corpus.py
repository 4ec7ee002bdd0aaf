"""Where text comes from: a source named by a short spec, read as a stream of documents, and a share held out.

The spec is `data.source`: one of `stdlib`, `text:GLOB`, `jsonl:GLOB#field`, `parquet:GLOB#field`,
`hf:NAME[#field]`.
"""

import dataclasses
import functools
import glob
import itertools
import json
import math
import mmap
import os
import pathlib
import platform
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping

from gptoss_jax.config import require

KINDS = "stdlib, text:GLOB, jsonl:GLOB#field, parquet:GLOB#field or hf:NAME#field (#field may be left out)"
SEPARATOR = b"<|endoftext|>"
INSTALL_HF = "pip install 'gptoss-jax[hf]'"
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A named source of documents.

    `fingerprint` is a text that stays the same as long as the content does.
    """

    source: str
    fingerprint: str
    _read: Callable[[], Iterable[str]] = dataclasses.field(repr=False)

    def documents(self) -> Iterator[str]:
        """A fresh pass over the documents, in one order. Those of only whitespace are left out.

        Raises ValueError, on the way, for text that cannot be read; at the end, if there was no text.
        """
        empty = True
        for text in self._read():
            if text and not text.isspace():
                empty = False
                yield text
        require(not empty, "data.source", self.source, "holds no text")


def open_corpus(source: str) -> Corpus:
    """Opens the source of a spec. Raises ValueError for an unknown kind or files that are not there."""
    kind, _, rest = source.partition(":")
    if source == "stdlib":
        return _stdlib()
    readers = {"text": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet}
    require(bool(rest) and (kind in readers or kind == "hf"), "data.source", source, f"must be {KINDS}")
    name, field = rest, "text"
    if kind != "text" and "#" in rest:
        name, _, field = rest.rpartition("#")
        require(bool(name and field), "data.source", source, f"must be {kind}:NAME#field")
    if kind == "hf":
        return _hugging_face(source, name, field)
    pattern = os.path.abspath(os.path.expanduser(name))
    paths = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    require(bool(paths), "data.source", source, f"no file matches {pattern}")
    read = readers[kind] if kind == "text" else functools.partial(readers[kind], field=field)
    fingerprint = f"{source}\n{_stamps(paths)}"
    return Corpus(source, fingerprint, lambda: itertools.chain.from_iterable(map(read, paths)))


def split(documents: Iterable[str], share: float, max_bytes: int = 8 << 20) -> Iterator[tuple[str, bool]]:
    """Marks a share of the documents as held out, in one pass and without knowing how many there are.

    Args:
      documents: texts, in an order that must be the same each time for the marks to be the same.
      share: part of the documents to hold out, above 0 and at most 0.5.
      max_bytes: most UTF-8 bytes to hold out; from there on everything is kept.

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
    require(len(text) > 1, "data.source", text, "a single character cannot be split for evaluation")
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


def _stamps(paths: Iterable[str]) -> str:
    stats = ((path, os.stat(path)) for path in paths)
    return "\n".join(f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats)


def _decode(data: bytes, path: str, start: int = 0) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {start + error.start} ({error.reason})") from None


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
    return Corpus("stdlib", fingerprint, lambda: (_decode(file.read_bytes(), str(file)) for file in files))


def _read_text(path: str) -> Iterator[str]:
    """The documents of a text file: all of it, or the parts between literal separators."""
    if os.path.getsize(path) == 0:
        return
    # Mapped, so that a file of many gigabytes is never in memory as a whole if separators part it.
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start, end = 0, data.find(SEPARATOR)
        while end >= 0:
            text = _decode(data[start:end], path, start).rstrip("\r\n")
            yield text.lstrip("\r\n") if start else text
            start = end + len(SEPARATOR)
            end = data.find(SEPARATOR, start)
        text = _decode(data[start:], path, start)
        yield text.lstrip("\r\n") if start else text


def _read_jsonl(path: str, field: str) -> Iterator[str]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:  # UnicodeDecodeError is one too
                raise ValueError(f"{path}:{number}: not JSON ({error})") from None
            if not isinstance(record, dict):
                raise ValueError(f"{path}:{number}: must be a JSON object")
            if field not in record:
                raise ValueError(f"{path}:{number}: has no field {field!r}; it has {', '.join(record)}")
            text = record[field]
            if not isinstance(text, str):
                raise ValueError(f"{path}:{number}: field {field!r} is a {type(text).__name__}: must be text")
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"{path}:{number}: field {field!r} is not Unicode ({error.reason})"
                ) from None
            yield text


def _texts(values: Iterable[object], path: str, first: int, field: str) -> Iterator[str]:
    """The texts of a column, whose nulls are documents without text."""
    for row, value in enumerate(values, first):
        if value is None:
            continue
        if not isinstance(value, str):
            raise ValueError(f"{path} row {row}: column {field!r} is a {type(value).__name__}: must be text")
        yield value


def _read_parquet(path: str, field: str) -> Iterator[str]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path}: parquet needs pyarrow: {INSTALL_HF}") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise ValueError(f"{path}: not a parquet file ({_one_line(error)})") from None
    with file:
        columns = file.schema_arrow.names
        if field not in columns:
            raise ValueError(f"{path}: has no column {field!r}; it has {', '.join(columns)}")
        row = 0
        for batch in file.iter_batches(batch_size=1024, columns=[field]):
            yield from _texts(batch.column(0).to_pylist(), path, row, field)
            row += batch.num_rows


def _hugging_face(source: str, name: str, field: str) -> Corpus:
    try:
        import datasets
    except ImportError:
        raise ValueError(f"data.source is {source!r}: hf needs datasets: {INSTALL_HF}") from None
    name = os.path.expanduser(name)
    try:
        info = datasets.load_dataset_builder(name)
        stream = datasets.load_dataset(name, split="train", streaming=True)
    except (OSError, ValueError, RuntimeError) as error:  # not found, not reached, no such split
        raise ValueError(f"data.source is {source!r}: cannot be loaded ({_one_line(error)})") from None
    if os.path.isdir(name):
        files = sorted(str(path) for path in pathlib.Path(name).resolve().rglob("*") if path.is_file())
        content = _stamps(files)
    else:
        # The hash is that of the commit on the Hub.
        content = f"{info.hash} {info.info.version} {info.info.dataset_size}"
    fingerprint = f"{source}\n{info.config.name} {content}"
    return Corpus(source, fingerprint, lambda: _texts(_column(stream, source, field), name, 0, field))


def _column(rows: Iterable[Mapping[str, object]], source: str, field: str) -> Iterator[object]:
    for row in rows:
        require(field in row, "data.source", source, f"has no column {field!r}; it has {', '.join(row)}")
        yield row[field]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
