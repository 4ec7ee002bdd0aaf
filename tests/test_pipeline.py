"""The token cache, packing, and the order of batches."""

import collections
import dataclasses
import gzip
import hashlib
import json
import lzma
import os
import pathlib
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_jax.config import DataConfig
from gptoss_jax.data import token_cache
from gptoss_jax.data.batches import (
    BATCH_FIELDS,
    PackedRows,
    held_out_batches,
    local_rows,
    make_global_batch,
    train_batches,
)
from gptoss_jax.data.packing import pack
from gptoss_jax.data.sources import open_corpus, split
from gptoss_jax.data.token_cache import build_cache

ROOT = pathlib.Path(__file__).parents[1]


def write_stories(folder, count=60):
    folder.mkdir(exist_ok=True)
    stories = [f"Story {i}: " + f"caf\u00e9 number {i * i}.\n" * (i % 17) for i in range(count)]
    (folder / "stories.txt").write_text("\n<|endoftext|>\n".join(stories))
    return f"text:{folder}/*.txt"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    source = write_stories(folder / "text")
    return DataConfig(
        source, "bytes", seq_len=48, batch_size=8, val_fraction=0.1, cache_dir=str(folder / "cache")
    )


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


def test_cache_holds_every_document(config, cache):
    expected = list(split(open_corpus(config.source).documents(), config.val_fraction))
    bounds = zip(cache.offsets[:-1], cache.offsets[1:], strict=True)
    stored = [cache.tokens[first:last] for first, last in bounds]
    assert all(ids[0] == ids[-1] == 256 for ids in stored)
    assert [cache.tokenizer.decode(ids) for ids in stored] == [text for text, _ in expected]
    assert cache.held_out.tolist() == [is_held_out for _, is_held_out in expected]
    assert cache.text_bytes.tolist() == [len(text.encode()) for text, _ in expected]
    assert cache.tokens.dtype == np.uint16
    held = b"".join(text.encode() for text, is_held_out in expected if is_held_out)
    assert cache.meta == {
        "format": 3,
        "source": config.source,
        "tokenizer": "bytes",
        "vocab_size": 257,
        "documents": 60,
        "tokens": int(cache.offsets[-1]),
        "null_records": 0,
        "held_out_documents": 6,
        "held_out_tokens": len(held) + 12,
        "held_out_bytes": len(held),
        "gzip_bits_per_byte": 8 * len(gzip.compress(held, 9)) / len(held),
        "xz_bits_per_byte": 8 * len(lzma.compress(held, preset=9)) / len(held),
    }


def test_cache_is_built_once(config, tmp_path):
    config = dataclasses.replace(
        config, source=write_stories(tmp_path / "text"), cache_dir=str(tmp_path / "cache")
    )
    lines = []
    first = build_cache(config, lines.append)
    assert lines[0].startswith("Tokenizing text:") and lines[-1].endswith("tokens of 60 documents")
    again = build_cache(dataclasses.replace(config, seq_len=7, batch_size=3), lines.append)
    assert again.folder == first.folder and len(lines) == 2
    others = [
        build_cache(dataclasses.replace(config, tokenizer="bpe:300")),
        build_cache(dataclasses.replace(config, val_fraction=0.2)),
    ]
    write_stories(tmp_path / "text", count=50)
    others.append(build_cache(config))
    assert len({cache.folder for cache in [first, *others]}) == 4
    # A tokenizer file counts by what is in it, not by its name.
    others[0].tokenizer.save(tmp_path)
    from_file = dataclasses.replace(config, tokenizer=f"file:{tmp_path}/tokenizer.json")
    before = build_cache(from_file)
    make = dataclasses.replace(config, tokenizer="bpe:280")
    build_cache(make).tokenizer.save(tmp_path)
    assert build_cache(from_file).folder != before.folder
    with pytest.raises(ValueError, match="data.tokenizer is 'file:/none': there is no file /none"):
        build_cache(dataclasses.replace(config, tokenizer="file:/none"))


