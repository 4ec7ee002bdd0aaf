"""Paths as users write them."""

import os
import pathlib

from gptoss_jax.config.checked import require


def user_path(path: str | os.PathLike, field: str) -> pathlib.Path:
    """Expands `~` and `~user` at the start of a path. Every path that a user gives goes through here.

    Args:
      path: the path. `./~name` names a file or folder that really begins with `~`.
      field: the setting or argument it was given for, for the error message.

    Raises ValueError for an empty path, one with a null character, and a home folder that is not known: of a
    user who does not exist, or of a process without HOME whose user id has no account.
    """
    text = os.fspath(path)
    require(text != "", field, text, "must not be empty")
    require("\0" not in text, field, text, "must not contain a null character")
    expanded = os.path.expanduser(text)
    if text.startswith("~"):
        name = text.partition("/")[0][1:]
        unknown = f"there is no user {name!r}" if name else "the home folder is not known, set HOME"
        require(not expanded.startswith("~"), field, text, f"{unknown}; give another path, or ./{text}")
    return pathlib.Path(expanded)
