"""gpt-oss's tokenizer in both forms: tiktoken's o200k_harmony, and the tokenizer.json exported from it."""

import hashlib
import json
import os
import pathlib
import subprocess
import sys

import pytest
from helpers.data import shared_data
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_jax.data.tokenizer import load_tokenizer, make_tokenizer

ROOT = pathlib.Path(__file__).parents[1]
# SHA-256 of openai/gpt-oss-20b's tokenizer.json.
PUBLISHED = "0614fe83cadab421296e664e1f48f4261fa8fef6e03e63bb75c20f38e37d07d3"
SPECIAL = "a<|endoftext|>b<|startoftext|><|return|>"
GOLDEN = [
    ("", []),
    ("Hello world", [13225, 2375]),
    ("    Hello", [271, 32949]),
    ("\t\n", [2775]),
    ("3333333", [15517, 15517, 18]),
    ("ied 4 \xbd months", [1165, 220, 19, 220, 27124, 5503]),
    ("\xc4pfel", [12921, 16606, 296]),
    (" this is \U0001f999.cpp", [495, 382, 9552, 99, 247, 13, 17159]),
    (
        "\u043d\u0435\u0449\u043e \u043d\u0430 \u0411\u044a\u043b\u0433\u0430\u0440\u0441\u043a\u0438",
        [3907, 53641, 1235, 185386, 8118],
    ),
    ("re\u0301sume\u0301", [264, 196970, 3095, 13430]),
    (
        "Hello, y'all! How are you \U0001f601 ?\u6211\u60f3\u5728apple\u5de5\u4f5c1314151\u5929\uff5e",
        [13225, 11, 342, 70653, 0, 3253, 553, 481, 22861, 223, 1423]
        + [7522, 18165, 2178, 34058, 22369, 16412, 32999, 16, 867, 8208],
    ),
]
NASTY = [
    "a\r\nb\r\n\r\n c\rd \n",
    "\U0001f3f3\ufe0f\u200d\U0001f308 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea",
    "\uc548\ub155\ud558\uc138\uc694 \uc138\uacc4, \ud55c\uad6d\uc5b4",
    "<|start|>user<|message|>Hi<|end|>" + SPECIAL,
    "\x00\x7f\xa0\u2028\ufeff\ufffd",
    " . , !  we'LL it\u017f's 1234567",
]


@pytest.fixture(scope="session")
def exported(harmony, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    harmony.export(folder)
    return folder


@pytest.fixture(scope="session")
def both(harmony, exported):
    return {"tiktoken": harmony, "tokenizer.json": load_tokenizer(exported)}


@pytest.fixture(params=["tiktoken", "tokenizer.json"])
def tokenizer(request, both):
    return both[request.param]


def golden_pairs(where):
    """Returns the pairs of a text and its ids in this file, or the published ones."""
    if where == "here":
        return GOLDEN
    vectors = json.loads(shared_data("vectors/o200k_harmony_golden.json").read_text())
    return [(vector["text"], vector["ids"]) for vector in vectors]


def test_vocabulary(tokenizer):
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (200019, 199998, 199999)
    assert len(tokenizer.special_tokens) == 21
    names = ["return", "constrain", "channel", "start", "end", "message", "call", "endofprompt"]
    ids = [tokenizer.special_tokens[f"<|{name}|>"] for name in names]
    assert ids == [200002, 200003, 200005, 200006, 200007, 200008, 200012, 200018]
    assert tokenizer.special_tokens["<|reserved_200017|>"] == 200017


@pytest.mark.parametrize("where", ["here", "shared data"])
def test_published_ids(tokenizer, where):
    texts, expected = zip(*golden_pairs(where), strict=True)
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == list(expected)
    assert [tokenizer.encode(text) for text in texts] == list(expected)
    for text, ids in zip(texts, expected, strict=True):
        assert tokenizer.decode_bytes(ids) == text.encode()
        assert tokenizer.decode(ids) == text


def test_special_tokens_are_neither_encoded_nor_decoded(tokenizer):
    assert max(tokenizer.encode(SPECIAL)) < 199998
    assert tokenizer.decode([199998, *tokenizer.encode(SPECIAL), 200002, 199999, 200018]) == SPECIAL


def test_any_text_has_the_same_ids_in_both_forms(both):
    ours, theirs = both.values()

    def check(text):
        ids = ours.encode(text)
        assert theirs.encode(text) == ids
        assert ours.decode_bytes(ids) == theirs.decode_bytes(ids) == text.encode()

    for text in NASTY:
        check(text)
    # Characters that the word pattern looks for, and similar ones.
    signs = st.text(alphabet="aS\u017f'\u2019tTlL \n\r\t\u3000\u03011\xbd\xdf.,/<|>\xe9\u65e5\U0001f680")
    settings(deadline=None, max_examples=300)(given(st.text() | signs)(check))()


def test_both_forms_have_the_same_ids(both):
    ours, theirs = both.values()
    assert ours.same_ids_as(theirs) and theirs.same_ids_as(ours)
    assert ours.digest != theirs.digest
    assert not theirs.same_ids_as(make_tokenizer("bytes"))


def test_export_gives_the_published_bytes(exported):
    content = (exported / "tokenizer.json").read_bytes()
    assert hashlib.sha256(content).hexdigest() == PUBLISHED


def test_export_gives_the_published_settings(exported):
    files = {path.stem: json.loads(path.read_text()) for path in exported.iterdir()}
    assert sorted(files) == ["special_tokens_map", "tokenizer", "tokenizer_config"]
    roles = {"bos_token": "<|startoftext|>", "eos_token": "<|return|>", "pad_token": "<|endoftext|>"}
    assert files["special_tokens_map"] == roles
    assert files["tokenizer_config"].items() >= roles.items()


def test_export_gives_the_published_files(exported):
    paths = list(shared_data("tokenizer/gpt-oss-20b").glob("*token*.json"))
    assert paths
    for path in paths:
        assert json.loads((exported / path.name).read_text()) == json.loads(path.read_text())


@pytest.mark.parity
@pytest.mark.parametrize("where", ["here", "shared data"])
def test_transformers_gives_the_same_ids(harmony, exported, where):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(exported)
    assert len(theirs) == 200019
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (199998, 200002, 199999)
    for text in NASTY + [text for text, _ in golden_pairs(where)]:
        assert theirs.encode(text, split_special_tokens=True) == harmony.encode(text)
        assert theirs.decode(harmony.encode(text)) == text
    assert theirs.encode("a<|return|>") == [64, 200002]


def test_save_and_load(harmony, tmp_path):
    harmony.save(tmp_path)
    assert (tmp_path / "tokenizer_name.txt").read_text() == "o200k_harmony\n"
    loaded = load_tokenizer(tmp_path)
    assert loaded.digest == harmony.digest
    assert loaded.encode("Hello world") == [13225, 2375]


def test_missing_vocabulary_file(tmp_path):
    nowhere = "http://127.0.0.1:9"
    code = "from gptoss_jax.data.tokenizer import make_tokenizer; make_tokenizer('o200k_harmony')"
    env = {**os.environ, "TIKTOKEN_CACHE_DIR": str(tmp_path), "https_proxy": nowhere, "HTTPS_PROXY": nowhere}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: data.tokenizer is 'o200k_harmony'") and "TIKTOKEN_CACHE_DIR" in last
