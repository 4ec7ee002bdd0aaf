"""Adapts Orbax to folders of any name, and to errors without tracebacks on stderr."""

import asyncio
import json
import pathlib
import warnings
from collections.abc import Coroutine, Iterator
from typing import Any

import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint._src import asyncio_utils

from gptoss_jax.config import require
from gptoss_jax.config.paths import require_utf8

# The most characters of an error of another library that are repeated; TensorStore's take many hundreds.
LINE = 200

_LocalBase = type(epath.Path("/"))


@epath.register_path_cls
class LocalPath(_LocalBase):
    """A path of the local file system, whatever its name is.

    Orbax finds the parts of a checkpoint with `epath.Path.glob`, which reads the folder as a part of the
    pattern: under `lr=[3e-4]` it finds nothing, and the checkpoint is never completed. Here only the pattern
    is one. `epath` also takes an absolute path under /gs, /s3, /az or /hf for the URL of a bucket.
    """

    _uri_scheme = None

    def glob(self, pattern: str) -> Iterator["LocalPath"]:
        for path in pathlib.Path(self).glob(pattern):
            yield type(self)(path)


def check_folder_name(folder: pathlib.Path, field: str, value: str) -> None:
    """Raises ValueError for a folder whose checkpoints TensorStore could not write, or would write elsewhere.

    Args:
      folder: where the checkpoints are to be, absolute.
      field, value: what the user gave for it, for the error message.
    """
    path = folder.as_posix()
    require("\\" not in path, field, value, "no folder in its path may have a backslash in its name")
    require("gs:/" not in path, field, value, "no folder in its path may have a name that ends with 'gs:'")
    require_utf8(value, field)


class Manager(ocp.CheckpointManager):
    """A checkpoint manager that treats unreadable or incomparable metrics as missing.

    All metrics are read on opening, so a damaged file would otherwise make every checkpoint unreadable.
    Metrics are comparable if the run used `eval_batches` when it saved them, or if that is None.
    """

    def __init__(self, eval_batches: int | None, *args: Any, **kwargs: Any):
        self._eval_batches = eval_batches
        super().__init__(*args, **kwargs)

    def metrics(self, step: int) -> Any:
        try:
            found = super().metrics(step)
            if found is None:
                return None
            float(found["val_loss"])
            return found if self._is_comparable(step) else None
        except (ValueError, TypeError, KeyError) as error:
            path = self.directory / str(step) / "metrics"
            warnings.warn(f"{path}: damaged ({error!r}); its validation loss is ignored", stacklevel=2)
            return None

    def _is_comparable(self, step: int) -> bool:
        if self._eval_batches is None:
            return True
        try:
            record = json.loads((self.directory / str(step) / "record" / "metadata").read_bytes())
            return record["config"]["eval"]["batches"] == self._eval_batches
        except (OSError, ValueError, TypeError, KeyError):  # `restore` reports a damaged record
            return True


async def _drained(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Awaits a coroutine of Orbax and, if it fails, all other tasks of its event loop.

    Orbax raises the first error of many parallel reads or writes and closes the loop. TensorStore reports the
    end of each of the others to that loop, and asyncio reports errors that nobody awaited: each prints a
    traceback.
    """
    loop = asyncio.get_running_loop()
    try:
        return await coroutine
    except Exception:
        loop.set_exception_handler(lambda loop, context: None)
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.gather(*others, return_exceptions=True)
        raise


def _run_sync(coro: Coroutine[Any, Any, Any]) -> Any:
    return _orbax_run_sync(_drained(coro))


# Orbax runs every coroutine with this function, in a new event loop each time. Replacing it affects no other
# event loop of the process, which a different asyncio policy would.
_orbax_run_sync = asyncio_utils.run_sync
asyncio_utils.run_sync = _run_sync


def first_line(error: BaseException) -> str:
    """The first line of the error at the root of a chain of errors, or its type if it has no text."""
    while error.__cause__ is not None:
        error = error.__cause__
    # The text of a KeyError is the repr of its message.
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    lines = str(text).strip().splitlines()
    if not lines:
        return type(error).__name__
    return lines[0] if len(lines[0]) <= LINE else lines[0][:LINE] + "…"
