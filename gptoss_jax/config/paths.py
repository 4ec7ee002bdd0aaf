"""User-supplied paths and text, and cache folders."""

import atexit
import contextlib
import functools
import os
import pathlib
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from typing import TextIO

from gptoss_jax.config.base import require


def user_path(path: str | os.PathLike, field: str) -> pathlib.Path:
    """Expands `~` and `~user` at the start of a path; idempotent. Call it on every user-supplied path.

    Args:
      path: the path; `./~name` for a file or folder whose name begins with `~`.
      field: the setting or argument, for the error message.

    Raises ValueError if the path is empty, contains a null character or cannot be encoded in the locale, or
    if the home folder is unknown (no such user, or neither HOME nor an account for the user id).
    """
    text = os.fspath(path)
    require(text != "", field, text, "must not be empty")
    require("\0" not in text, field, text, "must not contain a null character")
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        encoding = sys.getfilesystemencoding()
        allowed = f"the locale's encoding, {encoding}, cannot represent it; set LC_ALL=C.UTF-8"
        require(False, field, text, allowed)
    expanded = os.path.expanduser(text)
    if text.startswith("~"):
        name = text.partition("/")[0][1:]
        unknown = f"there is no user {name!r}" if name else "the home folder is unknown (set HOME)"
        require(not expanded.startswith("~"), field, text, f"{unknown}; give another path, or ./{text}")
    found = pathlib.Path(expanded)
    # pathlib drops the leading `./`.
    return pathlib.Path.cwd() / found if str(found).startswith("~") else found


def path_exists(text: str, field: str) -> bool:
    """Returns True if this path exists; False if it is not even a valid path."""
    try:
        return os.path.lexists(user_path(text, field))
    except ValueError:
        return False


def output_file(path: str | os.PathLike, field: str) -> pathlib.Path:
    """Returns the path of a command's output file.

    Raises ValueError early, before the result is computed, if the file cannot be written: its folder is
    missing or read-only, or the path is a folder.
    """
    file = user_path(path, field)
    require(file.parent.is_dir(), field, os.fspath(path), "its folder does not exist")
    require(not file.is_dir(), field, os.fspath(path), "is a folder; name a file")
    is_writable = os.access(file if file.exists() else file.parent, os.W_OK)
    require(is_writable, field, os.fspath(path), "cannot be written (permission denied)")
    return file


@contextlib.contextmanager
def replace_file(path: pathlib.Path, field: str) -> Iterator[TextIO]:
    """Opens a temporary text file that replaces `path` on success, and is discarded after an error.

    Anything but a regular file, such as /dev/stdout, and a file in a read-only folder are written directly.
    Raises a ValueError that names the field and the path if writing fails.
    """
    target = pathlib.Path(os.path.realpath(path))
    is_special = target.exists() and not target.is_file()
    is_direct = is_special or not os.access(target.parent, os.W_OK)
    partial = target if is_direct else target.with_name(f".partial-{os.getpid()}")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            yield file
        if not is_direct:
            os.replace(partial, target)
    except BrokenPipeError:
        raise
    except OSError as error:
        require(False, field, os.fspath(path), f"cannot be written ({error.strerror})")
    finally:
        if not is_direct:
            partial.unlink(missing_ok=True)


def require_writable(folder: pathlib.Path, field: str, value: str) -> None:
    """Raises ValueError if a folder is not writable or, if it does not exist, cannot be created."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.exists(path))
    require(there.is_dir(), field, value, f"{there} is a file")
    require(os.access(there, os.W_OK | os.X_OK), field, value, f"no permission to write in {there}")


def require_utf8(path: str | os.PathLike, field: str) -> None:
    """Raises ValueError if a path, in the locale's encoding, is not valid UTF-8.

    C++ libraries (tensorstore) encode paths in UTF-8 in any locale, so they would use a different folder.
    """
    try:
        is_utf8 = os.fsencode(path) == os.fspath(path).encode()
    except UnicodeEncodeError:
        is_utf8 = False
    encoding = sys.getfilesystemencoding()
    allowed = f"checkpoints need a path in UTF-8 (this locale: {encoding}); rename it, or set LC_ALL=C.UTF-8"
    require(is_utf8, field, str(path), allowed)


def user_text(text: str) -> str:
    """Decodes as UTF-8 the bytes of a command-line argument that the locale (LC_ALL=C) could not decode.

    Python represents such bytes as lone surrogates, which no tokenizer accepts. Invalid UTF-8 becomes U+FFFD.
    """
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def cache_root(field: str = "XDG_CACHE_HOME") -> pathlib.Path:
    """Returns the folder of all caches, `gptoss_jax` in XDG_CACHE_HOME (default: `~/.cache`).

    Raises ValueError, naming XDG_CACHE_HOME or, if that is not set, `field`, if the home folder is unknown.
    """
    home = os.environ.get("XDG_CACHE_HOME")
    return user_path(home or "~/.cache", "XDG_CACHE_HOME" if home else field) / "gptoss_jax"


def cache_folder(name: str) -> pathlib.Path:
    """Creates and returns a cache folder.

    The folder is NAME in `cache_root()`, or in `private_folder()` if the home folder is unknown or read-only.
    """
    with contextlib.suppress(ValueError, OSError):
        folder = cache_root() / name
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    folder = private_folder() / name
    folder.mkdir(exist_ok=True)
    return folder


@functools.cache
def private_folder() -> pathlib.Path:
    """Creates and returns a temporary folder that other users, who could plant a library, cannot write to.

    The folder is `gptoss_jax-UID`, which later processes reuse; or, if that name belongs to another user, one
    that is removed at exit.
    """
    folder = pathlib.Path(tempfile.gettempdir(), f"gptoss_jax-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077:
            return folder
    except OSError:
        pass
    folder = pathlib.Path(tempfile.mkdtemp(prefix="gptoss_jax-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def set_matplotlib_folder() -> None:
    """Points matplotlib to a temporary folder if the home folder is not writable.

    Otherwise matplotlib prints warnings and rescans all fonts in every process. Call it before importing
    matplotlib.
    """
    folder = cache_folder("matplotlib")
    if folder.parent.name != "gptoss_jax":
        os.environ.setdefault("MPLCONFIGDIR", str(folder))
