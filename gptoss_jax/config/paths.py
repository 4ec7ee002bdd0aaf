"""Paths and texts as users write them, and folders for caches."""

import atexit
import functools
import os
import pathlib
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator

from gptoss_jax.config.base import require


def user_path(path: str | os.PathLike, field: str) -> pathlib.Path:
    """Expands `~` and `~user` at the start of a path. Every path that a user gives goes through here.

    The result may go through here again: it does not begin with `~`.

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
    found = pathlib.Path(expanded)
    # pathlib drops the leading `./`.
    return pathlib.Path.cwd() / found if str(found).startswith("~") else found


def path_exists(text: str, field: str) -> bool:
    """Returns True if a text is the path of a file or folder. It need not be a valid path."""
    try:
        return os.path.lexists(user_path(text, field))
    except ValueError:
        return False


def output_file(path: str | os.PathLike, field: str) -> pathlib.Path:
    """The file that a command will write its result to.

    Raises ValueError for a path that cannot be one, so that it is known before the work is done.
    """
    file = user_path(path, field)
    require(file.parent.is_dir(), field, os.fspath(path), "its folder does not exist")
    require(not file.is_dir(), field, os.fspath(path), "is a folder; name a file")
    return file


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


def cache_folders(name: str) -> Iterator[pathlib.Path]:
    """Folders for files that can be made again, the preferred one first; they need not exist.

    These are `gptoss_jax/NAME` in XDG_CACHE_HOME (default: `~/.cache`), and the same in `private_folder()`
    for a process that has no home folder, or one that it cannot write to.
    """
    try:
        home = user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "XDG_CACHE_HOME")
    except ValueError:
        pass
    else:
        yield home / "gptoss_jax" / name
    yield private_folder() / name


def cache_folder(name: str) -> pathlib.Path:
    """The first of `cache_folders` that can be written to; it is created."""
    for folder in cache_folders(name):
        if is_writable(folder):
            break
    return folder


def is_writable(folder: pathlib.Path) -> bool:
    """Creates a folder. Returns whether files can be created in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


@functools.cache
def private_folder() -> pathlib.Path:
    """A folder among the temporary files that no other user can write to: they could plant a library there.

    It is `gptoss_jax-UID`, which later processes find again. If another user has taken that name, it is a
    folder of this process, removed when it ends.
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
    """Gives matplotlib a folder in place of the default one if that cannot be written to.

    Without it, matplotlib prints warnings, and searches all fonts in every process. Must run before
    matplotlib is imported.
    """
    if "MPLCONFIGDIR" in os.environ:
        return
    bases = [("XDG_CONFIG_HOME", "~/.config"), ("XDG_CACHE_HOME", "~/.cache")]
    if sys.platform == "darwin":
        bases = [("", "~")]
    try:
        folders = [user_path(os.environ.get(name) or default, name) for name, default in bases]
    except ValueError:
        folders = []
    if not folders or not all(map(_could_write, folders)):
        os.environ["MPLCONFIGDIR"] = str(cache_folder("matplotlib"))


def _could_write(folder: pathlib.Path) -> bool:
    """Returns True if a folder can be written to, or created. Creates nothing."""
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
