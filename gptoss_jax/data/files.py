"""Reads documents from text, JSON lines and parquet files, which may be compressed. A null field is None."""

import bz2
import contextlib
import glob
import gzip
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import IO, Any

from gptoss_jax.config import require
from gptoss_jax.config.base import listed, one_line, type_name
from gptoss_jax.config.paths import user_path

INSTALL_HF = "pip install 'gptoss-jax[hf]'"
CHUNK = 1 << 20
HEAD = 512  # number of bytes needed to recognize a format
BOM = b"\xef\xbb\xbf"
SEPARATOR = b"<|endoftext|>"
# Magic bytes of compressed files. An empty bzip2 stream has different ones.
COMPRESSED: dict[bytes, Callable[..., Any]] = {
    rb"\x1f\x8b": gzip.open,
    rb"BZh[1-9](1AY&SY|\x17rE8P\x90)": bz2.open,
    rb"\xfd7zXZ\x00": lzma.open,
}
# A zstd frame, or the skippable frame that some tools write first.
ZSTD = rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"
# Maximum number of names in an error message: a record may have thousands.
SHOWN_NAMES = 20


def find_files(name: str, source: str) -> list[str]:
    """Returns the files that a path or glob pattern matches, sorted, as absolute paths.

    An existing path, and existing folders at the start of a path, are not interpreted as patterns. Raises
    ValueError if there are no files, or if one is not a regular file.
    """
    path = user_path(name, "data.source")
    if os.path.lexists(path):
        paths = [os.fspath(path)]
    else:
        existing = next(folder for folder in path.parents if os.path.exists(folder))
        pattern = os.path.join(glob.escape(os.fspath(existing)), path.relative_to(existing))
        paths = sorted(glob.glob(pattern, recursive=True))
    files = [os.path.abspath(path) for path in paths if not os.path.isdir(path)]
    folders = [os.path.abspath(path) for path in paths if os.path.isdir(path)]
    if folders and not files:
        hint = f"name its files, such as {source.partition(':')[0]}:{folders[0]}/*"
        raise ValueError(f"data.source is {source!r}: {folders[0]} is a folder; {hint}")
    require(bool(files), "data.source", source, f"no file matches {os.path.abspath(path)}")
    for file in files:
        kind = "a broken link" if not os.path.exists(file) else "neither a file nor a folder"
        require(os.path.isfile(file), "data.source", source, f"{file} is {kind}")
    return files


def stamps(paths: Iterable[str | os.PathLike]) -> str:
    """Returns size and modification time of each file, one per line. Raises ValueError if one is missing."""
    lines = []
    for path in paths:
        with readable(path):
            stat = os.stat(path)
        lines.append(f"{os.fspath(path)} {stat.st_size} {stat.st_mtime_ns}")
    return "\n".join(lines)


@contextlib.contextmanager
def readable(path: str | os.PathLike) -> Iterator[None]:
    """Converts OS and decompression errors to a ValueError that names the file."""
    try:
        yield
    except EOFError:
        raise ValueError(f"{path}: cannot be read (the compressed file ends too early)") from None
    except (OSError, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise ValueError(f"{path}: cannot be read ({reason})") from None


def guarded(values: Iterable[Any], name: str) -> Iterator[Any]:
    """Yields the values of a library's iterator; converts errors to a ValueError that names the source."""
    values = iter(values)
    while True:
        try:
            value = next(values)
        except StopIteration:
            return
        except Exception as error:  # file, format or network errors, specific to each library
            raise ValueError(f"{name}: cannot be read ({one_line(error)})") from error
        yield value


def decode(data: bytes | bytearray, path: str, offset: int = 0) -> str:
    """Decodes UTF-8. Raises a ValueError that names the file and the byte offset if it is invalid."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {offset + error.start} ({error.reason})") from None


def read_text(path: str) -> Iterator[str]:
    """Yields the documents of a text file: the text between separators, without the line ends around them."""
    previous = None
    for offset, data in split_file(path, SEPARATOR):
        if previous is not None:
            yield previous.rstrip("\r\n")
        text = decode(data, path, offset)
        previous = text if previous is None else text.lstrip("\r\n")
    if previous is not None:
        yield previous


def read_jsonl(path: str, field: str) -> Iterator[str | None]:
    """Yields a field of each line. Raises a ValueError that names the line if it is neither text nor null."""
    for number, line in jsonl_lines(path):
        where = f"{path}:{number}"
        value = text_of(parse_object(line, where), field, where)
        text = value or ""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = text[error.start]
            raise ValueError(f"{where}: field {field!r} holds {half!r}, half of a surrogate pair") from None
        yield value


def jsonl_lines(path: str) -> Iterator[tuple[int, bytearray]]:
    """Yields the nonblank lines of a file, with line numbers from 1."""
    for number, (_, line) in enumerate(split_file(path, b"\n"), 1):
        # A line may begin with a byte order mark, at the start of the file or of a concatenated file.
        line = line.removeprefix(BOM)
        if line.strip():
            yield number, line


def parse_object(line: bytes | bytearray, where: str) -> dict[str, Any]:
    """Parses a JSON object in UTF-8. Raises ValueError for anything else."""
    text = decode(line, where)
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {json_reason(error)}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: must be a JSON object")
    return record


def json_reason(error: ValueError | RecursionError) -> str:
    """Returns why text could not be parsed as JSON."""
    # Unlike JSON, Python limits the size of integers; its message suggests changing an interpreter setting.
    is_limit = "sys.set_int_max_str_digits" in str(error)
    return "has an integer of too many digits" if is_limit else f"not JSON ({one_line(error)})"


def read_parquet(path: str, field: str) -> Iterator[str | None]:
    """Yields a column of a parquet file. Raises ValueError unless it has such a column of text."""
    for number, row in enumerate(parquet_rows(path, field)):
        yield text_of(row, field, f"{path} row {number}")


def parquet_rows(path: str, field: str | None = None) -> Iterator[dict[str, Any]]:
    """Yields the rows of a parquet file, with all columns or one. Raises ValueError if it does not exist."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path}: parquet needs pyarrow: {INSTALL_HF}") from None
    # Opened here because pyarrow accepts only UTF-8 paths.
    with readable(path), open(path, "rb") as opened:
        try:
            file = pyarrow.parquet.ParquetFile(opened)
        except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
            raise ValueError(f"{path}: not a parquet file ({one_line(error)})") from None
        if field is not None:
            text_of(dict.fromkeys(file.schema_arrow.names), field, path)
        batches = file.iter_batches(batch_size=1024, columns=None if field is None else [field])
        yield from guarded((row for batch in batches for row in batch.to_pylist()), path)


