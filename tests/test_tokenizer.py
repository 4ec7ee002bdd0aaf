"""Tokenizers: exact round trips, no special tokens from plain text, saving, loading and export."""

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_jax.data.special_tokens import HARMONY_TOKENS
from gptoss_jax.data.tokenizer import load_tokenizer, make_tokenizer

TEXTS = [
    "def add(a, b):\n    return a + b\n\n\nprint(add(12345, 2))\n" * 20,
    "The quick brown fox can't jump over 9 lazy dogs.\n" * 20,
    "Gr\u00f6\u00dfe \u65e5\u672c\u8a9e \U0001f680\n" * 5,
]
SPECIAL = "a<|endoftext|>b<|startoftext|><|return|>"


def train(spec="bpe:327"):
    return make_tokenizer(spec, lambda: iter(TEXTS))


BPE = train()


def test_bytes():
    tokenizer = make_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (257, 256, 256)
    assert tokenizer.encode("a\u00e4\x00") == [97, 195, 164, 0]
    assert tokenizer.decode([256, 97, 195, 164, 256, 195]) == "a\u00e4\ufffd"
    assert tokenizer.decode_bytes([195, 256]) == b"\xc3"
    assert tokenizer.encode(SPECIAL) == list(SPECIAL.encode())


def test_bpe_vocabulary():
    assert BPE.vocab_size == 327
    assert BPE.bos_id == BPE.eos_id == 0
    assert len(BPE.encode(TEXTS[0])) < len(TEXTS[0]) / 2
    # Words keep the space before them, runs of spaces stay whole, digits are in groups of three.
    pieces = [BPE.decode([token]) for token in BPE.encode("    return 12345")]
    assert pieces == ["   ", " return", " ", "123", "45"]


def test_bpe_training_is_deterministic():
    assert train()._files == BPE._files
    assert train("bpe:300")._files != BPE._files


def test_small_texts_give_small_vocabularies():
    tokenizer = make_tokenizer("bpe:1000", lambda: iter(["ab ab ab"]))
    assert 257 <= tokenizer.vocab_size < 270
    assert tokenizer.decode(tokenizer.encode("\u65e5 xyz")) == "\u65e5 xyz"


@pytest.mark.parametrize("tokenizer", [BPE, make_tokenizer("bytes")], ids=lambda t: t.name)
def test_any_text_round_trips(tokenizer):
    @settings(deadline=None, max_examples=200)
    @given(st.text() | st.text(alphabet=" \n\r\tab1'<|>.\u0301\u00a0"))
    def check(text):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode_bytes(ids) == text.encode()
        assert b"".join(tokenizer.decode_bytes([token]) for token in ids) == text.encode()
        assert tokenizer.eos_id not in ids

    check()


def test_special_tokens_are_neither_encoded_nor_decoded():
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
        assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (327, 0, 0)
        assert tokenizer.encode(TEXTS[1] + SPECIAL) == BPE.encode(TEXTS[1] + SPECIAL)
    make_tokenizer("bytes").save(tmp_path / "bytes")
    assert [path.name for path in (tmp_path / "bytes").iterdir()] == ["tokenizer_name.txt"]
    assert load_tokenizer(tmp_path / "bytes").name == "bytes"


def test_folders_without_a_tokenizer(tmp_path):
    for folder in tmp_path, tmp_path / "missing":
        with pytest.raises(ValueError) as caught:
            load_tokenizer(folder)
        expected = f"tokenizer folder is '{folder}': must hold tokenizer.json or tokenizer_name.txt"
        assert str(caught.value) == expected
    with pytest.raises(ValueError, match=r"cannot read .*none\.json \(No such file"):
        make_tokenizer(f"file:{tmp_path}/none.json")


