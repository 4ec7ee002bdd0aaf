"""Files of text: which ones a path or pattern names, and their bytes, decompressed, a part at a time."""

import bz2
import contextlib
import glob
import gzip
import lzma
import os
import zlib
from collections.abc import Iterable, Iterator
from typing import IO

from gptoss_jax.config import require
from gptoss_jax.config.base import one_line
from gptoss_jax.config.paths import user_path

INSTALL_HF = "pip install 'gptoss-jax[hf]'"
CHUNK = 1 << 20
HEAD = 512  # bytes that show what a file is


def find_files(name: str, source: str) -> list[str]:
    """The files that a path or glob pattern names, in sorted order, as absolute paths.

    What exists is never read as a pattern: neither the whole path nor the folders that it begins with.

    Raises ValueError if there are none, or if one is not a regular file.
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
    """Size and time of each file, one a line. Raises ValueError for a file that is gone."""
    lines = []
    for path in paths:
        with readable(path):
            stat = os.stat(path)
        lines.append(f"{os.fspath(path)} {stat.st_size} {stat.st_mtime_ns}")
    return "\n".join(lines)


@contextlib.contextmanager
def readable(path: str | os.PathLike) -> Iterator[None]:
    """Turns what the system and the decompressors raise into a ValueError that names the file."""
    try:
        yield
    except EOFError:
        raise ValueError(f"{path}: cannot be read (the compressed file ends too early)") from None
    except (OSError, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise ValueError(f"{path}: cannot be read ({reason})") from None


def split_file(path: str, separator: bytes) -> Iterator[tuple[int, bytearray]]:
    """The parts of a file between separators, each with its place in bytes.

    A gzip, bzip2, xz or zstd file is decompressed, and places are offsets in the decompressed data. Only one
    part at a time is in memory.

    Raises ValueError, naming the file, for one that cannot be read, is damaged, or is not UTF-8 text at all.
    """
    with readable(path), open(path, "rb") as raw:
        kind = _compression(raw.read(HEAD))
        raw.seek(0)
        with _decompressed(raw, kind, path) as file:
            pending = bytearray(file.read(HEAD))
            _check_is_text(pending, path)
            place = searched = 0
            while True:
                start = 0
                while (end := pending.find(separator, max(start, searched))) >= 0:
                    yield place + start, pending[start:end]
                    start = end + len(separator)
                del pending[:start]
                place += start
                # A separator may begin in this chunk and end in the next.
                searched = max(len(pending) - len(separator) + 1, 0)
                chunk = file.read(CHUNK)
                if not chunk:
                    break
                pending += chunk
            yield place, pending


def decode(data: bytes | bytearray, path: str, place: int = 0) -> str:
    """The text of UTF-8 bytes. Raises ValueError, naming the file and the byte, for bytes that are not."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {place + error.start} ({error.reason})") from None


def _compression(head: bytes) -> str | None:
    """Returns the compression of a file, from its first bytes, since its name may be wrong; None if none."""
    if head.startswith(b"\x1f\x8b"):
        return "gzip"
    if head.startswith(b"BZh") and head[4:10] in (b"1AY&SY", b"\x17rE8P\x90"):  # the second if it is empty
        return "bzip2"
    if head.startswith(b"\xfd7zXZ\0"):
        return "xz"
    # A frame, or the frame to skip that some tools write first.
    if head.startswith(b"\x28\xb5\x2f\xfd") or (head[1:4] == b"\x2a\x4d\x18" and head[0] >> 4 == 5):
        return "zstd"
    return None


def _decompressed(
    raw: IO[bytes], kind: str | None, path: str
) -> contextlib.AbstractContextManager[IO[bytes]]:
    if kind == "zstd":
        try:
            import pyarrow
        except ImportError:
            raise ValueError(f"{path}: zstd needs pyarrow: {INSTALL_HF}") from None
        return pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd")
    openers = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}
    return openers[kind](raw) if kind else contextlib.nullcontext(raw)


def _check_is_text(head: bytearray, path: str) -> None:
    """Raises ValueError for formats that are often mistaken for text. Some of them are valid UTF-8."""
    # Latin letters in UTF-16 are a zero byte and another one each.
    even, odd = (head[start::2].count(0) * 2 / max(len(head), 4) for start in (0, 1))
    found = None
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or abs(even - odd) > 0.7:
        found = "UTF-16"
    elif head.startswith(b"PK\x03\x04"):
        found = "a zip archive"
    elif head[257:262] == b"ustar":
        found = "a tar archive"
    if found:
        raise ValueError(f"{path}: looks like {found}: must be text in UTF-8, plain or compressed")
