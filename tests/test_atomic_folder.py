"""Output folders appear complete or not at all."""

import contextlib
import fcntl
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import types

import numpy as np
import pytest
from helpers.weights import (
    assert_same_tensors,
    listing,
    random_tensors,
    write,
)

from gptoss_jax.checkpoints.export import atomic_folder, check_target
from gptoss_jax.checkpoints.safetensors_io import NewTensor, map_folder, write_tensors

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize("made", [False, True], ids=["new", "empty"])
def test_complete_folder_appears(tmp_path, made):
    target = tmp_path / "deep" / "model"
    if made:
        target.mkdir(parents=True)
    with atomic_folder(target, 10) as partial:
        (partial / "one").write_text("1")
        assert not target.exists() or listing(target) == []
    assert listing(target) == ["one"] and listing(target.parent) == ["model"]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_nonempty_target_is_refused(tmp_path, kind):
    target = tmp_path / "model"
    if kind == "folder":
        target.mkdir()
    precious = target / "precious" if kind == "folder" else target
    precious.write_text("content")
    with pytest.raises(ValueError, match=f"{target}: already exists"), atomic_folder(target, 10):
        raise AssertionError("must not be reached")
    assert precious.read_text() == "content" and listing(tmp_path) == ["model"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_error_leaves_nothing(tmp_path, error):
    with pytest.raises(error), atomic_folder(tmp_path / "model", 10) as partial:
        (partial / "one").write_text("1")
        raise error
    assert listing(tmp_path) == []
    with atomic_folder(tmp_path / "model", 10):
        pass
    assert listing(tmp_path) == ["model"]


def test_failing_chunk_leaves_nothing(tmp_path):
    def chunks():
        yield np.zeros(2, np.float32)
        raise KeyboardInterrupt

    tensor = NewTensor("t", np.dtype(np.float32), (4,), chunks)
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "model", 10) as partial:
        write_tensors(partial, [tensor])
    assert listing(tmp_path) == []


def test_partial_folder_of_a_killed_process_is_removed(tmp_path):
    stale = tmp_path / ".model.partial"
    (stale / "deep").mkdir(parents=True)
    (stale / "model.safetensors").write_text("half")
    (tmp_path / ".model.lock").touch()
    with atomic_folder(tmp_path / "model", 10) as partial:
        assert listing(partial) == []
        (partial / "one").write_text("1")
    assert listing(tmp_path) == ["model"] and listing(tmp_path / "model") == ["one"]


def test_two_writers(tmp_path):
    target = tmp_path / "model"
    with atomic_folder(target, 10) as partial:
        (partial / "one").write_text("1")
        with (
            pytest.raises(ValueError, match=f"{target}: another process is writing to it"),
            atomic_folder(target, 10),
        ):
            raise AssertionError("must not be reached")
        # Another target can be written.
        with atomic_folder(tmp_path / "other", 10):
            pass
        assert listing(partial) == ["one"]
    assert listing(tmp_path) == ["model", "other"] and listing(target) == ["one"]


def test_lock_that_its_holder_has_removed(tmp_path, monkeypatch):
    # The first writer fails after the second opens the lock file and before it locks it.
    real, target = fcntl.flock, tmp_path / "model"
    first = contextlib.ExitStack()
    first.enter_context(atomic_folder(target, 10))

    def flock(file, operation):
        with contextlib.suppress(RuntimeError):
            first.__exit__(RuntimeError, RuntimeError(), None)
        return real(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with contextlib.ExitStack() as stack:
        try:
            partial = stack.enter_context(atomic_folder(target, 10))
        except ValueError:
            return
        (partial / "one").write_text("half")
        with pytest.raises(ValueError, match="another process is writing to it"):
            stack.enter_context(atomic_folder(target, 10))
        assert listing(partial) == ["one"]


def test_symlink_to_an_empty_folder(tmp_path):
    (tmp_path / "large disk").mkdir()
    (tmp_path / "model").symlink_to(tmp_path / "large disk")
    with atomic_folder(tmp_path / "model", 10) as partial:
        (partial / "one").write_text("1")
    assert listing(tmp_path / "large disk") == ["one"] and listing(tmp_path / "model") == ["one"]


def test_disk_that_is_too_small(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=3_000_000_000))
    with (
        pytest.raises(OSError, match=r"model: needs 3\.50 GB, but the disk has 3\.00 GB left"),
        atomic_folder(tmp_path / "model", 3_500_000_000),
    ):
        raise AssertionError("must not be reached")
    assert listing(tmp_path) == []
    with atomic_folder(tmp_path / "model", 3_000_000_000):
        pass


def test_places_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for check in (check_target, lambda target: atomic_folder(target, 10).__enter__()):
        with pytest.raises(ValueError, match=f"^folder is '{tmp_path}/file/x/y': {tmp_path}/file is a file$"):
            check(tmp_path / "file/x/y")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    message = f"^folder is '{tmp_path}/new/x': no permission to write in {tmp_path}$"
    with pytest.raises(ValueError, match=message):
        check_target(tmp_path / "new/x")
    assert listing(tmp_path) == ["file"]


# Writes a tensor whose second half never arrives.
HANGING = """
import sys, time
import numpy as np
from gptoss_jax.checkpoints.export import atomic_folder, check_target
from gptoss_jax.checkpoints.safetensors_io import NewTensor, write_tensors

def chunks():
    yield np.zeros(1 << 20, np.float32)
    print("half", flush=True)
    time.sleep(600)

first = NewTensor("first", np.dtype(np.float32), (8,), lambda: [np.ones(8, np.float32)])
second = NewTensor("second", np.dtype(np.float32), (2 << 20,), chunks)
with atomic_folder(sys.argv[1], 1) as partial:
    write_tensors(partial, [first, second], shard_bytes=1000)
"""


def test_killed_writer(tmp_path):
    target = tmp_path / "model"
    process = subprocess.Popen(
        [sys.executable, "-c", HANGING, str(target)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "half\n"
        # Meanwhile no other process may write there.
        with pytest.raises(ValueError, match="another process is writing to it"), atomic_folder(target, 1):
            raise AssertionError("must not be reached")
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
    finally:
        process.kill()
        process.stdout.close()
    assert not target.exists() and listing(tmp_path / ".model.partial")
    expected = random_tensors()
    with atomic_folder(target, 1) as partial:
        write(partial, expected)
    assert_same_tensors(map_folder(target), expected)
    assert listing(tmp_path) == ["model"] and listing(target) == ["model.safetensors"]
