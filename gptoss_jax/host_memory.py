"""Memory that this process has freed, but not returned to the system. Standard library only.

`startup.TUNABLES` keep freed memory for the next step. But what was freed by compiling, evaluating and
sampling stays as well; and once a small allocation has taken a piece of the memory of a step, the next step
needs memory elsewhere.
"""

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator

# A process that has grown by more than this has memory that no step uses anymore.
GROWTH = 1.05


def release() -> None:
    """Returns free memory to the system; a no-op without glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(0)


def resident_bytes() -> int:
    """Returns the resident memory of this process without that of files, or 0 if the system does not tell."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            _, resident, of_files, *_ = map(int, file.read().split())
            return (resident - of_files) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


@contextlib.contextmanager
def released(is_needed: bool) -> Iterator[None]:
    """Releases free memory before and after a block that runs programs other than the step, if needed."""
    if is_needed:
        release()
    yield
    if is_needed:
        release()


class Growth:
    """Releases free memory when a loop of equal steps needs more than at first."""

    def __init__(self) -> None:
        self._limit = 0.0

    def check(self) -> None:
        """Call once a step, the first time when a step has run and its memory is still there."""
        if not self._limit:
            self._limit = GROWTH * resident_bytes()
        elif resident_bytes() > self._limit:
            release()
            # The rest is in use.
            self._limit = max(self._limit, GROWTH * resident_bytes())
