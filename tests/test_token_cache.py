"""The token cache: contents, rebuilding, and concurrent, killed and failed builds."""

import dataclasses
import gzip
import json
import lzma
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from helpers.stories import stories_config, write_stories

from gptoss_jax.config import DataConfig
from gptoss_jax.data import token_cache
from gptoss_jax.data.sources import open_corpus, split
from gptoss_jax.data.token_cache import build_cache

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return stories_config(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def cache(config):
    return build_cache(config)


def test_cache_holds_every_document(config, cache):
    expected = list(split(open_corpus(config.source).documents(), config.val_fraction))
    bounds = zip(cache.offsets[:-1], cache.offsets[1:], strict=True)
    stored = [cache.tokens[first:last] for first, last in bounds]
    assert all(ids[0] == ids[-1] == 256 for ids in stored)
    assert [cache.tokenizer.decode(ids) for ids in stored] == [text for text, _ in expected]
    assert cache.held_out.tolist() == [is_held_out for _, is_held_out in expected]
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
    # A tokenizer file is identified by its content, not its name.
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
        config, source=f"jsonl:{tmp_path}/a.jsonl", tokenizer="bpe:270", cache_dir=str(tmp_path / "cache")
    )
    lines = []
    cache = build_cache(config, lines.append)
    assert cache.meta["null_records"] == 10 and cache.meta["documents"] == 20
    assert [line for line in lines if "skip" in line] == ["  10 records were skipped: their field is null"]


def test_a_lone_surrogate_is_a_one_line_error_and_leaves_no_cache(config, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": "a\\ud800b"}\n')
    config = dataclasses.replace(
        config, source=f"jsonl:{tmp_path}/a.jsonl", cache_dir=str(tmp_path / "cache")
    )
    with pytest.raises(ValueError) as caught:
        build_cache(config)
    message = f"{tmp_path}/a.jsonl:2: field 'text' holds '\\ud800', half of a surrogate pair"
    assert str(caught.value) == message
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_source_that_changes_during_the_build_leaves_no_cache(config, tmp_path):
    source = write_stories(tmp_path / "text")
    config = dataclasses.replace(config, source=source, cache_dir=str(tmp_path / "cache"))

    def change(line):
        write_stories(tmp_path / "text", count=61)

    with pytest.raises(ValueError, match="data.source is .*: its files changed while they were read"):
        build_cache(config, change)
    assert list((tmp_path / "cache").iterdir()) == []


def test_odd_names_and_contents_give_one_line_messages(config, tmp_path):
    # A file name that is not UTF-8, and a text that is too short to split.
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


def test_an_unusable_cache_folder_is_an_error(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="data.cache_dir is '.*/file/cache': Not a directory"):
        build_cache(dataclasses.replace(config, cache_dir=str(tmp_path / "file" / "cache")))


def test_the_cache_honors_xdg_cache_home(config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    config = dataclasses.replace(config, cache_dir=None)
    assert build_cache(config).folder.parent == tmp_path / "home" / ".cache" / "gptoss_jax"
    # The former default, in the config of an older run.
    before = DataConfig.from_dict(config.to_dict() | {"cache_dir": "~/.cache/gptoss_jax"})
    assert build_cache(before).folder == build_cache(config).folder
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert build_cache(config).folder.parent == tmp_path / "other" / "gptoss_jax"


def test_long_documents_are_encoded_in_chunks(config, tmp_path, monkeypatch):
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
    # Text is cut where tokens end anyway; only in the run of spaces there is no such place.
    kept = slice(0, int(whole.offsets[1]))
    assert np.array_equal(whole.tokens[kept], parts.tokens[kept])
    assert parts.tokenizer.decode(parts.tokens) == text


SLOW_BUILD = """
import sys, time
from gptoss_jax.config import DataConfig
from gptoss_jax.data import token_cache
from gptoss_jax.status import Status

token_cache.BATCH_CHARS = 500
config = DataConfig(sys.argv[1], "bytes", cache_dir=sys.argv[2])

def update(self, detail):
    print(detail, flush=True)
    if sys.argv[3] == "hang" and "5 documents" in detail:
        time.sleep(600)

Status.update = update
print(token_cache.build_cache(config, print).folder, flush=True)
"""


def start_build(source, folder, mode):
    command = [sys.executable, "-c", SLOW_BUILD, source, str(folder), mode]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_a_killed_build_is_removed(tmp_path):
    source = write_stories(tmp_path / "text")
    folder = tmp_path / "cache"
    build = start_build(source, folder, "hang")
    try:
        while "5 documents" not in build.stdout.readline():
            assert build.poll() is None
        (partial,) = folder.iterdir()
        assert (partial / "tokens.bin").exists()
        # While that process lives, its folder is not removed.
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


def test_concurrent_builds_share_one_cache(tmp_path):
    source = write_stories(tmp_path / "text")
    builds = [start_build(source, tmp_path / "cache", "run") for _ in range(2)]
    folders = {build.communicate()[0].splitlines()[-1] for build in builds}
    assert [build.returncode for build in builds] == [0, 0]
    assert folders == {str(path) for path in (tmp_path / "cache").iterdir()} and len(folders) == 1