def test_nulls_are_counted_once(config, tmp_path):
    rows = [{"text": None if i % 3 == 0 else f"text {i} " * 5} for i in range(30)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = dataclasses.replace(
        config, source=f"jsonl:{tmp_path}/a.jsonl", tokenizer="bpe:260", cache_dir=str(tmp_path / "cache")
    )
    lines = []
    cache = build_cache(config, lines.append)
    assert cache.meta["null_records"] == 10 and cache.meta["documents"] == 20
    assert [line for line in lines if "skip" in line] == ["  10 records were skipped: their field is null"]


def test_half_a_surrogate_pair_is_one_line_and_leaves_no_cache(config, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": "a\\ud800b"}\n')
    config = dataclasses.replace(
        config, source=f"jsonl:{tmp_path}/a.jsonl", cache_dir=str(tmp_path / "cache")
    )
    with pytest.raises(ValueError) as caught:
        build_cache(config)
    message = f"{tmp_path}/a.jsonl:2: field 'text' holds '\\ud800', half of a surrogate pair"
    assert str(caught.value) == message
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_source_that_changes_while_it_is_tokenized_leaves_no_cache(config, tmp_path):
    source = write_stories(tmp_path / "text")
    config = dataclasses.replace(config, source=source, cache_dir=str(tmp_path / "cache"))

    def change(line):
        write_stories(tmp_path / "text", count=61)

    with pytest.raises(ValueError, match="data.source is .*: its files changed while they were read"):
        build_cache(config, change)
    assert list((tmp_path / "cache").iterdir()) == []


def test_names_and_contents_do_not_break_messages(config, tmp_path):
    # A file name that is not UTF-8, and a text that is too short to be split.
    (tmp_path / "a\udcff.txt").write_text("x")
    config = dataclasses.replace(
        config, source=f"text:{tmp_path}/a\udcff.txt", cache_dir=str(tmp_path / "cache")
    )
    with pytest.raises(ValueError, match="data.source is 'text:.*a.udcff.txt': holds a single character"):
        build_cache(config)
    (tmp_path / "a\udcff.txt").write_text("x y z")
    assert build_cache(config).meta["documents"] == 2


def test_bpe_cache_and_its_tokenizer(config):
    config = dataclasses.replace(config, tokenizer="bpe:300")
    cache = build_cache(config)
    expected = [text for text, _ in split(open_corpus(config.source).documents(), config.val_fraction)]
    bounds = zip(cache.offsets[:-1], cache.offsets[1:], strict=True)
    assert [cache.tokenizer.decode(cache.tokens[first:last]) for first, last in bounds] == expected
    assert cache.meta["vocab_size"] == cache.tokenizer.vocab_size == 300


def test_a_damaged_cache_is_an_error(config, tmp_path):
    config = dataclasses.replace(config, cache_dir=str(tmp_path))
    tokens = build_cache(config).folder / "tokens.bin"
    os.truncate(tokens, 100)
    with pytest.raises(ValueError, match=r"damaged \(tokens.bin has 100 bytes\); remove the folder"):
        build_cache(config)


def test_a_cache_folder_that_cannot_be_made_is_an_error(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="data.cache_dir is '.*/file/cache': Not a directory"):
        build_cache(dataclasses.replace(config, cache_dir=str(tmp_path / "file" / "cache")))


def test_long_documents_are_encoded_in_parts(config, tmp_path, monkeypatch):
    text = (
        "".join(f"def f{i}(x):\n    y = {i}\n\n    return x ** y\n\n\n" for i in range(200))
        + " " * 999
        + "end"
    )
    (tmp_path / "a.txt").write_text(text)
    config = dataclasses.replace(
        config, source=f"text:{tmp_path}/a.txt", tokenizer="bpe:300", val_fraction=0.2
    )
    whole = build_cache(dataclasses.replace(config, cache_dir=str(tmp_path / "whole")))
    monkeypatch.setattr(token_cache, "CHUNK_CHARS", 300)
    assert max(map(len, token_cache._chunks(text))) <= 300 and "".join(token_cache._chunks(text)) == text
    parts = build_cache(dataclasses.replace(config, cache_dir=str(tmp_path / "parts")))
    # The cuts are where tokens end anyway; only the run of spaces has none.
    kept = slice(0, int(whole.offsets[1]))
    assert np.array_equal(whole.tokens[kept], parts.tokens[kept])
    assert parts.tokenizer.decode(parts.tokens) == text


SLOW_BUILD = """
import sys, time
from gptoss_jax.config import DataConfig
from gptoss_jax.data import token_cache

token_cache.BATCH_CHARS = 500
config = DataConfig(sys.argv[1], "bytes", cache_dir=sys.argv[2])

def report(line):
    print(line, flush=True)
    if sys.argv[3] == "hang" and "5 documents" in line:
        time.sleep(600)

print(token_cache.build_cache(config, report).folder, flush=True)
"""


def start_build(source, folder, mode):
    command = [sys.executable, "-c", SLOW_BUILD, source, str(folder), mode]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_a_killed_build_leaves_nothing_that_is_used(tmp_path):
    source = write_stories(tmp_path / "text")
    folder = tmp_path / "cache"
    build = start_build(source, folder, "hang")
    try:
        while "5 documents" not in build.stdout.readline():
            assert build.poll() is None
        (partial,) = folder.iterdir()
        assert (partial / "tokens.bin").exists()
        # While that process lives its folder is left alone.
        token_cache._remove_stale_builds(folder)
        assert partial.exists()
    finally:
        build.kill()
        build.communicate()
    config = DataConfig(source, "bytes", cache_dir=str(folder))
    cache = build_cache(config)
    assert list(folder.iterdir()) == [cache.folder]
    clean = build_cache(dataclasses.replace(config, cache_dir=str(tmp_path / "clean")))
    assert (cache.folder / "tokens.bin").read_bytes() == (clean.folder / "tokens.bin").read_bytes()
    assert cache.meta == clean.meta and np.array_equal(cache.offsets, clean.offsets)


def test_processes_that_build_at_once_share_one_result(tmp_path):
    source = write_stories(tmp_path / "text")
    builds = [start_build(source, tmp_path / "cache", "run") for _ in range(2)]
    folders = {build.communicate()[0].splitlines()[-1] for build in builds}
    assert [build.returncode for build in builds] == [0, 0]
    assert folders == {str(path) for path in (tmp_path / "cache").iterdir()} and len(folders) == 1


def rows_of(plan):
    pieces = list(zip(plan.document.tolist(), plan.start.tolist(), plan.length.tolist(), strict=True))
    return [
        pieces[first:last] for first, last in zip(plan.row_offsets[:-1], plan.row_offsets[1:], strict=True)
    ]


def test_pack_by_hand():
    # 23 = 2 * 10 + 3. From long to short: 7 and 6 open rows, 4 fits the second, 3 the first, 2 fits none.
    plan = pack(np.array([2, 23, 4, 0, 6, 7]), 10)
    assert rows_of(plan) == [
        [(1, 0, 10)],
        [(1, 10, 10)],
        [(5, 0, 7), (1, 20, 3)],
        [(4, 0, 6), (2, 0, 4)],
        [(0, 0, 2)],
    ]
    assert rows_of(pack(np.array([], np.int64), 10)) == []


def best_fit_decreasing(sizes, seq_len):
    """The room left in each row, one document at a time."""
    rooms = []
    for size in sorted(sizes, reverse=True):
        fitting = [room for room in rooms if room >= size]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else seq_len) - size)
    return sorted(rooms)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 70), max_size=80), st.integers(2, 40))
