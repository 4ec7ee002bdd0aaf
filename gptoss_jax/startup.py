"""What must happen before jax is loaded. Imports nothing but the standard library."""

import codecs
import contextlib
import glob
import importlib.machinery
import os
import sys
import warnings
from collections.abc import Callable

# Memory in huge pages, and none given back: XLA for CPU allocates and frees that of every step, some GB.
TUNABLES = (
    "glibc.malloc.hugetlb=1",
    "glibc.malloc.mmap_max=0",
    "glibc.malloc.arena_max=1",
    "glibc.malloc.trim_threshold=68719476736",
)


def keep_memory() -> None:
    """Starts this process anew so that it keeps its memory, in huge pages; does nothing where that is done
    already or not known.

    XLA for CPU gets and returns the memory of every step, and a third of the step's time goes to touching it
    for the first time again: with pages of 4 KiB always, and where a virtual machine gives pages back, with
    any. glibc reads these settings only at the start of a process (hugetlb: 2.35 and later).
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if not sys.platform.startswith("linux") or "glibc.malloc." in tunables or not sys.executable:
        return
    os.environ["GLIBC_TUNABLES"] = ":".join((*filter(None, [tunables]), *TUNABLES))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


# Variables of the environment that a TPU machine or its user sets.
TPU_VARIABLES = ("TPU_", "CLOUD_TPU_", "COLAB_TPU_", "JAX_FORCE_TPU_INIT", "LIBTPU_INIT_ARGS")
# Those that JAX and libtpu set on any machine, and hand on to the processes that a program starts.
SET_ON_IMPORT = ("TPU_SKIP_MDS_QUERY", "TPU_LIBRARY_PATH")


def hide_tpu_compiler() -> None:
    """Hides an installed libtpu from JAX on a machine without a TPU; must run before jax is imported.

    JAX loads libtpu in every process that names no platform, to look for a TPU. Where there is none, libtpu
    prints several lines of errors first. JAX then acts as if libtpu were not installed: GPUs and the CPU are
    found as ever. JAX_PLATFORMS, if set, decides alone.
    """
    named = os.environ.get("JAX_PLATFORMS") or os.environ.get("JAX_PLATFORM_NAME")
    if not named and "jax" not in sys.modules and not may_have_tpu():
        # An import of it raises ModuleNotFoundError.
        sys.modules["libtpu"] = None
        os.environ.pop("TPU_LIBRARY_PATH", None)


def may_have_tpu() -> bool:
    """Returns True if a device, a chip on the PCI bus or an environment variable indicates a TPU."""
    if any(name.startswith(TPU_VARIABLES) and name not in SET_ON_IMPORT for name in os.environ):
        return True
    library = os.environ.get("TPU_LIBRARY_PATH")
    if library is not None and not _is_of_package(library):
        return True
    # Chips are passed to the process as /dev/accel0 or, newer ones, as /dev/vfio/0; /dev/vfio/vfio is the
    # driver's own and also exists on other machines.
    if glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"):
        return True
    return any(map(_is_tpu, glob.glob("/sys/bus/pci/devices/*")))


def _is_of_package(library: str) -> bool:
    """Returns True if a library belongs to the Python package libtpu, which sets TPU_LIBRARY_PATH to it."""
    package = importlib.machinery.PathFinder.find_spec("libtpu")
    return package is not None and os.path.dirname(library) == os.path.dirname(package.origin or "")


def _is_tpu(device: str) -> bool:
    """Returns True if a PCI device is Google's, and not a disk or network card of its virtual machines."""
    try:
        with open(f"{device}/vendor", encoding="ascii") as file:
            vendor = file.read().strip()
        with open(f"{device}/class", encoding="ascii") as file:
            return vendor == "0x1ae0" and not file.read().startswith(("0x01", "0x02"))
    except OSError:
        return False


def run(command: Callable[[], object], name: str) -> int:
    """Runs a command and returns its exit code; what a user can mend is one line on stderr, without a
    traceback, and so is a warning.

    2: a ValueError, input that is not allowed. 1: what went wrong on the way. 130: Ctrl-C.
    """
    print_any_text()
    shown: set[str] = set()

    def show(message: Warning | str, *_) -> None:
        # Several steps of a command may open the same folder.
        if str(message) not in shown:
            shown.add(str(message))
            say(name, "warning", message)

    with warnings.catch_warnings():
        warnings.showwarning = show
        try:
            command()
        except (Exception, KeyboardInterrupt) as error:
            return report(error, name)
    return 0


def report(error: BaseException, name: str) -> int:
    """Prints an error that a user can fix as one line on stderr and returns the exit code; raises others."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, BrokenPipeError):
        # The reader is gone, for example `| head`; flushing the rest at exit must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if not isinstance(error, (ValueError, OSError, FloatingPointError, MemoryError)):
        raise error
    say(name, "error", error)
    return 2 if isinstance(error, ValueError) else 1


def print_any_text() -> None:
    """Makes stdout and stderr accept every text, whatever the encoding of the locale.

    The bytes of a file name that the locale cannot decode are written as they are. Any other character that
    has no encoding becomes a question mark.
    """
    codecs.register_error("gptoss_jax.printed", _encode_unencodable)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # None, or replaced by something without an encoding
            stream.reconfigure(errors="gptoss_jax.printed")


def _encode_unencodable(error: UnicodeError) -> tuple[bytes, int]:
    """Encodes, as an error handler of `codecs`, what the encoding of a stream cannot."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    # Python represents an undecodable byte of a file name as one of these surrogates.
    encoded = (
        bytes([ord(character) - 0xDC00]) if 0xDC80 <= ord(character) <= 0xDCFF else b"?"
        for character in error.object[error.start : error.end]
    )
    return b"".join(encoded), error.end


def say(name: str, what: str, message: BaseException | str) -> None:
    """Prints a message as one line on stderr: `NAME: WHAT: MESSAGE`."""
    line = " ".join(str(message).split()) or type(message).__name__
    print(f"{name}: {what}: {line}", file=sys.stderr, flush=True)
