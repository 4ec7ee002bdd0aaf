"""Reading text files: compression, byte order marks, and files that are not UTF-8 text."""

import bz2
import gzip
import io
import lzma
import os
import tarfile

import pyarrow
import pyarrow.parquet
import pytest

from gptoss_jax.data import files
from gptoss_jax.data.files import split_file
from gptoss_jax.data.sources import open_corpus

BOM = b"\xef\xbb\xbf"
SKIPPED_FRAME = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
TEXT = BOM + "one\n<|endoftext|>\ntw\u00f6\n".encode()
ROWS = b'{"text": "one"}\r\n{"text": null}\n' + BOM + b'{"text": "tw\\u00f6"}'


def zstd(data):
    return pyarrow.Codec("zstd").compress(data).to_pybytes()


COMPRESSORS = {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress, "zstd": zstd}


def read(source):
    return list(open_corpus(source).documents())


@pytest.mark.parametrize("kind", COMPRESSORS)
def test_compressed_files_are_read_whatever_their_name(tmp_path, kind):
    compress = COMPRESSORS[kind]
    path = tmp_path / "a.txt"
    path.write_bytes(compress(TEXT))
    assert read(f"text:{path}") == ["one", "tw\u00f6\n"]
    path.write_bytes(compress(ROWS))
    assert read(f"jsonl:{path}") == ["one", "tw\u00f6"]
    # Two concatenated compressed files are one text.
    path.write_bytes(compress(b"one\n") + compress(b"two\n"))
    assert read(f"text:{path}") == ["one\ntwo\n"]
    path.write_bytes(compress(b""))
    with pytest.raises(ValueError, match="holds no text"):
        read(f"text:{path}")


def test_a_plain_file_may_have_the_name_of_a_compressed_one(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(TEXT)
    assert read(f"text:{tmp_path}/a.txt.gz") == ["one", "tw\u00f6\n"]
    (tmp_path / "a.zst").write_bytes(SKIPPED_FRAME + zstd(TEXT))
    assert read(f"text:{tmp_path}/a.zst") == ["one", "tw\u00f6\n"]


@pytest.mark.parametrize("kind", COMPRESSORS)
def test_a_damaged_archive_is_named(tmp_path, kind):
    data = COMPRESSORS[kind](os.urandom(3000).hex().encode() + b"\n")
    path = tmp_path / "a.txt"
    middle = len(data) // 2
    cases = [data[:middle], data[:-1]]
    if kind != "zstd":  # pyarrow writes no checksum
        cases.append(data[:middle] + bytes(40) + data[middle + 40 :])
    for damaged in cases:
        path.write_bytes(damaged)
        with pytest.raises(ValueError) as caught:
            read(f"text:{path}")
        message = str(caught.value)
        assert message.startswith(f"{path}: cannot be read (") and "\n" not in message


def test_zstd_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.zst").write_bytes(zstd(b"a"))
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"a.zst: zstd needs pyarrow: pip install 'gptoss-jax\[hf\]'"):
        read(f"text:{tmp_path}/a.zst")


def test_a_byte_order_mark_at_the_start_is_left_out(tmp_path):
    (tmp_path / "a.txt").write_bytes(BOM + b"a" + BOM)
    assert read(f"text:{tmp_path}/a.txt") == ["a\ufeff"]
    # Concatenated files, with a separator in between.
    (tmp_path / "a.txt").write_bytes(BOM + b"one\n<|endoftext|>\n" + BOM + b"two<|endoftext|>" + BOM)
    assert read(f"text:{tmp_path}/a.txt") == ["one", "two"]
    (tmp_path / "b.txt").write_bytes(BOM + b"ab\xff")
    with pytest.raises(ValueError, match=r"b.txt: not UTF-8 at byte 5 \(invalid start byte\)"):
        read(f"text:{tmp_path}/b.txt")


def test_a_byte_order_mark_in_a_record_is_left_out(tmp_path):
    rows = [BOM, b'{"text": "\\ufeffone"}', BOM + b'{"text": "two\\ufeff"}', b'{"text": "\xef\xbb\xbf"}', BOM]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(rows))
    assert read(f"jsonl:{tmp_path}/a.jsonl") == ["one", "two\ufeff"]
    table = pyarrow.table({"text": ["\ufeffone", "two\ufeff", None, "\ufeff"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert read(f"parquet:{tmp_path}/a.parquet") == ["one", "two\ufeff"]


def tar(data):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(member := tarfile.TarInfo("a.txt"), io.BytesIO(data[: member.size]))
    return file.getvalue()


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
@pytest.mark.parametrize(
    ("data", "found"),
    [
        ("caf\u00e9".encode("utf-16"), "UTF-16"),
        ("\u201ccaf\u00e9\u201d, he said".encode("utf-16-le"), "UTF-16"),
        ("the caf\u00e9".encode("utf-16-be"), "UTF-16"),
        (b"PK\x03\x04text", "a zip archive"),
        (tar(b""), "a tar archive"),
    ],
)
def test_other_formats_are_recognized(tmp_path, data, found, compress):
    (tmp_path / "a").write_bytes(compress(data))
    for kind in ("text", "jsonl"):
        with pytest.raises(ValueError) as caught:
            read(f"{kind}:{tmp_path}/a")
        assert str(caught.value).startswith(f"{tmp_path}/a: looks like {found}: must be text in UTF-8")


@pytest.mark.parametrize("text", ["a\0", "\0\0\0\0\0\0", "\u65e5\u672c", "a", "\0ab\0cd"])
def test_text_with_odd_characters_is_still_text(tmp_path, text):
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert read(f"text:{tmp_path}/a.txt") == [text]


def test_separators_across_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "HEAD", 3)
    monkeypatch.setattr(files, "CHUNK", 4)
    data = b"ab<->c<-<->" + b"<->" + b"d" * 20 + b"<->e<"
    (tmp_path / "a").write_bytes(data)
    parts = [(place, bytes(part)) for place, part in split_file(str(tmp_path / "a"), b"<->")]
    assert parts == [(0, b"ab"), (5, b"c<-"), (11, b""), (14, b"d" * 20), (37, b"e<")]


def test_a_file_that_cannot_be_opened_is_named(tmp_path, monkeypatch):
    def refuse(path, mode):
        raise PermissionError(13, "Permission denied", path)

    (tmp_path / "a.txt").write_text("a")
    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ValueError, match=r"a.txt: cannot be read \(Permission denied\)"):
        read(f"text:{tmp_path}/a.txt")