def test_pack_places_each_pair_once(lengths, seq_len):
    plan = pack(np.array(lengths, np.int64), seq_len)
    rows = rows_of(plan)
    pairs = collections.Counter(
        (document, pair) for row in rows for document, start, n in row for pair in range(start, start + n)
    )
    assert pairs == {(i, pair): 1 for i, n in enumerate(lengths) for pair in range(n)}
    used = [sum(n for _, _, n in row) for row in rows]
    assert all(0 < n <= seq_len for n in used)
    assert len(rows) <= 2 * sum(lengths) / seq_len + 1
    # No document is cut that would fit a row.
    assert all(
        n == min(lengths[i], seq_len) or start + n == lengths[i] for row in rows for i, start, n in row
    )
    cut = [n % seq_len for n in lengths if n % seq_len]
    whole = sum(n // seq_len for n in lengths)
    assert sorted(seq_len - n for n in used) == sorted([0] * whole + best_fit_decreasing(cut, seq_len))
    again = pack(np.array(lengths, np.int64), seq_len)
    assert all(np.array_equal(a, b) for a, b in zip(vars(plan).values(), vars(again).values(), strict=True))


def test_pack_many_documents():
    lengths = np.maximum(1, np.random.default_rng(0).lognormal(4, 1, 300_000)).astype(np.int64)
    start = time.monotonic()
    plan = pack(lengths, 512)
    assert time.monotonic() - start < 5
    rows = len(plan.row_offsets) - 1
    assert plan.length.sum() == lengths.sum()
    assert lengths.sum() / (rows * 512) > 0.999


def test_rows(cache, config):
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


def test_an_epoch_has_each_row_once_and_epochs_differ(cache, config):
    config = dataclasses.replace(config, batch_size=1)
    count = len(PackedRows(cache, held_out=False, seq_len=config.seq_len))
    batches = [batch["tokens"].tobytes() for batch in take(train_batches(cache, config, 0), 2 * count)]
    assert collections.Counter(batches[:count]) == collections.Counter(batches[count:])
    assert batches[:count] != batches[count:]
    other = [batch["tokens"].tobytes() for batch in take(train_batches(cache, config, 1), count)]
    assert other != batches[:count] and sorted(other) == sorted(batches[:count])


def test_a_part_of_a_batch_is_its_rows_and_nothing_else_is_read(cache, config, monkeypatch):
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
    # A few batches are read ahead by a thread; whole ones would be 40 rows.
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
    # For another part, as with another number of processes, and in a new one.
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


def test_text_that_does_not_fill_a_row(cache, config):
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
    # A limit picks evenly; one that is not reached changes nothing.
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
    """What two of the functions ask a sharding, for a process that has some of the mesh's devices."""

    def __init__(self, sharding, devices):
        self._sharding, self._devices = sharding, devices

    def addressable_devices_indices_map(self, shape):
        parts = self._sharding.devices_indices_map(shape)
        return {device: parts[device] for device in self._devices}


@pytest.mark.parametrize(
    "axes, spec, expected",
    [
        ({"data": 2, "tensor": 4}, "data", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        # Both processes hold parts of the same model: the same rows.
        ({"tensor": 8}, None, [list(range(8))] * 2),
        # The tensor axis spans the processes.
        ({"tensor": 2, "data": 4}, "data", [list(range(8))] * 2),
    ],
)
def test_each_process_reads_the_rows_of_its_devices(axes, spec, expected):
    sharding = jax.sharding.NamedSharding(mesh_of(axes), jax.sharding.PartitionSpec(spec, None))
    halves = jax.devices()[:4], jax.devices()[4:]
    assert [local_rows(Process(sharding, half), 8).tolist() for half in halves] == expected


def test_rows_of_devices_that_lie_apart():
    sharding = jax.sharding.NamedSharding(mesh_of({"data": 8}), jax.sharding.PartitionSpec("data", None))
    mine = [jax.devices()[i] for i in (5, 0, 3)]
    assert local_rows(Process(sharding, mine), 16).tolist() == [0, 1, 6, 7, 10, 11]
