"""Packed rows, the order and position of batches, and global batches on a mesh."""

import collections
import dataclasses
import hashlib
import json
import pathlib
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from helpers.stories import stories_config

from gptoss_jax.data.batches import (
    BATCH_FIELDS,
    PackedRows,
    held_out_batches,
    local_rows,
    make_global_batch,
    train_batches,
)
from gptoss_jax.data.token_cache import build_cache

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return stories_config(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def cache(config):
    return build_cache(config)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def same(left, right):
    return len(left) == len(right) and all(
        a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
        for a, b in zip(left, right, strict=True)
    )


def test_packed_rows_by_hand(cache, config):
    seen = collections.Counter()
    rows = PackedRows(cache, held_out=False, seq_len=config.seq_len)
    for row in rows:
        assert {name: values.dtype for name, values in row.items()} == BATCH_FIELDS
        assert all(values.shape == (48,) for values in row.values())
        padding = row["segment_ids"] == 0
        assert np.array_equal(row["loss_weights"], ~padding)
        assert all(not values[padding].any() for values in row.values())
        changes = np.flatnonzero(np.diff(row["segment_ids"], prepend=0) > 0)
        assert row["segment_ids"][changes].tolist() == list(range(1, len(changes) + 1))
        for segment in range(1, len(changes) + 1):
            inside = row["segment_ids"] == segment
            assert row["positions"][inside].tolist() == list(range(inside.sum()))
            tokens, targets = row["tokens"][inside], row["targets"][inside]
            assert np.array_equal(tokens[1:], targets[:-1])
        seen.update(zip(row["tokens"][~padding].tolist(), row["targets"][~padding].tolist(), strict=True))
    expected = collections.Counter()
    for i in np.flatnonzero(~cache.held_out):
        ids = cache.tokens[cache.offsets[i] : cache.offsets[i + 1]].tolist()
        expected.update(zip(ids[:-1], ids[1:], strict=True))
    assert seen == expected


def test_every_epoch_has_each_row_once_in_another_order(cache, config):
    config = dataclasses.replace(config, batch_size=1)
    count = len(PackedRows(cache, held_out=False, seq_len=config.seq_len))
    batches = [batch["tokens"].tobytes() for batch in take(train_batches(cache, config, 0), 2 * count)]
    assert collections.Counter(batches[:count]) == collections.Counter(batches[count:])
    assert batches[:count] != batches[count:]
    other = [batch["tokens"].tobytes() for batch in take(train_batches(cache, config, 1), count)]
    assert other != batches[:count] and sorted(other) == sorted(batches[:count])


def test_only_the_selected_rows_of_a_batch_are_read(cache, config, monkeypatch):
    whole = take(train_batches(cache, config, 3), 12)
    assert whole[0]["tokens"].shape == (8, 48)
    for part in np.arange(4), np.array([1, 2, 6]):
        for batch, all_rows in zip(take(train_batches(cache, config, 3, part), 12), whole, strict=True):
            assert all(np.array_equal(batch[name], all_rows[name][part]) for name in all_rows)
    read, real = [], PackedRows.__getitem__
    monkeypatch.setattr(
        PackedRows, "__getitem__", lambda self, index: read.append(index) or real(self, index)
    )
    batches = train_batches(cache, config, 3, np.array([5]))
    next(batches)
    time.sleep(0.3)
    # A thread prefetches a few batches; whole batches would be 40 rows.
    assert 0 < len(read) <= 12


RESUME = """
import hashlib, json, sys
from gptoss_jax.config import DataConfig
from gptoss_jax.data.batches import train_batches
from gptoss_jax.data.token_cache import build_cache

config = DataConfig.from_dict(json.loads(sys.argv[1]))
batches = train_batches(build_cache(config), config, seed=5)
batches.set_state(json.loads(sys.argv[2]))
print([hashlib.sha256(next(batches)["tokens"].tobytes()).hexdigest() for _ in range(3)])
"""


def test_position_is_saved_and_restored(cache, config):
    batches = train_batches(cache, config, seed=5)
    start = json.loads(json.dumps(batches.get_state()))
    first = take(batches, 7)
    state = json.loads(json.dumps(batches.get_state()))
    later = take(batches, 9)
    batches.set_state(state)
    assert same(take(batches, 9), later)
    batches.set_state(start)
    assert same(take(batches, 7), first)
    # For another slice of the batch, as with another number of processes, and in a new iterator.
    half = train_batches(cache, config, 5, np.arange(4, 8))
    half.set_state(state)
    assert np.array_equal(next(half)["tokens"], later[0]["tokens"][4:])
    assert half.get_state() == state | {"next_index": 8}
    command = [sys.executable, "-c", RESUME, json.dumps(config.to_dict()), json.dumps(state)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    expected = [hashlib.sha256(batch["tokens"].tobytes()).hexdigest() for batch in later[:3]]
    assert done.stdout.strip() == str(expected)


def test_fewer_rows_than_a_batch(cache, config):
    config = dataclasses.replace(config, batch_size=500)
    assert next(train_batches(cache, config, 0))["tokens"].shape == (500, 48)


def test_text_shorter_than_a_row_is_rejected(cache, config):
    pairs = int((np.diff(cache.offsets)[~cache.held_out] - 1).sum())
    train_batches(cache, dataclasses.replace(config, seq_len=pairs), 0)
    expected = f"data.seq_len is {pairs + 1}: the training text has only {pairs} tokens"
    with pytest.raises(ValueError, match=expected):
        train_batches(cache, dataclasses.replace(config, seq_len=pairs + 1), 0)


def test_held_out_batches(cache, config):
    config = dataclasses.replace(config, batch_size=4)
    rows = list(PackedRows(cache, held_out=True, seq_len=config.seq_len))
    batches = held_out_batches(cache, config)
    assert len(batches) == -(-len(rows) // 4) > 2 and len(rows) % 4
    assert all(batch["tokens"].shape == (4, 48) for batch in batches)
    segments = np.concatenate([batch["segment_ids"] for batch in batches])
    assert (segments > 0).sum() == cache.meta["held_out_tokens"] - cache.meta["held_out_documents"]
    tokens = np.concatenate([batch["tokens"] for batch in batches])
    assert np.array_equal(tokens[: len(rows)], [row["tokens"] for row in rows])
    assert not tokens[len(rows) :].any() and not segments[len(rows) :].any()
    assert same(held_out_batches(cache, config), batches)
    # A limit picks evenly spaced rows; a limit above the number of rows changes nothing.
    (few,) = held_out_batches(cache, config, limit=1)
    chosen = [i * len(rows) // 4 for i in range(4)]
    assert np.array_equal(few["targets"], [rows[i]["targets"] for i in chosen])
    assert same(held_out_batches(cache, config, limit=99), batches)
    part = held_out_batches(cache, config, rows=np.array([1, 3]))
    assert np.array_equal(part[1]["tokens"], batches[1]["tokens"][[1, 3]])


def mesh_of(axes):
    return jax.sharding.Mesh(np.array(jax.devices()).reshape(tuple(axes.values())), tuple(axes))


def test_make_global_batch(cache, config):
    sharding = jax.sharding.NamedSharding(mesh_of({"data": 8}), jax.sharding.PartitionSpec("data", None))
    config = dataclasses.replace(config, batch_size=16)
    assert local_rows(sharding, 16).tolist() == list(range(16))
    batch = next(train_batches(cache, config, 0))
    arrays = make_global_batch(batch, sharding, 16)
    assert arrays.keys() == batch.keys()
    for name, values in arrays.items():
        assert values.sharding == sharding and values.dtype == BATCH_FIELDS[name]
        assert np.array_equal(values, batch[name])


class Process:
    """A fake sharding in which a process has only some of the mesh's devices."""

    def __init__(self, sharding, devices):
        self._sharding, self._devices = sharding, devices

    def addressable_devices_indices_map(self, shape):
        parts = self._sharding.devices_indices_map(shape)
        return {device: parts[device] for device in self._devices}


@pytest.mark.parametrize(
    "axes, spec, expected",
    [
        ({"data": 2, "tensor": 4}, "data", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        # Both processes hold shards of the same model: they need the same rows.
        ({"tensor": 8}, None, [list(range(8))] * 2),
        # The tensor axis spans the processes.
        ({"tensor": 2, "data": 4}, "data", [list(range(8))] * 2),
    ],
)
def test_local_rows_of_each_process(axes, spec, expected):
    sharding = jax.sharding.NamedSharding(mesh_of(axes), jax.sharding.PartitionSpec(spec, None))
    halves = jax.devices()[:4], jax.devices()[4:]
    assert [local_rows(Process(sharding, half), 8).tolist() for half in halves] == expected


def test_local_rows_need_not_be_contiguous():
    sharding = jax.sharding.NamedSharding(mesh_of({"data": 8}), jax.sharding.PartitionSpec("data", None))
    mine = [jax.devices()[i] for i in (5, 0, 3)]
    assert local_rows(Process(sharding, mine), 16).tolist() == [0, 1, 6, 7, 10, 11]
