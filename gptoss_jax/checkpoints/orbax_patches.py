"""Local paths with any name for Orbax, and no tracebacks after its errors."""

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
    """A local path with any name.

    Orbax finds the parts of a checkpoint with `epath.Path.glob`, which takes the folder for a part of the
    pattern: under `lr=[3e-4]` it finds nothing, and the checkpoint is never completed. Here the folder is
    taken literally. `epath` also takes an absolute path under /gs, /s3, /az or /hf for the URL of a bucket.
    """

    _uri_scheme = None

    def glob(self, pattern: str) -> Iterator["LocalPath"]:
        for path in pathlib.Path(self).glob(pattern):
            yield type(self)(path)


async def _finish_all_tasks(coroutine: Coroutine[Any, Any, Any]) -> Any:
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


# Orbax runs every coroutine with this function, in a new event loop each time. Replacing it affects no other
# event loop of the process, which another asyncio policy would.
if hasattr(asyncio_utils, "run_sync"):
    _orbax_run_sync = asyncio_utils.run_sync
    asyncio_utils.run_sync = lambda coro: _orbax_run_sync(_finish_all_tasks(coro))