@pytest.mark.parametrize("tokenizer", [BPE, make_tokenizer("bytes")], ids=lambda t: t.name)
def test_export(tokenizer, tmp_path):
    tokenizer.export(tmp_path / "a" / "b", model_max_length=2048)
    files = {path.name: json.loads(path.read_text()) for path in (tmp_path / "a" / "b").iterdir()}
    assert sorted(files) == ["special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]
    roles = {f"{role}_token": "<|endoftext|>" for role in ("bos", "eos", "pad")}
    special = {"<|endoftext|>": tokenizer.eos_id}
    if tokenizer is BPE:  # it has the end of a turn, as in gpt-oss's vocabulary
        roles["eos_token"] = "<|return|>"
        special |= {name: 320 + i for i, name in enumerate(HARMONY_TOKENS)}
    assert files["special_tokens_map.json"] == roles
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    assert files["tokenizer_config.json"] == roles | {
        "added_tokens_decoder": {str(token): {"content": name} | plain for name, token in special.items()},
        "clean_up_tokenization_spaces": False,
        "extra_special_tokens": {},
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 2048,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    loaded = load_tokenizer(tmp_path / "a" / "b")
    assert loaded.same_ids_as(tokenizer) and tokenizer.same_ids_as(loaded)
    assert loaded.vocab_size == tokenizer.vocab_size
    assert loaded.special_tokens == tokenizer.special_tokens == special

    def check(text):
        ids = tokenizer.encode(text)
        assert loaded.encode(text) == ids
        assert loaded.decode_bytes(ids) == text.encode()

    for text in [*TEXTS, SPECIAL]:
        check(text)
    settings(deadline=None, max_examples=100)(given(st.text())(check))()


def with_special_tokens(folder, *names):
    """Returns a tokenizer.json of BPE with these special tokens after its words."""
    model = tokenizers.Tokenizer.from_str(BPE._files["tokenizer.json"])
    model.add_special_tokens(list(names))
    folder.mkdir()
    model.save(str(folder / "tokenizer.json"))
    return make_tokenizer(f"file:{folder}/tokenizer.json")


@pytest.mark.parametrize(
    ("names", "roles"),
    [
        (["<s>", "<pad>"], ["<s>", "<|return|>", "<pad>"]),
        (["<|startoftext|>"], ["<|startoftext|>", "<|return|>", "<|endoftext|>"]),
    ],
)
def test_export_of_a_file(tmp_path, names, roles):
    tokenizer = with_special_tokens(tmp_path / "file", *names)
    tokenizer.export(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "special_tokens_map.json").read_text())
    assert [written[f"{role}_token"] for role in ("bos", "eos", "pad")] == roles
    file = (tmp_path / "file" / "tokenizer.json").read_bytes()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == file
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["model_max_length"] == int(1e30)
    assert load_tokenizer(tmp_path / "out").digest == tokenizer.digest


@pytest.mark.parity
def test_transformers_gives_the_same_ids(tmp_path):
    transformers = pytest.importorskip("transformers")
    file = with_special_tokens(tmp_path / "file", "<s>", "<pad>")
    for tokenizer in BPE, make_tokenizer("bytes"), file:
        tokenizer.export(tmp_path / "out", model_max_length=99)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
        assert (len(theirs), theirs.model_max_length) == (tokenizer.vocab_size, 99)
        assert (theirs.bos_token_id, theirs.pad_token) == (
            tokenizer.bos_id,
            tokenizer.token_roles["pad_token"],
        )
        assert theirs.eos_token == tokenizer.token_roles["eos_token"]
        assert theirs.encode("<|endoftext|>") == [tokenizer.eos_id]
        for text in [*TEXTS, SPECIAL, "", "a\r\n b\r . ,", "\uc548\ub155 \U0001f3f3\ufe0f\u200d\U0001f308"]:
            assert theirs.encode(text, split_special_tokens=True) == tokenizer.encode(text)
            assert theirs.decode(tokenizer.encode(text)) == text


def test_export_to_bad_places(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"^folder is '.*file': cannot be written \(File exists\)$"):
        BPE.export(tmp_path / "file")
    make_tokenizer("bytes").save(tmp_path / "run")
    with pytest.raises(ValueError, match="^folder is '.*run': must not hold another tokenizer's tokenizer_"):
        BPE.export(tmp_path / "run")
    assert not (tmp_path / "run" / "tokenizer.json").exists()
    make_tokenizer("bytes").export(tmp_path / "run")  # its own name is allowed
    assert load_tokenizer(tmp_path / "run").digest == make_tokenizer("bytes").digest
    for length in 0, -1:
        with pytest.raises(ValueError, match=f"^model_max_length is {length}: must be 1 or more"):
            BPE.export(tmp_path / "out", model_max_length=length)


def test_same_ids(tmp_path):
    assert BPE.same_ids_as(train()) and train().same_ids_as(BPE)
    named = with_special_tokens(tmp_path / "named", "<|user|>")
    other = with_special_tokens(tmp_path / "other", "<|tool|>")
    begun = with_special_tokens(tmp_path / "begun", "<s>")
    # Other text gives other words: as many, but different.
    trained = make_tokenizer("bpe:327", lambda: iter(["something else entirely, zebra! " * 30, *TEXTS]))
    everything = [BPE, train("bpe:300"), trained, named, other, begun, make_tokenizer("bytes")]
    assert trained.vocab_size == BPE.vocab_size and named.vocab_size == other.vocab_size == begun.vocab_size
    for i, one in enumerate(everything):
        assert [one.same_ids_as(two) for two in everything] == [i == j for j in range(len(everything))]
    # The same ids in a file with other settings.
    model = tokenizers.Tokenizer.from_str(BPE._files["tokenizer.json"])
    model.enable_truncation(4)
    (tmp_path / "tokenizer.json").write_text(model.to_str())
    assert load_tokenizer(tmp_path).digest != BPE.digest
    assert load_tokenizer(tmp_path).same_ids_as(BPE)


def test_truncation_padding_and_post_processing_are_disabled(tmp_path):
    model = tokenizers.Tokenizer.from_str(BPE._files["tokenizer.json"])
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
    "spec", ["", "byte", "bpe", "bpe:", "bpe:263", "bpe:-3", "bpe:1e4", "file:", "o200k_base", "bytes:1"]
)
def test_unknown_specs(spec):
    with pytest.raises(ValueError, match="^data.tokenizer is ") as caught:
        make_tokenizer(spec, lambda: iter(TEXTS))
    assert repr(spec) in str(caught.value)


def test_bad_files(tmp_path):
    path = tmp_path / "tokenizer.json"
    unnamed = json.loads(BPE._files["tokenizer.json"])
    unnamed["added_tokens"] = []
    del unnamed["model"]["vocab"]["<|endoftext|>"]
    for content, reason in [
        (b"{}", "is not a tokenizer.json"),
        (b"\xff", "is not a tokenizer.json"),
        (json.dumps(unnamed).encode(), "is known to begin or end a document"),
    ]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="^data.tokenizer is ") as caught:
            make_tokenizer(f"file:{path}")
        assert reason in str(caught.value) and "\n" not in str(caught.value)
