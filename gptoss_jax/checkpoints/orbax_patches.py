"""Patches for Orbax: local paths with special characters, and no stray tracebacks after errors."""

import asyncio
import pathlib
from collections.abc import Coroutine, Iterator
from typing import Any

from etils import epath

try:  # private: without it, a failed read prints a traceback for each file, nothing else changes
    from orbax.checkpoint._src import asyncio_utils
except ImportError:
    asyncio_utils = None  # type: ignore[assignment]

_LocalBase: Any = type(epath.Path("/"))


@epath.register_path_cls
class LocalPath(_LocalBase):
    """A local path that may contain any characters.

    Orbax finds the parts of a checkpoint with `epath.Path.glob`, which treats the folder as part of the
    pattern: under `lr=[3e-4]` it matches nothing, and the checkpoint is never finalized. This class takes the
    folder literally. `epath` also mistakes an absolute path under /gs, /s3, /az or /hf for a bucket URL.
    """

    _uri_scheme = None

    def glob(self, pattern: str) -> Iterator["LocalPath"]:
        for path in pathlib.Path(self).glob(pattern):
            yield type(self)(path)


async def _finish_all_tasks(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Awaits an Orbax coroutine and, if it fails, all other tasks of its event loop.

    Orbax raises the first error of many parallel reads or writes and closes the loop. TensorStore still
    reports the others to that loop, and asyncio logs errors that were never awaited: each prints a traceback.
    """
    loop = asyncio.get_running_loop()
    try:
        return await coroutine
    except Exception:
        loop.set_exception_handler(lambda loop, context: None)
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.gather(*others, return_exceptions=True)
        raise


# Orbax runs every coroutine with this function, each in a new event loop. Unlike another asyncio policy,
# replacing it does not affect other event loops of the process.
if hasattr(asyncio_utils, "run_sync"):
    _orbax_run_sync = asyncio_utils.run_sync
    asyncio_utils.run_sync = lambda coro: _orbax_run_sync(_finish_all_tasks(coro))