def text_of(record: Mapping[str, Any], field: str, where: str) -> str | None:
    """Returns a field of a record. Raises ValueError unless the field is text or null."""
    if field not in record:
        raise ValueError(f"{where}: has no field {field!r}; it has {listed(record, SHOWN_NAMES)}")
    value = record[field]
    if not isinstance(value, str | None):
        raise ValueError(f"{where}: field {field!r} is {type_name(value)}: must be text or null")
    return value


def split_file(path: str, separator: bytes) -> Iterator[tuple[int, bytearray]]:
    """Streams the parts of a file between separators, with their byte offsets.

    Gzip, bzip2, xz and zstd are decompressed; offsets count decompressed bytes. Raises a ValueError that
    names the file if it cannot be read, is corrupt, or is not text.
    """
    with readable(path), open(path, "rb") as raw:
        head = raw.read(HEAD)
        raw.seek(0)
        with _decompressed(raw, head, path) as file:
            pending = bytearray(file.read(HEAD))
            _check_is_text(pending, path)
            offset = searched = 0
            while True:
                start = 0
                while (end := pending.find(separator, max(start, searched))) >= 0:
                    yield offset + start, pending[start:end]
                    start = end + len(separator)
                del pending[:start]
                offset += start
                # A separator may begin in this chunk and end in the next.
                searched = max(len(pending) - len(separator) + 1, 0)
                chunk = file.read(CHUNK)
                if not chunk:
                    break
                pending += chunk
            yield offset, pending


def _decompressed(raw: IO[bytes], head: bytes, path: str) -> contextlib.AbstractContextManager[IO[bytes]]:
    """Opens the decompressed data of a file. Detects the format by its first bytes, not its name."""
    for magic, opener in COMPRESSED.items():
        if re.match(magic, head):
            return opener(raw)
    if re.match(ZSTD, head):
        try:
            import pyarrow
        except ImportError:
            raise ValueError(f"{path}: zstd needs pyarrow: {INSTALL_HF}") from None
        return pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd")
    return contextlib.nullcontext(raw)


def _check_is_text(head: bytearray, path: str) -> None:
    """Raises ValueError for formats that are often mistaken for text, some of which are valid UTF-8."""
    # In UTF-16, every other byte of Latin text is zero.
    even, odd = (head[start::2].count(0) * 2 / max(len(head), 4) for start in (0, 1))
    is_utf16 = head.startswith((b"\xff\xfe", b"\xfe\xff")) or abs(even - odd) > 0.7
    is_zip, is_tar = head.startswith(b"PK\x03\x04"), head[257:262] == b"ustar"
    if is_utf16 or is_zip or is_tar:
        name = "UTF-16" if is_utf16 else f"a {'zip' if is_zip else 'tar'} archive"
        raise ValueError(f"{path}: looks like {name}: must be text in UTF-8, plain or compressed")
