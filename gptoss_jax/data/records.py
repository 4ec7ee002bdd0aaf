"""Readers of text, JSON lines and parquet files: their documents, and None where a field is null."""

import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any

from gptoss_jax.config.base import listed, one_line
from gptoss_jax.data.files import INSTALL_HF, decode, readable, split_file

BOM = b"\xef\xbb\xbf"
SEPARATOR = b"<|endoftext|>"
# Names in an error message: a record may have thousands.
SHOWN_NAMES = 20


def read_text(path: str) -> Iterator[str]:
    """The documents of a text file: all of it, or the parts between literal separators."""
    after = None
    for place, data in split_file(path, SEPARATOR):
        # The line ends around a separator belong to it.
        if after is not None:
            yield after.rstrip("\r\n")
        text = decode(data, path, place)
        after = text if after is None else text.lstrip("\r\n")
    yield after


def read_jsonl(path: str, field: str) -> Iterator[str | None]:
    """A field of each line. Raises ValueError, naming the line, unless the field is text or null."""
    for number, (_, line) in enumerate(split_file(path, b"\n"), 1):
        # A line may begin with a byte order mark: that of the file, or of one that was joined to it.
        line = line.removeprefix(BOM)
        if line.strip():
            yield _read_line(line, f"{path}:{number}", field)


def _read_line(line: bytearray, where: str, field: str) -> str | None:
    text = decode(line, where)
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: must be a JSON object")
    if field not in record:
        raise ValueError(f"{where}: has no field {field!r}; it has {listed(record, SHOWN_NAMES)}")
    value = record[field]
    if not isinstance(value, str | None):
        raise ValueError(f"{where}: field {field!r} is a {type(value).__name__}: must be text or null")
    try:
        (value or "").encode()
    except UnicodeEncodeError as error:
        half = value[error.start]
        raise ValueError(f"{where}: field {field!r} holds {half!r}, half of a surrogate pair") from None
    return value


def read_parquet(path: str, field: str) -> Iterator[str | None]:
    """A column of a parquet file. Raises ValueError if no column of text has that name."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path}: parquet needs pyarrow: {INSTALL_HF}") from None
    # Opened here: pyarrow takes only paths in UTF-8.
    with readable(path), open(path, "rb") as opened:
        try:
            file = pyarrow.parquet.ParquetFile(opened)
        except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
            raise ValueError(f"{path}: not a parquet file ({one_line(error)})") from None
        columns = file.schema_arrow.names
        if field not in columns:
            raise ValueError(f"{path}: has no column {field!r}; it has {listed(columns, SHOWN_NAMES)}")
        batches = file.iter_batches(batch_size=1024, columns=[field])
        values = guarded((batch.column(0).to_pylist() for batch in batches), path)
        yield from checked_texts(itertools.chain.from_iterable(values), path, field)


def checked_texts(values: Iterable[object], name: str, field: str) -> Iterator[str | None]:
    """Passes on the texts and nulls of a column. Raises ValueError, naming the row, for anything else."""
    for row, value in enumerate(values):
        if not isinstance(value, str | None):
            kind = type(value).__name__
            raise ValueError(f"{name} row {row}: column {field!r} is a {kind}: must be text or null")
        yield value


def guarded(values: Iterable[Any], name: str) -> Iterator[Any]:
    """Passes on what a library reads. Whatever it raises becomes a ValueError with the name of the source."""
    values = iter(values)
    while True:
        try:
            value = next(values)
        except StopIteration:
            return
        except Exception as error:  # of the file, its format, the network: each library has its own
            raise ValueError(f"{name}: cannot be read ({one_line(error)})") from error
        yield value
