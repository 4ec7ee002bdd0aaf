"""Run checkpoints: folder names, the best checkpoint, and damaged ones."""

import asyncio
import concurrent.futures
import gc
import json
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.checkpoints.run import Checkpoints, LocalPath

PARAMS = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(3)}
TRAINING = {"step": jnp.array(7)}


def save(folder, losses, keep=2):
    """Saves one checkpoint for each loss, at steps 1, 2, …"""
    checkpoints = Checkpoints(folder, keep)
    for step, loss in enumerate(losses, 1):
        checkpoints.save(step, PARAMS, TRAINING, {"step": step}, loss)
    checkpoints.close()


def restore(folder, report=print):
    checkpoints = Checkpoints(folder)
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), (PARAMS, TRAINING)
    )
    try:
        return checkpoints.restore(*abstract, report)
    finally:
        checkpoints.close()


@pytest.mark.parametrize(
    "name",
    [
        "lr=[3e-4]", "[!x]", "a*b", "a**b", "what?", "{step}", "a b", "quo'te", 'dou"ble', "~home", "ü日本",
        "new\nline", "hash#1", "per%cent%20", "s3:", "$HOME", "-dash", "a;b|c&d",
        "x.orbax-checkpoint-tmp", "7",
    ],
)  # fmt: skip
def test_folder_may_have_any_name(tmp_path, name):
    save(tmp_path / name, [2.0])
    step, params, training, record = restore(tmp_path / name)
    assert (step, record, int(training["step"])) == (1, {"step": 1}, 7)
    np.testing.assert_array_equal(params["w"], PARAMS["w"])
    assert Checkpoints(tmp_path / name, read_only=True).best_step == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("back\\slash", "no folder in its path may have a backslash in its name"),
        ("logs:/x", "no folder in its path may have a name that ends with 'gs:'"),
        ("\udcff", "checkpoints need a path in UTF-8 .*"),
    ],
)
def test_names_that_tensorstore_cannot_write(tmp_path, name, message):
    with pytest.raises(ValueError, match=f"^run_dir is .*: {message}$"):
        Checkpoints(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_path_that_looks_like_a_bucket_is_local():
    for root in ("gs", "s3", "az", "hf"):
        path = LocalPath(f"/{root}/runs") / "x"
        assert str(path) == f"/{root}/runs/x" and not path.exists()


def test_first_checkpoint_is_verified(tmp_path, monkeypatch):
    # If Orbax does not find the parts of a checkpoint, it warns and does not merge them.
    monkeypatch.setattr(LocalPath, "glob", lambda self, pattern: iter(()))
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(OSError, match="the checkpoint of step 1 was written but is incomplete: "):
        checkpoints.save(1, PARAMS, TRAINING, {})
    assert checkpoints.steps == [] and (tmp_path / "checkpoints/damaged-1").is_dir()
    checkpoints.close()


@pytest.mark.parametrize(
    ("losses", "kept", "best"),
    [
        ([3.0, 4.0, math.nan, math.nan], [1, 3, 4], 1),
        ([math.nan, 3.0, math.inf, -math.inf, 4.0], [2, 4, 5], 2),
        ([math.nan] * 3, [2, 3], None),
        ([None, math.nan, None], [2, 3], None),
    ],
)
def test_non_finite_loss_is_the_worst(tmp_path, losses, kept, best):
    save(tmp_path, losses)
    checkpoints = Checkpoints(tmp_path, read_only=True)
    assert (checkpoints.steps, checkpoints.best_step) == (kept, best)
    checkpoints.close()


def test_metrics_of_older_runs(tmp_path):
    save(tmp_path, [3.0, 4.0, 5.0], keep=3)
    for step, text in ((2, '{"val_loss": NaN}'), (3, '{"val_loss": -Infinity}')):
        (tmp_path / f"checkpoints/{step}/metrics/metrics").write_text(text)
    assert Checkpoints(tmp_path, read_only=True).best_step == 1
    (tmp_path / "checkpoints/1/metrics/metrics").write_text('{"val_loss": NaN}')
    assert Checkpoints(tmp_path, read_only=True).best_step is None
    # A checkpoint with a damaged file has no loss; the others stay usable.
    for text in ('{"val_l', "[]", '{"loss": 2}'):
        (tmp_path / "checkpoints/3/metrics/metrics").write_text(text)
        with pytest.warns(UserWarning, match="3/metrics: damaged .*; its validation loss is ignored"):
            assert restore(tmp_path)[0] == 3


def files_of(folder):
    return sorted(path for path in pathlib.Path(folder).rglob("*") if path.is_file())


@pytest.mark.parametrize("item", ["params", "training", "record"])
@pytest.mark.parametrize("damage", ["cut", "empty", "gone"])
def test_damage_is_reported_on_one_line_with_the_item(tmp_path, capfd, item, damage):
    save(tmp_path, [2.0, 1.0])
    for path in files_of(tmp_path / "checkpoints/2" / item):
        if damage == "gone":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if damage == "cut" else b"")
    said = []
    assert restore(tmp_path, said.append)[0] == 1
    (line,) = said
    assert line.startswith(f"checkpoint of step 2 is damaged ({item}: ") and "\n" not in line
    assert (tmp_path / "checkpoints/damaged-2").is_dir()
    assert capfd.readouterr().err == ""


def type_of_new_loop():
    loop = asyncio.new_event_loop()
    loop.close()
    return type(loop)


def test_event_loops_of_other_code_are_untouched(tmp_path):
    save(tmp_path, [2.0])
    before = type_of_new_loop()
    first, second = (Checkpoints(tmp_path, read_only=True) for _ in range(2))
    assert type_of_new_loop() is before
    first.close()
    second.close()
    assert type_of_new_loop() is before


def test_many_damaged_arrays_print_nothing(tmp_path, monkeypatch, caplog, capfd):
    params = {f"w{index}": jnp.ones((4, index + 1)) for index in range(40)}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, params, TRAINING, {})
    checkpoints.close()
    for path in files_of(tmp_path / "checkpoints/1/params"):
        if not path.name.startswith("_"):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    unraisable = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), params
    )

    def read():
        checkpoints = Checkpoints(tmp_path, read_only=True)
        with pytest.raises(ValueError, match=r"/1: cannot be read \(params: .*\); there is no other one"):
            checkpoints.restore_params(1, abstract)
        checkpoints.close()

    async def read_in_a_loop():
        read()

    for _ in range(3):
        read()
    asyncio.run(read_in_a_loop())
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: read(), range(4)))
    gc.collect()
    assert (unraisable, caplog.records, capfd.readouterr().err) == ([], [], "")


def test_record_must_be_a_json_object(tmp_path):
    save(tmp_path, [None])
    path = tmp_path / "checkpoints/1/record/metadata"
    assert json.loads(path.read_text()) == {"step": 1}
    path.write_text("[1, 2]")
    with pytest.raises(ValueError, match="no checkpoint can be read; that of step 1: record: must be a JSON"):
        restore(tmp_path)
