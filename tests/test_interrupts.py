"""Ctrl-C and SIGTERM in a process: inside calls that do not return, in cleanups, and of whole commands."""

import os
import pathlib
import pty
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
ENDED = {signal.SIGINT: (130, "name: interrupted"), signal.SIGTERM: (143, "name: terminated")}
PROGRAM = """
import contextlib, ctypes, pathlib, signal, subprocess, sys, tempfile, threading, time, weakref
from gptoss_jax import interrupts, startup

def block():
    # A call into C that does not look at signals, like XLA's compiler.
    lock, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
    libc.pthread_mutex_lock(lock)
    libc.pthread_mutex_lock(lock)

def command():
    COMMAND

# Whoever started the tests may ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
interrupts.Interrupts("name").install()
startup.leave(startup.run(command, "name"))
"""


def start(command, **settings):
    """Runs lines of Python as a command; they print "begun" when the signal may come."""
    program = PROGRAM.replace("COMMAND", command.strip().replace("\n", "\n    "))
    return subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}, **settings,
    )  # fmt: skip


def end(process, *numbers, wait=0.3):
    """Sends signals and returns the exit code, stdout and stderr."""
    try:
        assert process.stdout.readline() == "begun\n"
        for number in numbers:
            time.sleep(wait)
            process.send_signal(number)
        out, said = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, out, said


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a C library with pthreads")


@linux
@pytest.mark.parametrize("number", ENDED)
def test_a_signal_ends_a_call_that_does_not_return(number):
    code, line = ENDED[number]
    process = start("print('begun', flush=True); print('unflushed'); block()")
    assert end(process, number, wait=1) == (code, "unflushed\n", f"{line}\n")


@linux
def test_a_stuck_cleanup_loses_its_folder(tmp_path):
    process = start(f"""
with interrupts.cleanup({str(tmp_path / "partial")!r}):
    pathlib.Path({str(tmp_path / "partial")!r}).mkdir()
    print("begun", flush=True)
    block()
""")
    assert end(process, signal.SIGTERM) == (143, "", "name: terminated\n")
    assert list(tmp_path.iterdir()) == []


@linux
def test_a_patient_block_asks_for_a_second_ctrl_c():
    process = start("""
with interrupts.patient("the step ends first"), interrupts.explain("nothing is saved"):
    print("begun", flush=True)
    block()
""")
    said = "\nname: the step ends first\nname: interrupted: nothing is saved\n"
    assert end(process, signal.SIGINT, signal.SIGINT, wait=1.5) == (130, "", said)


def test_a_patient_block_may_catch_the_exception():
    process = start("""
with interrupts.patient("wait"):
    try:
        print("begun", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        print("stopped")
""")
    assert end(process, signal.SIGINT) == (0, "stopped\n", "")


CLEANUP = """
with interrupts.explain("nothing was written"), interrupts.cleanup(), tempfile.TemporaryDirectory(dir=DIR):
    print("begun", flush=True)
    BODY
"""


@pytest.mark.parametrize("number", ENDED)
def test_cleanup_runs_and_a_second_signal_does_not_disturb_it(tmp_path, number):
    body = """try:
        time.sleep(60)
    finally:
        time.sleep(1)"""
    process = start(CLEANUP.replace("BODY", body).replace("DIR", repr(str(tmp_path))))
    code, line = ENDED[number]
    assert end(process, number, number) == (code, "", f"{line}: nothing was written\n")
    assert list(tmp_path.iterdir()) == []


def test_an_exception_lost_in_a_callback_is_raised_again(tmp_path):
    """Python prints and ignores exceptions in a callback of a weak reference, such as JAX has."""
    body = """class Value: pass
    value = Value()
    reference = weakref.ref(value, lambda _: time.sleep(1))
    del value
    time.sleep(60)"""
    process = start(CLEANUP.replace("BODY", body).replace("DIR", repr(str(tmp_path))))
    assert end(process, signal.SIGINT) == (130, "", "name: interrupted: nothing was written\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", ENDED)
def test_a_late_signal_does_not_change_the_exit_code(number):
    process = start(f"""
import atexit, os
atexit.register(os.kill, os.getpid(), {int(number)})
print("begun", flush=True)
""")
    assert end(process) == (0, "", "")


def test_signals_of_children_stay_there():
    process = start("""
import os, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of fork with threads
child = os.fork()
if not child:
    print("begun", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
print("child ended by", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
""")
    assert end(process) == (0, "child ended by -15\n", "")


def test_the_terminal_is_restored():
    """Line editing turns off the echo."""
    import termios

    terminal, inside = pty.openpty()
    before = termios.tcgetattr(inside)
    process = start(
        "import tty; tty.setraw(0); print('begun', flush=True); time.sleep(60)",
        stdin=inside,
        start_new_session=True,
    )
    assert end(process, signal.SIGTERM)[0] == 143
    assert termios.tcgetattr(inside) == before
    os.close(inside)
    os.close(terminal)


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.3, 0.8, 1.5, 2.5, 4.0])
@pytest.mark.parametrize("number", ENDED)
def test_a_signal_while_a_command_starts(tmp_path, number, delay):
    """Imports of C++ modules, the restart of the process, loading: no traceback, no debris."""
    folders = ["--run-dir", str(tmp_path / "run"), "--data.cache-dir", str(tmp_path / "cache")]
    process = subprocess.Popen(
        [sys.executable, "-m", "gptoss_jax", "train", *folders],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},  # one device
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    time.sleep(delay)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    code, line = ENDED[number]
    # Before the program has installed its handlers, the signal itself ends the process.
    assert process.returncode in (code, -number), said
    if process.returncode == code:
        assert said.splitlines()[-1].startswith(line.replace("name", "gptoss"))
    assert "Traceback" not in said
    assert not list(tmp_path.glob("cache/.partial*"))
