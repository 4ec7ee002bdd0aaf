"""Paths and texts as users write them."""

import os
import pathlib
import sys

from gptoss_jax.config.checked import require


def user_path(path: str | os.PathLike, field: str) -> pathlib.Path:
    """Expands `~` and `~user` at the start of a path. Every path that a user gives goes through here.

    Args:
      path: the path. `./~name` names a file or folder that really begins with `~`.
      field: the setting or argument it was given for, for the error message.

    Raises ValueError for an empty path, one with a null character, one that the locale's encoding does not
    have, and a home folder that is not known: of a user who does not exist, or of a process without HOME
    whose user id has no account.
    """
    text = os.fspath(path)
    require(text != "", field, text, "must not be empty")
    require("\0" not in text, field, text, "must not contain a null character")
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        encoding = sys.getfilesystemencoding()
        require(False, field, text, f"the locale's encoding, {encoding}, cannot spell it; set LC_ALL=C.UTF-8")
    expanded = os.path.expanduser(text)
    if text.startswith("~"):
        name = text.partition("/")[0][1:]
        unknown = f"there is no user {name!r}" if name else "the home folder is not known, set HOME"
        require(not expanded.startswith("~"), field, text, f"{unknown}; give another path, or ./{text}")
    return pathlib.Path(expanded)


def require_utf8(path: str | os.PathLike, field: str) -> None:
    """Raises ValueError for a path that is other bytes in the locale's encoding than in UTF-8.

    Libraries written in C++ (tensorstore) take paths as UTF-8, whatever the locale says: they would fail, or
    use another folder than Python does.
    """
    try:
        is_utf8 = os.fsencode(path) == os.fspath(path).encode()
    except UnicodeEncodeError:
        is_utf8 = False
    encoding = sys.getfilesystemencoding()
    allowed = f"checkpoints need a path in UTF-8 (this locale: {encoding}); rename it, or set LC_ALL=C.UTF-8"
    require(is_utf8, field, str(path), allowed)


def user_text(text: str) -> str:
    """Repairs text from the command line that the locale could not decode, as in LC_ALL=C: it is UTF-8.

    Python represents undecodable bytes of an argument as lone surrogates, which no tokenizer accepts. Bytes
    that are not UTF-8 become U+FFFD.
    """
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
