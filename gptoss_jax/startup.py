"""Process setup before jax is imported, Ctrl-C, and exit codes of commands. Standard library only."""

import codecs
import contextlib
import glob
import importlib.machinery
import io
import os
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

from gptoss_jax import status
from gptoss_jax.terminal import ASCII, is_terminal

INTERRUPTED = 130
# Huge pages, and no trimming: XLA for CPU allocates and frees gigabytes in every step.
TUNABLES = (
    "glibc.malloc.hugetlb=1",
    "glibc.malloc.mmap_max=0",
    "glibc.malloc.arena_max=1",
    "glibc.malloc.trim_threshold=68719476736",
)


def keep_memory() -> None:
    """Restarts this process with glibc malloc tunables; a no-op if they are set already or not on Linux.

    Without them a third of a CPU training step's time is page faults, in memory that was freed by the step
    before. glibc reads tunables only at the start of a process (hugetlb: 2.35 and later).
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # blocked by the process before the restart
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if not sys.platform.startswith("linux") or "glibc.malloc." in tunables or not sys.executable:
        return
    os.environ["GLIBC_TUNABLES"] = ":".join((*filter(None, [tunables]), *TUNABLES))
    # Without permission to start the interpreter again, the command is only slower.
    with contextlib.suppress(OSError):
        # The new interpreter would print a traceback for a Ctrl-C before it runs our code.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


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
            with Interrupts(name):
                command()
        except (Exception, KeyboardInterrupt) as error:
            return report(error, name)
    return 0


CLEANUP_SECONDS = 3.0  # after KeyboardInterrupt


class Interrupts:
    """Ends the process on Ctrl-C even while it is inside C++ code, such as XLA's compiler.

    Python handles a signal only when such a call returns, which may take minutes, and then an exception in a
    callback, such as JAX has, is ignored. A thread that hears of the signal at once ends the process if
    KeyboardInterrupt does not. In a block of `patient`, it asks for a second Ctrl-C first.
    """

    current: "Interrupts | None" = None

    def __init__(self, name: str) -> None:
        self._name, self._asked = name, False
        self._handled, self._ended = threading.Event(), threading.Event()
        self.advice: str | None = None  # of `patient`

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        before = signal.getsignal(signal.SIGINT)
        if before not in (signal.default_int_handler, signal.SIG_DFL):
            return  # ignored, as in a background job of a shell, or handled by someone else
        reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        signal.signal(signal.SIGINT, self._handle)
        wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._restored = before, wakeup, sys.unraisablehook
        sys.unraisablehook = self._ignored
        Interrupts.current = self
        threading.Thread(target=self._watch, args=(reader,), name="interrupts", daemon=True).start()

    def __exit__(self, *exception: object) -> None:
        if Interrupts.current is self:
            Interrupts.current = None
            handler, wakeup, sys.unraisablehook = self._restored
            signal.signal(signal.SIGINT, handler)
            signal.set_wakeup_fd(wakeup)
            self._ended.set()
            self._writer.close()

    def _ignored(self, found: "sys.UnraisableHookArgs") -> None:
        """Prints an exception that Python ignores, unless it is that of Ctrl-C."""
        if not issubclass(found.exc_type, KeyboardInterrupt):
            self._restored[2](found)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._handled.set()
        raise KeyboardInterrupt

    def acknowledge(self) -> None:
        """Says that a handler of SIGINT has run."""
        self._handled.set()

    def _watch(self, reader: socket.socket) -> None:
        while numbers := reader.recv(64):
            if signal.SIGINT not in numbers:
                continue
            if self._handled.wait(1.0):
                self._handled.clear()
                self._asked = False
                is_ours = self.advice is None and signal.getsignal(signal.SIGINT) == self._handle
                if is_ours and not self._ended.wait(CLEANUP_SECONDS):
                    self._leave()
            elif self.advice is not None and not self._asked:
                self._asked = True
                status.erase()
                say(self._name, "Ctrl-C", self.advice)
            elif self.advice is not None or signal.getsignal(signal.SIGINT) == self._handle:
                self._leave()
        reader.close()

    def _leave(self) -> NoReturn:
        report(KeyboardInterrupt(), self._name)
        show_cursor()
        leave(INTERRUPTED)


@contextlib.contextmanager
def patient(advice: str) -> Iterator[None]:
    """Lets a long call finish after Ctrl-C instead of ending the process: `advice` says what happens next.

    A second Ctrl-C ends the process all the same.
    """
    interrupts = Interrupts.current
    if interrupts is None:
        yield
        return
    before, interrupts.advice = interrupts.advice, advice
    try:
        yield
    finally:
        interrupts.advice = before


def acknowledge_interrupt() -> None:
    """For a handler of SIGINT that takes the place of Python's: says that it has run."""
    if Interrupts.current is not None:
        Interrupts.current.acknowledge()


def show_cursor() -> None:
    """Shows the cursor, which a progress bar may have hidden."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            if is_terminal(stream):
                stream.write("\x1b[?25h")
                stream.flush()


def report(error: BaseException, name: str) -> int:
    """Prints an error that a user can fix and returns the exit code; raises any other error.

    2: ValueError, input that is not allowed. 1: a failure on the way. 130: Ctrl-C.
    """
    status.erase()
    if isinstance(error, KeyboardInterrupt):
        with contextlib.suppress(OSError):
            # The terminal shows ^C, with the cursor behind it.
            print(file=sys.stderr, end="\n" if is_terminal(sys.stderr) else "")
            print(f"{name}: interrupted" + (f": {error}" if error.args else ""), file=sys.stderr, flush=True)
        return INTERRUPTED
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

    After Ctrl-C at once: the interpreter's own shutdown waits for threads, and threads of JAX and Orbax that
    still run when it is over crash the process.
    """
    if code == INTERRUPTED:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
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
