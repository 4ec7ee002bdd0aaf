"""Sources of text, and the share of it that is held out."""

import json
import os

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_jax.data.corpus import open_corpus, split


def read(source):
    return list(open_corpus(source).documents())


def fails(source):
    with pytest.raises(ValueError) as caught:
        read(source)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_text_files_are_documents_and_separators_part_them(tmp_path):
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


def test_text_that_is_not_utf8_is_named_with_its_place(tmp_path):
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
        (b'{"text": "\xff"}', "not JSON"),
        (b'["text"]', "must be a JSON object"),
        (b'{"body": "a", "id": 1}', "has no field 'text'; it has body, id"),
        (b'{"text": 3}', "field 'text' is a int: must be text"),
        (b'{"text": "\\ud800"}', "field 'text' is not Unicode"),
    ],
)
def test_bad_jsonl_names_the_line(tmp_path, line, reason):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    assert fails(f"jsonl:{tmp_path}/a.jsonl").startswith(f"{tmp_path}/a.jsonl:2: {reason}")


def test_parquet(tmp_path):
    table = pyarrow.table({"id": [1, 2, 3], "body": ["a", None, "c\nd"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    source = f"parquet:{tmp_path}/a.parquet"
    assert read(f"{source}#body") == ["a", "c\nd"]
    assert fails(source) == f"{tmp_path}/a.parquet: has no column 'text'; it has id, body"
    assert "row 0: column 'id' is a int: must be text" in fails(f"{source}#id")
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
    assert "has no column 'body'; it has text, n" in fails(f"hf:{folder}#body")
    (folder / "train.jsonl").write_text('{"text": "c", "n": 1}\n')
    assert open_corpus(f"hf:{folder}").fingerprint != corpus.fingerprint
    assert fails(f"hf:{tmp_path}/none").startswith(f"data.source is 'hf:{tmp_path}/none': cannot be loaded")


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
    "source", ["", "nope", "csv:a", "text:", "jsonl:", "stdlib:x", "jsonl:a#", "hf:#text"]
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
    with pytest.raises(ValueError, match="data.source is 'a': a single character"):
        list(split(["a"], 0.05))


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
