"""Sources of text, and the share of it that is held out."""

import collections
import json
import os

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_jax.data.sources import open_corpus, split


def read(source):
    return list(open_corpus(source).documents())


def fails(source):
    with pytest.raises(ValueError) as caught:
        read(source)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_text_files_are_split_at_separators(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_bytes(b"one\r\ntwo\n")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "blank.txt").write_bytes(b" \n\t\n")
    parted = "\n  \u00e4 b\n<|endoftext|>\n\n  c\n\n<|endoftext|>\n \n<|endoftext|>d\n\n"
    (tmp_path / "sub" / "a.txt").write_text(parted)
    corpus = open_corpus(f"text:{tmp_path}/**/*.txt")
    expected = ["one\r\ntwo\n", "\n  \u00e4 b", "  c", "d\n\n"]
    assert list(corpus.documents()) == expected
    assert list(corpus.documents()) == expected


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("a")
    assert read("text:~/*.txt") == ["a"]


def test_invalid_utf8_is_reported_with_its_offset(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc<|endoftext|>de\xff")
    assert fails(f"text:{tmp_path}/a.txt") == f"{tmp_path}/a.txt: not UTF-8 at byte 18 (invalid start byte)"


def test_jsonl(tmp_path):
    lines = [{"text": "a", "body": "x"}, {"text": "  ", "body": "y\nz"}, {"text": "\u2028b", "body": ""}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    assert read(f"jsonl:{tmp_path}/*.jsonl") == ["a", "\u2028b"]
    assert read(f"jsonl:{tmp_path}/*.jsonl#body") == ["x", "y\nz"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": ', "not JSON"),
        (b'{"text": "\xff"}', "not UTF-8 at byte 10 (invalid start byte)"),
        (b"[" * 10_000, "not JSON (maximum recursion depth"),
        (b'["text"]', "must be a JSON object"),
        (b'{"body": "a", "id": 1}', "has no field 'text'; it has body, id"),
        (b'{"text": 3}', "field 'text' is an int: must be text or null"),
        (b'{"text": "\\ud800"}', "field 'text' holds '\\ud800', half of a surrogate pair"),
    ],
)
def test_bad_jsonl_names_the_line(tmp_path, line, reason):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    assert fails(f"jsonl:{tmp_path}/a.jsonl").startswith(f"{tmp_path}/a.jsonl:2: {reason}")


def test_a_field_outside_the_locales_encoding(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text('{"gr\u00f6\u00dfe": "x"}\n', "utf-8")
    monkeypatch.setattr(os, "fsencode", lambda path: path.encode("ascii", "surrogateescape"))
    # From a file of settings, and as Python reads it from the command line.
    for field in ("gr\u00f6\u00dfe", "gr\udcc3\udcb6\udcc3\udc9fe"):
        assert read(f"jsonl:{tmp_path}/a.jsonl#{field}") == ["x"]


def test_parquet(tmp_path):
    table = pyarrow.table({"id": [1, 2, 3], "body": ["a", None, "c\nd"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    source = f"parquet:{tmp_path}/a.parquet"
    assert read(f"{source}#body") == ["a", "c\nd"]
    assert fails(source) == f"{tmp_path}/a.parquet: has no field 'text'; it has id, body"
    assert "row 0: field 'id' is an int: must be text or null" in fails(f"{source}#id")
    (tmp_path / "a.parquet").write_text("not parquet")
    assert f"{tmp_path}/a.parquet: not a parquet file" in fails(source)


def test_hugging_face_folder(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "a", "n": 1}\n{"text": "b", "n": 2}\n')
    corpus = open_corpus(f"hf:{folder}")
    assert list(corpus.documents()) == ["a", "b"]
    assert list(corpus.documents()) == ["a", "b"]
    assert "row 0: has no field 'body'; it has text, n" in fails(f"hf:{folder}#body")
    (folder / "train.jsonl").write_text('{"text": "c", "n": 1}\n')
    assert open_corpus(f"hf:{folder}").fingerprint != corpus.fingerprint
    assert fails(f"hf:{tmp_path}/none").startswith(f"data.source is 'hf:{tmp_path}/none': cannot be loaded")


def write_split(folder, split, text):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.jsonl").write_text(json.dumps({"text": text}) + "\n")


def test_configs_and_splits_of_a_dataset(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    several = tmp_path / "several"
    lines = ["---", "configs:"]
    for config in ("en", "de"):
        lines += [f"- config_name: {config}", "  data_files:"]
        for split_name in ("train", "validation"):
            write_split(several / config, split_name, f"{config} {split_name}")
            lines += [f"  - split: {split_name}", f"    path: {config}/{split_name}.jsonl"]
    (several / "README.md").write_text("\n".join([*lines, "---", ""]))
    assert read(f"hf:{several}:en") == ["en train"]
    assert read(f"hf:{several}:de:validation#text") == ["de validation"]
    fingerprints = {open_corpus(f"hf:{several}:{name}").fingerprint for name in ("en", "de", "de:validation")}
    assert len(fingerprints) == 3
    assert "needs a config; it has en, de: name one, as in hf:NAME:CONFIG:SPLIT" in fails(f"hf:{several}")
    assert "has no config 'fr'; it has en, de: name one" in fails(f"hf:{several}:fr")
    assert "has no split 'test'; it has train, validation: name one" in fails(f"hf:{several}:en:test")
    assert "must be hf:NAME:CONFIG:SPLIT" in fails(f"hf:{several}:en:train:x")
    # One config and one split leave no doubt; several splits without `train` do.
    write_split(tmp_path / "one", "test", "t")
    assert read(f"hf:{tmp_path}/one") == read(f"hf:{tmp_path}/one::test") == ["t"]
    write_split(tmp_path / "one", "validation", "v")
    assert "has no split 'train'; it has validation, test: name one" in fails(f"hf:{tmp_path}/one")


def test_special_characters_in_the_name_of_a_dataset_folder(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_split(tmp_path / "a:b#c", "train", "x")
    assert read(f"hf:{tmp_path}/a:b#c") == read(f"hf:{tmp_path}/a:b#c::train#text") == ["x"]
    # The library would take these for a pattern, and may find another folder.
    for name in ("a [b]", "a?", "a::b"):
        write_split(tmp_path / name, "train", "x")
        assert "the datasets library cannot read a path that holds" in fails(f"hf:{tmp_path}/{name}")


def test_existing_paths_are_not_patterns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "[x] #1").mkdir()
    row = '{"text": "a", "body": "b"}\n'
    for name in ("book [2024].jsonl", "odd#name.jsonl", "[x] #1/*.jsonl", "[x] #1/y.jsonl"):
        (tmp_path / name).write_text(row)
    assert read("text:book [2024].jsonl") == read("text:[x] #1/*.jsonl") == [row]
    assert read("text:[x] #1/y*") == [row] and read("text:[x] #1/*") == [row, row]
    for name in ("book [2024].jsonl", "odd#name.jsonl", "[x] #1/y.jsonl", "[x] #1/*.jsonl"):
        assert read(f"jsonl:{name}") == ["a"] and read(f"jsonl:{name}#body") == ["b"]
    # The same from inside such a folder.
    monkeypatch.chdir(tmp_path / "[x] #1")
    assert read("jsonl:?.jsonl") == ["a", "a"]


def test_errors_for_paths_that_are_not_files(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.txt").symlink_to("gone")
    os.mkfifo(tmp_path / "pipe")
    hint = f"{tmp_path}/folder is a folder; name its files, such as text:{tmp_path}/folder/*"
    assert hint in fails(f"text:{tmp_path}/folder") and hint in fails(f"text:{tmp_path}/fold*")
    assert f"{tmp_path}/link.txt is a broken link" in fails(f"text:{tmp_path}/link.txt")
    assert f"{tmp_path}/link.txt is a broken link" in fails(f"text:{tmp_path}/*.txt")
    assert f"{tmp_path}/pipe is neither a file nor a folder" in fails(f"text:{tmp_path}/pipe")
    assert "there is no user 'nobody-here'" in fails("text:~nobody-here/x.txt")


def test_nulls_are_skipped_and_counted(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    texts = ["a", None, "", "b", None]
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    for source in (f"jsonl:{folder}/train.jsonl", f"parquet:{tmp_path}/a.parquet", f"hf:{folder}"):
        skipped = collections.Counter()
        assert list(open_corpus(source).documents(skipped)) == ["a", "b"]
        assert skipped == {"null": 2}
    (folder / "train.jsonl").write_text('{"text": null}\n')
    assert "holds no text (records whose field is null: 1)" in fails(f"jsonl:{folder}/train.jsonl")


def test_files_that_change_or_disappear_while_being_read(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    corpus = open_corpus(f"text:{path}")
    corpus.check_unchanged()
    path.write_text("other")
    with pytest.raises(ValueError, match="data.source is .*: its files changed while they were read"):
        corpus.check_unchanged()
    path.unlink()
    for action in (corpus.check_unchanged, lambda: list(corpus.documents())):
        with pytest.raises(ValueError, match=r"a.txt: cannot be read \(No such file or directory\)"):
            action()


def test_stdlib():
    corpus = open_corpus("stdlib")
    documents = list(corpus.documents())
    assert len(documents) > 300
    assert all(text.strip() for text in documents)
    paths = [line.rsplit(" ", 1)[0] for line in corpus.fingerprint.splitlines()[1:]]
    assert "json/decoder.py" in paths and paths == sorted(paths)
    folders = {part for path in paths for part in path.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    assert corpus.fingerprint == open_corpus("stdlib").fingerprint


def test_fingerprint_follows_the_content(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("aa")
    source = f"text:{tmp_path}/*.txt"
    first = open_corpus(source).fingerprint
    assert open_corpus(source).fingerprint == first
    stat = path.stat()
    path.write_text("ab")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    second = open_corpus(source).fingerprint
    (tmp_path / "b.txt").write_text("b")
    assert len({first, second, open_corpus(source).fingerprint}) == 3


@pytest.mark.parametrize(
    "source",
    ["", "nope", "nosuch:a", "text:", "jsonl:", "stdlib:x", "jsonl:a#", "hf:#text", "hf::x", "hf:a:b:c:d"],
)
def test_unknown_sources(source):
    message = fails(source)
    assert message.startswith(f"data.source is {source!r}: must be ")


def test_nothing_to_read(tmp_path):
    assert f"no file matches {tmp_path}/*.txt" in fails(f"text:{tmp_path}/*.txt")
    (tmp_path / "a.txt").write_text(" \n")
    source = f"text:{tmp_path}/*.txt"
    assert fails(source) == f"data.source is {source!r}: holds no text"


def marks(documents, share, **kwargs):
    return [is_held_out for _, is_held_out in split(iter(documents), share, **kwargs)]


def test_split_is_even_and_independent_of_what_follows():
    # Multiples of 0.618: .618 .236 .854 .472 .090 .708 .326 .944 .562 .180 .798 .416
    many = marks("abcdefghijkl", 0.2)
    assert many == [i in (2, 7) for i in range(12)]
    assert marks("abcdefghij", 0.2) == many[:10]
    assert sum(marks("x" * 10_000, 0.05)) == pytest.approx(500, abs=3)


def test_split_of_small_corpora():
    assert list(split(["a", "b"], 0.05)) == [("a", False), ("b", True)]
    assert list(split([], 0.05)) == []
    assert list(split(["ab"], 0.05)) == [("a", False), ("b", True)]
    text = "".join(f"line {i}\n" for i in range(100))
    (head, _), (tail, is_held_out) = split([text], 0.1)
    assert head + tail == text and is_held_out and head.endswith("\n")
    assert 0.05 < len(tail) / len(text) < 0.15
    assert list(split(["one two three four"], 0.3)) == [("one two three ", False), ("four", True)]
    assert list(split(["x" * 100], 0.25)) == [("x" * 75, False), ("x" * 25, True)]
    with pytest.raises(ValueError, match="data.source is 'text:x': holds a single character"):
        list(split(["a"], 0.05, source="text:x"))


def test_split_stops_at_max_bytes():
    documents = ["\u00e4" * 5] * 40  # ten bytes each
    picked = [i for i, is_held_out in enumerate(marks(documents, 0.2)) if is_held_out]
    held = [i for i, is_held_out in enumerate(marks(documents, 0.2, max_bytes=29)) if is_held_out]
    assert len(picked) > 2 and held == picked[:2]
    # A document that alone is too long is cut.
    parts = list(split(["a", "b", "\u00e4" * 50, "c"], 0.2, max_bytes=9))
    assert parts == [("a", False), ("b", False), ("\u00e4" * 46, False), ("\u00e4" * 4, True), ("c", False)]
    assert list(split(["x" * 100], 0.25, max_bytes=8)) == [("x" * 92, False), ("x" * 8, True)]


@settings(deadline=None)
@given(
    st.lists(st.text(min_size=2, max_size=30), min_size=1, max_size=60),
    st.floats(0.001, 0.5),
    st.integers(4, 200),
)
def test_split_keeps_all_text_in_order(documents, share, max_bytes):
    parts = list(split(documents, share, max_bytes))
    assert "".join(text for text, _ in parts) == "".join(documents)
    assert {is_held_out for _, is_held_out in parts} == {True, False}
    assert sum(len(text.encode()) for text, is_held_out in parts if is_held_out) <= max_bytes
    assert all(text for text, _ in parts)
    assert len(documents) <= len(parts) <= len(documents) + 1
