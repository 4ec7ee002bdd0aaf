"""Tokenizers: exact round trips, no special tokens out of plain text, files there and back."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_jax.data.tokenizer import load_tokenizer, make_tokenizer

ROOT = pathlib.Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
TEXTS = [
    "def add(a, b):\n    return a + b\n\n\nprint(add(12345, 2))\n" * 20,
    "The quick brown fox can't jump over 9 lazy dogs.\n" * 20,
    "Gr\u00f6\u00dfe \u65e5\u672c\u8a9e \U0001f680\n" * 5,
]
SPECIAL = "a<|endoftext|>b<|startoftext|><|return|>"


def train(spec="bpe:320"):
    return make_tokenizer(spec, lambda: iter(TEXTS))


BPE = train()


@pytest.fixture(scope="module")
def harmony_folder(tmp_path_factory):
    """What tiktoken needs to work without a network, and the same vocabulary as a tokenizer.json."""
    script = SHARED / "tokenizer" / "offline.sh"
    if not script.is_file():
        pytest.skip(f"needs the vocabulary of o200k_harmony in {script.parent}")
    folder = tmp_path_factory.mktemp("harmony")
    subprocess.run(["bash", script, folder], check=True, env={**os.environ, "PYTHON": sys.executable})
    return folder


@pytest.fixture(scope="module")
def harmony(harmony_folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(harmony_folder / "tiktoken_cache"))
        yield make_tokenizer("o200k_harmony")


def test_bytes():
    tokenizer = make_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (257, 256, 256)
    assert tokenizer.encode("a\u00e4\x00") == [97, 195, 164, 0]
    assert tokenizer.decode([256, 97, 195, 164, 256, 195]) == "a\u00e4\ufffd"
    assert tokenizer.decode_bytes([195, 256]) == b"\xc3"
    assert tokenizer.encode(SPECIAL) == list(SPECIAL.encode())


def test_bpe_vocabulary():
    assert BPE.vocab_size == 320
    assert BPE.bos_id == BPE.eos_id == 0
    assert len(BPE.encode(TEXTS[0])) < len(TEXTS[0]) / 2
    # Words keep the space before them, runs of spaces stay whole, digits go by three.
    pieces = [BPE.decode([token]) for token in BPE.encode("    return 12345")]
    assert pieces == ["   ", " return", " ", "123", "45"]


def test_bpe_is_the_same_each_time():
    assert train()._file == BPE._file
    assert train("bpe:300")._file != BPE._file


def test_small_texts_give_small_vocabularies():
    tokenizer = make_tokenizer("bpe:1000", lambda: iter(["ab ab ab"]))
    assert 257 <= tokenizer.vocab_size < 270
    assert tokenizer.decode(tokenizer.encode("\u65e5 xyz")) == "\u65e5 xyz"


@pytest.mark.parametrize("tokenizer", [BPE, make_tokenizer("bytes")], ids=lambda t: t.name)
def test_any_text_comes_back(tokenizer):
    @settings(deadline=None, max_examples=200)
    @given(st.text() | st.text(alphabet=" \n\r\tab1'<|>.\u0301\u00a0"))
    def check(text):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode_bytes(ids) == text.encode()
        assert b"".join(tokenizer.decode_bytes([token]) for token in ids) == text.encode()
        assert tokenizer.eos_id not in ids

    check()


def test_special_tokens_are_dropped_and_never_made():
    ids = BPE.encode(SPECIAL)
    assert 0 not in ids
    assert BPE.decode([0, *ids, 0]) == SPECIAL


def test_batches_equal_single_texts():
    batch = BPE.encode_batch([*TEXTS, ""])
    assert [ids.dtype for ids in batch] == [np.int32] * 4
    assert [ids.tolist() for ids in batch] == [BPE.encode(text) for text in [*TEXTS, ""]]
    assert BPE.decode(batch[2]) == TEXTS[2]


@pytest.mark.parametrize("token", [-1, 257, 10**6])
def test_ids_outside_the_vocabulary(token):
    with pytest.raises(ValueError, match=f"token id is {token}: must be below 257"):
        make_tokenizer("bytes").decode([token])


def test_save_and_load(tmp_path):
    BPE.save(tmp_path / "bpe")
    assert [path.name for path in (tmp_path / "bpe").iterdir()] == ["tokenizer.json"]
    loaded = load_tokenizer(tmp_path / "bpe")
    from_file = make_tokenizer(f"file:{tmp_path}/bpe/tokenizer.json")
    for tokenizer in loaded, from_file:
        assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (320, 0, 0)
        assert tokenizer.encode(TEXTS[1] + SPECIAL) == BPE.encode(TEXTS[1] + SPECIAL)
    make_tokenizer("bytes").save(tmp_path / "bytes")
    assert [path.name for path in (tmp_path / "bytes").iterdir()] == ["tokenizer_name.txt"]
    assert load_tokenizer(tmp_path / "bytes").name == "bytes"
    with pytest.raises(ValueError, match=r"cannot read .*tokenizer\.json \(No such file"):
        load_tokenizer(tmp_path)


def test_file_settings_that_would_change_text_are_turned_off(tmp_path):
    model = tokenizers.Tokenizer.from_str(BPE._file[1])
    model.enable_truncation(4)
    model.enable_padding(length=8)
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    model.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode(TEXTS[1]) == BPE.encode(TEXTS[1])


def test_file_with_byte_fallback(tmp_path):
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "\u2581": 3, "a": 4, "\u2581a": 5}
    vocab |= {f"<0x{byte:02X}>": 6 + byte for byte in range(256)}
    model = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab, [("\u2581", "a")], unk_token="<unk>", byte_fallback=True)
    )
    model.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    model.add_special_tokens(["<unk>", "<s>", "</s>"])
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (262, 1, 2)
    assert tokenizer.encode("a a\u00e4") == [4, 5, 6 + 0xC3, 6 + 0xA4]
    assert tokenizer.decode([1, 4, 5, 6 + 0xC3, 6 + 0xA4, 2]) == "a a\u00e4"


@pytest.mark.parametrize(
    "spec", ["", "byte", "bpe", "bpe:", "bpe:256", "bpe:-3", "bpe:1e4", "file:", "o200k_base", "bytes:1"]
)
def test_unknown_specs(spec):
    with pytest.raises(ValueError, match="^data.tokenizer is ") as caught:
        make_tokenizer(spec, lambda: iter(TEXTS))
    assert repr(spec) in str(caught.value)


def test_bad_files(tmp_path):
    path = tmp_path / "tokenizer.json"
    unnamed = json.loads(BPE._file[1])
    unnamed["added_tokens"] = []
    del unnamed["model"]["vocab"]["<|endoftext|>"]
    for content, reason in [
        (b"{}", "is not a tokenizer.json"),
        (b"\xff", "is not a tokenizer.json"),
        (json.dumps(unnamed).encode(), "has none of <|startoftext|>, <|begin_of_text|>, <s>, <|endoftext|>"),
    ]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="^data.tokenizer is ") as caught:
            make_tokenizer(f"file:{path}")
        assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_o200k_harmony(harmony, tmp_path):
    assert (harmony.vocab_size, harmony.bos_id, harmony.eos_id) == (200019, 199998, 199999)
    assert max(harmony.encode(SPECIAL)) < 199998
    assert harmony.decode([199998, *harmony.encode(SPECIAL), 200002, 199999, 200018]) == SPECIAL
    harmony.save(tmp_path)
    assert (tmp_path / "tokenizer_name.txt").read_text() == "o200k_harmony\n"
    assert load_tokenizer(tmp_path).encode("Hello world") == [13225, 2375]


def test_published_ids(harmony, harmony_folder):
    golden = SHARED / "vectors" / "o200k_harmony_golden.json"
    if not golden.is_file():
        pytest.skip(f"needs {golden}")
    pairs = json.loads(golden.read_text())
    texts, expected = [pair["text"] for pair in pairs], [pair["ids"] for pair in pairs]
    assert len(pairs) > 20
    from_file = load_tokenizer(harmony_folder / "gpt-oss-20b")
    assert (from_file.bos_id, from_file.eos_id) == (199998, 199999)
    for tokenizer in harmony, from_file:
        assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == expected
        assert [tokenizer.decode(ids) for ids in expected] == texts


def test_o200k_harmony_without_its_file(tmp_path):
    nowhere = "http://127.0.0.1:9"
    code = "from gptoss_jax.data.tokenizer import make_tokenizer; make_tokenizer('o200k_harmony')"
    env = {**os.environ, "TIKTOKEN_CACHE_DIR": str(tmp_path), "https_proxy": nowhere, "HTTPS_PROXY": nowhere}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: data.tokenizer is 'o200k_harmony'") and "TIKTOKEN_CACHE_DIR" in last
