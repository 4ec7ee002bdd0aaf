"""What must happen before jax is loaded. Imports nothing but the standard library."""

import os
import sys
from collections.abc import Callable

HUGE_PAGES = "glibc.malloc.hugetlb=1"


def use_huge_pages() -> None:
    """Starts this process anew with memory in huge pages; does nothing where that is done already or not
    known.

    XLA for CPU gets and returns the memory of every step, and with pages of 4 KiB a third of the step's time
    goes to touching them for the first time. glibc reads this setting only at the start of a process (2.35
    and later).
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if not sys.platform.startswith("linux") or "glibc.malloc.hugetlb" in tunables or not sys.executable:
        return
    os.environ["GLIBC_TUNABLES"] = f"{tunables}:{HUGE_PAGES}" if tunables else HUGE_PAGES
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def run(command: Callable[[], object], name: str) -> int:
    """Runs a command and returns its exit code; what a user can mend is one line on stderr, without a
    traceback.

    2: a ValueError, input that is not allowed. 1: what went wrong on the way. 130: Ctrl-C.
    """
    try:
        command()
    except ValueError as error:
        print(f"{name}: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except (OSError, FloatingPointError, MemoryError) as error:
        print(f"{name}: error: {_one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
