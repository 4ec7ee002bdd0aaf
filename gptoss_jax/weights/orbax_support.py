"""What Orbax needs in order to take a folder of any name, and to fail with one error and nothing else."""

import asyncio
import contextlib
import pathlib
import warnings
from collections.abc import Iterator
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

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
    """A checkpoint manager for which an unreadable metrics file is a missing one.

    All metrics are read on opening, so a damaged file would otherwise make every checkpoint unreadable.
    """

    def metrics(self, step: int) -> Any:
        try:
            found = super().metrics(step)
            if found is not None:
                float(found["val_loss"])
            return found
        except (ValueError, TypeError, KeyError) as error:
            path = self.directory / str(step) / "metrics"
            warnings.warn(f"{path}: damaged ({error!r}); its validation loss is ignored", stacklevel=2)
            return None


class _DrainingLoop(asyncio.SelectorEventLoop):
    """An event loop that lets its tasks end before it closes."""

    def close(self) -> None:
        while not self.is_closed() and (tasks := asyncio.all_tasks(self)):
            self.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        super().close()


class _DrainingPolicy(asyncio.DefaultEventLoopPolicy):
    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        return _DrainingLoop()


@contextlib.contextmanager
def draining_event_loops() -> Iterator[None]:
    """Makes the event loops that are created in here wait for their tasks before they close.

    Orbax raises the first error of many parallel reads or writes and closes its event loop. TensorStore
    reports the end of each of the others to that loop, and prints a traceback every time.
    """
    before = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(_DrainingPolicy())
    try:
        yield
    finally:
        asyncio.set_event_loop_policy(before)


def first_line(error: BaseException) -> str:
    """The first line of the error at the root of a chain of errors, or its type if it has no text."""
    while error.__cause__ is not None:
        error = error.__cause__
    # The text of a KeyError is the repr of its message.
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    lines = str(text).strip().splitlines()
    return lines[0][:LINE] if lines else type(error).__name__
