"""Datasets of the Hugging Face hub, and local folders that the datasets library reads."""

import functools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping

from gptoss_jax.config import require
from gptoss_jax.config.base import listed, one_line
from gptoss_jax.config.paths import user_path
from gptoss_jax.data.files import INSTALL_HF, stamps
from gptoss_jax.data.records import SHOWN_NAMES, checked_texts, guarded

SPEC = "hf:NAME:CONFIG:SPLIT"
# The library takes these, in the path of a local folder, for a pattern or a chain of archives.
UNREADABLE = ("*", "?", "[", "::", "\n")

Read = Callable[[], Iterable[str | None]]


def open_dataset(source: str, name: str, field: str) -> tuple[str, Read, Callable[[], str] | None]:
    """Opens the dataset `NAME:CONFIG:SPLIT` for streaming.

    Without a config it is the dataset's default, without a split `train` or the only one there is.

    Returns:
      Its fingerprint, a function that reads the field of all rows, and for a local folder one that gives the
      sizes and times of its files, with which the fingerprint ends.

    Raises ValueError for a dataset that cannot be loaded, and lists the configs or splits to choose from.
    """
    try:
        import datasets
    except ImportError:
        raise ValueError(f"data.source is {source!r}: hf needs datasets: {INSTALL_HF}") from None
    name, config, split = _parse(source, name)
    try:
        builder = datasets.load_dataset_builder(name, config)
        splits = builder.as_streaming_dataset()
    except Exception as error:  # not found, not reached, no such config, no files that it knows, …
        _check_config(source, name, config)
        raise ValueError(f"data.source is {source!r}: cannot be loaded ({one_line(error)})") from error
    if split is None:
        split = next(iter(splits)) if len(splits) == 1 else "train"
    allowed = f"has no split {split!r}; it has {listed(splits, SHOWN_NAMES)}: name one, as in {SPEC}"
    require(split in splits, "data.source", source, allowed)
    stream, files = splits[split], None
    if os.path.isdir(name):
        files = sorted(str(path) for path in pathlib.Path(name).resolve().rglob("*") if path.is_file())
        content = stamps(files)
    else:
        # The hash is that of the commit on the Hub.
        content = f"{builder.hash} {builder.info.version} {builder.info.dataset_size}"
    return (
        f"{source}\n{builder.config.name} {content}",
        lambda: checked_texts(_column(guarded(stream, source), source, field), name, field),
        functools.partial(stamps, files) if files else None,
    )


def _parse(source: str, name: str) -> tuple[str, str | None, str | None]:
    """Name or folder, config and split of `NAME:CONFIG:SPLIT`; None for what is left out or empty.

    The colons of a folder that exists belong to its name.
    """
    words = name.split(":")
    for count in range(len(words), 0, -1):
        joined = ":".join(words[:count])
        if joined and os.path.isdir(folder := user_path(joined, "data.source")):
            for sign in UNREADABLE:
                allowed = f"the datasets library cannot read a path that holds {sign!r}; rename the folder"
                require(sign not in os.path.abspath(folder), "data.source", source, allowed)
            break
    else:
        folder, count = words[0], 1
    rest = [word or None for word in words[count:]]
    require(bool(words[0]) and len(rest) <= 2, "data.source", source, f"must be {SPEC}#field")
    return os.fspath(folder), *rest, *[None] * (2 - len(rest))


def _check_config(source: str, name: str, config: str | None) -> None:
    """Raises ValueError with a list where the dataset has configs and the right one is not named."""
    import datasets

    try:
        known = datasets.get_dataset_config_names(name)
    except Exception:  # whatever it is, it is why the dataset could not be loaded, and is reported as that
        return
    if config in known or (config is None and len(known) == 1):
        return
    missing = "needs a config" if config is None else f"has no config {config!r}"
    names = listed(known, SHOWN_NAMES)
    raise ValueError(f"data.source is {source!r}: {missing}; it has {names}: name one, as in {SPEC}")


def _column(rows: Iterable[Mapping[str, object]], source: str, field: str) -> Iterator[object]:
    for row in rows:
        allowed = f"has no column {field!r}; it has {listed(row, SHOWN_NAMES)}"
        require(field in row, "data.source", source, allowed)
        yield row[field]
