"""Process setup before jax is imported, and exit codes of commands. Standard library only."""

import codecs
import contextlib
import glob
import importlib.machinery
import io
import os
import signal
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn

from gptoss_jax import status
from gptoss_jax.interrupts import CODES, ENDINGS, INTERRUPTED, Interrupts, ending
from gptoss_jax.terminal import ASCII, is_terminal

# Huge pages, and no trimming: XLA for CPU allocates and frees gigabytes in every step. One arena for all
# threads, because other arenas map large blocks and unmap them at once.
TUNABLES = (
    "glibc.malloc.arena_max=1",
    "glibc.malloc.hugetlb=1",
    "glibc.malloc.mmap_max=0",
    "glibc.malloc.trim_threshold=68719476736",
)


def keep_memory() -> None:
    """Restarts this process with glibc malloc tunables; a no-op if they are set already or not on Linux.

    Without them a CPU training step spends much of its time on page faults, in memory that was freed by the
    step before. glibc reads tunables only at the start of a process (hugetlb: 2.35 and later).
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if not sys.platform.startswith("linux") or "glibc.malloc." in tunables or not sys.executable:
        return
    os.environ["GLIBC_TUNABLES"] = ":".join((*filter(None, [tunables]), *TUNABLES))
    # Without permission to start the interpreter again, the command is only slower.
    with contextlib.suppress(OSError):
        # The new interpreter would print a traceback for a Ctrl-C before `Interrupts.install`.
        signal.pthread_sigmask(signal.SIG_BLOCK, CODES)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    signal.pthread_sigmask(signal.SIG_UNBLOCK, CODES)


# Environment variables that a TPU machine or its user sets.
TPU_VARIABLES = ("TPU_", "CLOUD_TPU_", "COLAB_TPU_", "JAX_FORCE_TPU_INIT", "LIBTPU_INIT_ARGS")
# Variables that JAX and libtpu set on any machine; child processes inherit them.
SET_ON_IMPORT = ("TPU_SKIP_MDS_QUERY", "TPU_LIBRARY_PATH")


def hide_tpu_compiler() -> None:
    """Hides an installed libtpu from JAX on a machine without a TPU; call before jax is imported.

    JAX loads libtpu to look for a TPU unless JAX_PLATFORMS is set, and libtpu prints errors if there is
    none. Hidden, it counts as not installed: JAX finds GPUs and the CPU as usual.
    """
    named = os.environ.get("JAX_PLATFORMS") or os.environ.get("JAX_PLATFORM_NAME")
    if not named and "jax" not in sys.modules and not may_have_tpu():
        # Makes `import libtpu` raise ModuleNotFoundError.
        sys.modules["libtpu"] = None  # type: ignore[assignment]
        os.environ.pop("TPU_LIBRARY_PATH", None)


def may_have_tpu() -> bool:
    """Returns True if a device, a chip on the PCI bus or an environment variable indicates a TPU."""
    if any(name.startswith(TPU_VARIABLES) and name not in SET_ON_IMPORT for name in os.environ):
        return True
    library = os.environ.get("TPU_LIBRARY_PATH")
    if library is not None and not _is_of_package(library):
        return True
    # Chips are /dev/accel0 or, newer ones, /dev/vfio/0; /dev/vfio/vfio exists on other machines too.
    if glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"):
        return True
    return any(map(_is_tpu, glob.glob("/sys/bus/pci/devices/*")))


def _is_of_package(library: str) -> bool:
    """Returns True for the library of the Python package libtpu, which sets TPU_LIBRARY_PATH to it."""
    package = importlib.machinery.PathFinder.find_spec("libtpu")
    return package is not None and os.path.dirname(library) == os.path.dirname(package.origin or "")


def _is_tpu(device: str) -> bool:
    """Returns True for a Google PCI device, except disks and network cards of its virtual machines."""
    try:
        with open(f"{device}/vendor", encoding="ascii") as file:
            vendor = file.read().strip()
        with open(f"{device}/class", encoding="ascii") as file:
            return vendor == "0x1ae0" and not file.read().startswith(("0x01", "0x02"))
    except OSError:
        return False


def run(command: Callable[[], object], name: str) -> int:
    """Runs a command and returns its exit code: 0, or that of `report`.

    Warnings, and errors that a user can fix, are printed as one line on stderr, without a traceback.
    """
    print_any_text()
    shown: set[str] = set()

    def show(message: Warning | str, *_: object, **__: object) -> None:
        # Steps of a command may open the same folder.
        if str(message) not in shown:
            shown.add(str(message))
            say(name, "warning", message)

    with warnings.catch_warnings():
        warnings.showwarning = show
        try:
            command()
        except (Exception, KeyboardInterrupt) as error:
            return report(error, name)
        except SystemExit as done:
            if done.code not in ENDINGS:
                raise
            return report(done, name)
    return 0


def report(error: BaseException, name: str) -> int:
    """Prints an error that a user can fix and returns the exit code; raises any other error.

    2: ValueError, input that is not allowed. 1: a failure on the way. 130: Ctrl-C. 143: SIGTERM.
    """
    status.erase()
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        code = INTERRUPTED if isinstance(error, KeyboardInterrupt) else int(str(error.code))
        if code not in ENDINGS:  # Rich's, for a reader that is gone
            return code
        note = Interrupts.current.last_note if Interrupts.current is not None else ""
        said = error if isinstance(error, KeyboardInterrupt) and error.args else note
        with contextlib.suppress(OSError):
            print(ending(name, code, said, is_terminal(sys.stderr)), end="", file=sys.stderr, flush=True)
        return code
    if isinstance(error, BrokenPipeError):
        # The reader is gone, for example `| head`; flushing the rest at exit must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if not isinstance(error, (ValueError, OSError, FloatingPointError, MemoryError)):
        raise error
    message: BaseException | str = error
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        message = f"{os.fsdecode(error.filename)}: {error.strerror.lower()}"  # without [Errno 2]
    say(name, "error", message)
    return 2 if isinstance(error, ValueError) else 1


def leave(code: int) -> NoReturn:
    """Ends the process with the exit code of `run`.

    After a signal at once: the interpreter's own shutdown waits for threads, and threads of JAX and Orbax
    that still run when it is over crash the process.
    """
    if code in ENDINGS:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    # The work is done: a late signal must not change the exit code while the interpreter shuts down.
    for number in CODES:
        signal.signal(number, signal.SIG_IGN)
    sys.exit(code)


def print_any_text() -> None:
    """Makes stdout and stderr accept any text, regardless of the locale's encoding.

    Undecodable bytes of a file name are written unchanged; other characters without an encoding become ASCII
    that resembles them, or "?".
    """
    codecs.register_error("gptoss_jax.printed", _encode_unencodable)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # else None, or replaced by something without an encoding
            stream.reconfigure(errors="gptoss_jax.printed")


def _encode_unencodable(error: UnicodeError) -> tuple[bytes, int]:
    """Error handler of `codecs` for `print_any_text`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    # Python represents an undecodable byte of a file name as one of these surrogates.
    encoded = (
        bytes([ord(character) - 0xDC00])
        if 0xDC80 <= ord(character) <= 0xDCFF
        else character.translate(ASCII).encode("ascii", "replace")
        for character in error.object[error.start : error.end]
    )
    return b"".join(encoded), error.end


def say(name: str, what: str, message: BaseException | str) -> None:
    """Prints a message as one line on stderr: `NAME: WHAT: MESSAGE`."""
    line = " ".join(str(message).split()) or type(message).__name__
    print(f"{name}: {what}: {line}", file=sys.stderr, flush=True)
