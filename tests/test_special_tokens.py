"""Tokenizer files of all families: bos and eos, and text is never encoded to special tokens."""

import json
import re

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from gptoss_jax.config import DataConfig
from gptoss_jax.data import token_cache
from gptoss_jax.data.special_tokens import Roles, parse_file_spec
from gptoss_jax.data.tokenizer import load_tokenizer, make_tokenizer

TEXTS = ["the cat sat on the mat, and the dog\n    ran: 12 < 34 > 5 </s> <|x|>\n" * 9]
FULL_WIDTH = ["<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"]


def plain(*names, **flags):
    return [AddedToken(name, normalized=False, special=False, **flags) for name in names]


def byte_level(special, text=()):
    """Trains byte-level BPE with these special tokens, and with added tokens that are text."""
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator(TEXTS, trainer)
    model.add_special_tokens(list(special))
    model.add_tokens(plain(*text))
    return model


def byte_fallback(special, text=(), pieces=("\u2581", "a", "\u2581a"), merges=(("\u2581", "a"),)):
    """As in Llama and Gemma: BPE with special tokens and all bytes at the start of the vocabulary."""
    names = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocab = {name: i for i, name in enumerate(names)}
    model = tokenizers.Tokenizer(models.BPE(vocab, list(merges), unk_token=special[0], byte_fallback=True))
    model.normalizer = normalizers.Replace(" ", "\u2581")
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    model.decoder = decoders.Sequence(parts)
    model.add_special_tokens(list(special))
    model.add_tokens(plain(*text))
    return model


def unigram(special):
    """As in T5: the special tokens are pieces of the model with the best score of all."""
    letters = [(letter, -8.0) for letter in map(chr, range(32, 127))]
    model = tokenizers.Tokenizer(
        models.Unigram(
            [*((name, 0.0) for name in special), ("\u2581", -2.0), ("\u2581the", -3.0), *letters], 2
        )
    )
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    model.decoder = decoders.Metaspace(prepend_scheme="never")
    model.add_special_tokens(list(special))
    return model


def word_piece(special):
    letters = [
        *"abcdefghijklmnopqrstuvwxyz[]<>|/",
        *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"),
    ]
    vocab = {name: i for i, name in enumerate([*special, "cat", "##s", *letters])}
    model = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    model.normalizer = normalizers.BertNormalizer()
    model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    model.decoder = decoders.WordPiece()
    model.add_special_tokens(list(special))
    return model


def write(folder, model, **files):
    """Writes a folder with tokenizer.json and other JSON files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(model if isinstance(model, str) else model.to_str(), "utf-8")
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values, ensure_ascii=False), "utf-8")
    return folder


def names_of(tokenizer):
    names = {token: name for name, token in tokenizer.special_tokens.items()}
    return names[tokenizer.bos_id], names[tokenizer.eos_id]


def unmarked(model, *names):
    """The same file, with `"special": false` for these tokens, by default for all."""
    values = json.loads(model.to_str())
    for token in values["added_tokens"]:
        token["special"] = token["special"] and bool(names) and token["content"] not in names
    return json.dumps(values)


GEMMA = ["<pad>", "<eos>", "<bos>", "<unk>"]
CHATML = ["<|im_start|>", "<|im_end|>"]
# Each with its bos and eos, and whether every text round-trips exactly.
FAMILIES = {
    "gpt2": (byte_level(["<|endoftext|>"]), "<|endoftext|>", "<|endoftext|>", True),
    "eos is not called special": (unmarked(byte_level(["<|endoftext|>"])), *["<|endoftext|>"] * 2, True),
    "neox": (byte_level(["<|endoftext|>", "<|padding|>"], ["    ", "  "]), *["<|endoftext|>"] * 2, True),
    # Here HTML's <s> is a word.
    "gemma": (byte_fallback(GEMMA, ["<s>", "</s>", "<b>"]), "<bos>", "<eos>", True),
    "deepseek": (
        unmarked(byte_level([*FULL_WIDTH, "<\uff5cUser\uff5c>"]), "<\uff5cUser\uff5c>"), *FULL_WIDTH, True,
    ),
    "chatml": (byte_level(CHATML, ["<think>"]), "<|im_end|>", "<|im_end|>", True),
    # The file's merges produce </s>.
    "llama2": (
        byte_fallback(["<unk>", "<s>", "</s>"], pieces=["\u2581", "<", "/", "s", ">", "</", "s>"],
                      merges=[("<", "/"), ("s", ">"), ("</", "s>"), ("<", "s>")]),
        "<s>", "</s>", True,
    ),
    "t5": (unigram(["<pad>", "</s>", "<unk>"]), "</s>", "</s>", False),
    "bert": (word_piece(["[PAD]", "[UNK]", "[CLS]", "[SEP]"]), "[CLS]", "[SEP]", False),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_text_is_never_encoded_to_special_tokens(family, tmp_path):
    model, bos, eos, is_exact = FAMILIES[family]
    write(tmp_path, model)
    tokenizer = make_tokenizer(f"file:{tmp_path}/tokenizer.json")
    assert names_of(tokenizer) == (bos, eos)
    # Text that the vocabulary cannot spell is the unknown token.
    unknown = {tokenizer.special_tokens.get(name) for name in ("<unk>", "[UNK]")}
    control = set(tokenizer.special_tokens.values()) - (set() if is_exact else unknown)
    assert {tokenizer.bos_id, tokenizer.eos_id} <= control
    tokenizer.save(tmp_path / "run")
    again = load_tokenizer(tmp_path / "run")
    assert again.digest == tokenizer.digest and again.same_ids_as(tokenizer)
    added = re.findall(r'"content": ?"(.*?)"', (tmp_path / "tokenizer.json").read_text("utf-8"))
    spelled = st.sampled_from([*tokenizer.special_tokens, *added, "<", "|", ">", " ", "a", "\n", "\x00"])

    @settings(deadline=None, max_examples=60)
    @given(st.lists(spelled | st.text(max_size=4)).map("".join))
    def check(text):
        if family in ("gemma", "llama2"):
            text = text.replace("\u2581", "")  # the file's own symbol for a space
        ids = tokenizer.encode(text)
        assert control.isdisjoint(ids)
        assert again.encode(text) == ids
        if is_exact:
            assert tokenizer.decode(ids) == text
            assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == text

    check()
    for name in tokenizer.special_tokens.keys() - {"<unk>", "[UNK]"}:
        ids = tokenizer.encode(name)
        assert len(ids) > 1 and control.isdisjoint(ids)


@pytest.mark.parametrize(("family", "name"), [("neox", "    "), ("gemma", "</s>"), ("chatml", "<think>")])
def test_added_tokens_of_text_stay_tokens(family, name, tmp_path):
    tokenizer = load_tokenizer(write(tmp_path, FAMILIES[family][0]))
    before, token, after = tokenizer.encode(f"a{name}a")
    assert before == after and tokenizer.decode([token]) == name
    assert name not in tokenizer.special_tokens


def test_special_tokens_of_the_settings_files(tmp_path):
    model = unmarked(byte_level(["<end>", "<pad>", "<tool>", "<word>"]))
    decoder = {"290": {"content": "<word>", "special": False}}
    folder = write(
        tmp_path / "in",
        model,
        tokenizer_config={"eos_token": {"content": "<end>"}, "added_tokens_decoder": decoder},
        special_tokens_map={"pad_token": "<pad>", "additional_special_tokens": ["<tool>"]},
    )
    tokenizer = load_tokenizer(folder)
    assert names_of(tokenizer) == ("<end>", "<end>")
    assert tokenizer.special_tokens.keys() == {"<end>", "<pad>", "<tool>"}
    assert len(tokenizer.encode("<word>")) == 1 and len(tokenizer.encode("<end><pad><tool>")) > 3
    # Run folders and folders for transformers keep it.
    tokenizer.save(tmp_path / "run")
    tokenizer.export(tmp_path / "out")
    for place in "run", "out":
        again = load_tokenizer(tmp_path / place)
        assert again.same_ids_as(tokenizer)
        assert again.encode("<end>") == tokenizer.encode("<end>")


@pytest.mark.parametrize(
    ("special", "config", "bos", "eos"),
    [
        (["<b>", "<e>"], {"bos_token": "<b>", "eos_token": "<e>"}, "<b>", "<e>"),
        (["<b>", "<e>"], {"bos_token": None, "eos_token": {"content": "<e>"}}, "<e>", "<e>"),
        # The file takes precedence over well-known names, and its null over a guess.
        (["<s>", "</s>", "<e>"], {"bos_token": "<s>", "eos_token": "<e>"}, "<s>", "<e>"),
        (["<s>", "</s>", "<e>"], {"bos_token": None, "eos_token": "<e>"}, "<e>", "<e>"),
        # The eos in a chat model's files ends a turn.
        ([*CHATML, "<|endoftext|>"], {"eos_token": "<|im_end|>"}, "<|endoftext|>", "<|endoftext|>"),
        (["<|begin_of_text|>", "<|eot_id|>", "<|end_of_text|>"],
         {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
         "<|begin_of_text|>", "<|end_of_text|>"),
        # Names that are not in the vocabulary are ignored.
        (["<s>", "</s>"], {"bos_token": "<b>", "eos_token": "<e>"}, "<s>", "</s>"),
    ],
)  # fmt: skip
def test_roles_in_the_settings_files(special, config, bos, eos, tmp_path):
    for file in "tokenizer_config", "special_tokens_map":
        folder = write(tmp_path / file, byte_level(special), **{file: config})
        tokenizer = load_tokenizer(folder)
        expected = (bos, eos) if config.get("bos_token", 0) is not None else (eos, eos)
        assert names_of(tokenizer) == expected
        tokenizer.save(folder / "run")
        tokenizer.export(folder / "out")
        for place in "run", "out":
            again = load_tokenizer(folder / place)
            assert names_of(again) == expected and again.same_ids_as(tokenizer)
        assert load_tokenizer(folder / "run").digest == tokenizer.digest
        written = json.loads((folder / "out" / "tokenizer_config.json").read_text("utf-8"))
        assert (written["bos_token"], written["eos_token"]) == expected


def test_ids_in_the_models_files_are_the_last_resort(tmp_path):
    model = byte_level(["<b>", "<e>"])
    ids = {f"{role}_token_id": model.token_to_id(f"<{role[0]}>") for role in ("bos", "eos")}
    assert names_of(load_tokenizer(write(tmp_path / "ids", model, config=ids))) == ("<b>", "<e>")
    known = byte_level(["<s>", "</s>", "<e>"])
    ids = {"eos_token_id": known.token_to_id("<e>")}
    assert names_of(load_tokenizer(write(tmp_path / "known", known, config=ids))) == ("<s>", "</s>")
    # 5 is a word.
    with pytest.raises(ValueError, match="is known to begin or end a document"):
        load_tokenizer(write(tmp_path / "word", model, config={"eos_token_id": 5}))


def test_roles_chosen_by_the_user(tmp_path):
    path = (
        write(tmp_path / "a#b", byte_level(["<b>", "<e,f>", "<|im_end|>", "<|endoftext|>"]))
        / "tokenizer.json"
    )
    for spec, expected in [
        (f"file:{path}#bos=<b>,eos=<e,f>", ("<b>", "<e,f>")),
        (f"file:{path}#eos=<e,f>,bos=<b>", ("<b>", "<e,f>")),
        (f"file:{path}#eos=<|im_end|>", ("<|im_end|>", "<|im_end|>")),
        (f"file:{path}#bos=<b>", ("<b>", "<|endoftext|>")),
    ]:
        tokenizer = make_tokenizer(spec)
        assert names_of(tokenizer) == expected
        for write_to, place in (tokenizer.save, "run"), (tokenizer.export, "out"):
            write_to(tmp_path / str(expected) / place)
            again = load_tokenizer(tmp_path / str(expected) / place)
            assert names_of(again) == expected and again.same_ids_as(tokenizer)
        assert load_tokenizer(tmp_path / str(expected) / "run").digest == tokenizer.digest
    # An existing file takes precedence over the interpretation as roles.
    named = tmp_path / "t.json#eos=x"
    named.write_text(path.read_text("utf-8"), "utf-8")
    assert parse_file_spec(f"file:{named}") == (named, Roles())


@pytest.mark.parametrize("writer", ["save", "export"])
def test_saved_roles_are_never_paths(tmp_path, monkeypatch, writer):
    path = write(tmp_path / "in", byte_level(["<b>", "<\uff5cfin\uff5c>"])) / "tokenizer.json"
    monkeypatch.setattr("os.fsencode", lambda path: path.encode("ascii", "surrogateescape"))
    roles = "bos=<b>,eos=<\uff5cfin\uff5c>"
    tokenizer = make_tokenizer(f"file:{path}#{roles}")
    # As Python represents it on a command line in the C locale.
    undecoded = roles.encode().decode("ascii", "surrogateescape")
    assert make_tokenizer(f"file:{path}#{undecoded}").same_ids_as(tokenizer)
    place = tmp_path / "out"
    getattr(tokenizer, writer)(place)
    # A file in the working directory with the name of the saved spec must not be used.
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"tokenizer.json#{roles}").write_text("another file")
    again = load_tokenizer(place)
    assert names_of(again) == ("<b>", "<\uff5cfin\uff5c>") and again.same_ids_as(tokenizer)


def test_damaged_saved_specs(tmp_path):
    write(tmp_path, byte_level(["<b>"]))
    for content in ("file:tokenizer.json#fin=<b>", "file:tokenizer.jsonx", "file:tokenizer.json#bos="):
        (tmp_path / "tokenizer_name.txt").write_text(content)
        with pytest.raises(ValueError, match=f"^data.tokenizer is '{content}': must be file:PATH"):
            load_tokenizer(tmp_path)


def test_missing_roles_are_reported(tmp_path):
    path = write(tmp_path, byte_level(["<start>", "<stop>"])) / "tokenizer.json"
    for rest, words in [
        ("", ["no token of", "is known to begin or end a document", "#bos=NAME,eos=NAME",
              "tokenizer_config.json", "its special tokens: <start>, <stop>"]),
        ("#eos=<end>", ["has no token '<end>'", "<start>, <stop>"]),
        ("#eos=a", ["text needs 'a'", "<start>, <stop>"]),
        ("#pad=<stop>", ["must be file:PATH", "#bos=NAME,eos=NAME"]),
        ("#eos=", ["must be file:PATH"]),
        ("#eos=<stop>,eos=<start>", ["must be file:PATH"]),
    ]:  # fmt: skip
        spec = f"file:{path}{rest}"
        with pytest.raises(ValueError, match="^data.tokenizer is ") as caught:
            make_tokenizer(spec)
        message = str(caught.value)
        assert repr(spec) in message and "\n" not in message
        assert [word for word in words if word not in message] == []


def test_keys_that_only_look_like_tokens_are_ignored(tmp_path):
    config = {
        "eos_token": {"content": "<e>"},
        "num_image_token": 256,
        "use_end_token": True,
        "image_token": {"content": 5},
        "additional_special_tokens": ["<x>", 7, {"content": None}],
        "extra_special_tokens": {"y": "<y>", "size": [1, 2]},
        "added_tokens_decoder": {"1": {"content": 3, "special": True}, "2": None},
    }
    model = unmarked(byte_level(["<e>", "<x>", "<y>"]))
    tokenizer = load_tokenizer(write(tmp_path, model, tokenizer_config=config))
    assert names_of(tokenizer) == ("<e>", "<e>")
    assert tokenizer.special_tokens.keys() == {"<e>", "<x>", "<y>"}


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config", '{"bos_token": {"content": true}}', "bos_token is {'content': True}: must be"),
        ("special_tokens_map", '{"bos_token": ["<s>"]}', "bos_token is ['<s>']: must be the text of a token"),
        ("tokenizer_config", '{"eos_token": 5}', "eos_token is 5: must be the text of a token, or null"),
        ("special_tokens_map", "{", "not JSON"),
        (
            "generation_config",
            '{"eos_token_id": 1.5}',
            "eos_token_id is 1.5: must be a token id, or",
        ),
        (
            "config",
            '{"eos_token_id": [1, "2"]}',
            "eos_token_id is [1, '2']: must be a token id, or",
        ),
        ("generation_config", '{"eos_token_id": true}', "eos_token_id is True: must be a token id"),
        ("generation_config", "[]", "must contain a JSON object"),
    ],
)
def test_damaged_settings_files(file, content, message, tmp_path):
    write(tmp_path, byte_level(["<s>"]))
    (tmp_path / f"{file}.json").write_text(content)
    with pytest.raises(ValueError) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/{file}.json: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, (256,)),
        ({"generation_config": {"eos_token_id": [97, 256]}}, (97, 256)),
        ({"generation_config": {"eos_token_id": 97}}, (97, 256)),
        ({"config": {"eos_token_id": [98]}}, (98, 256)),
        ({"config": {"eos_token_id": 98}, "generation_config": {"eos_token_id": [97]}}, (97, 256)),
        ({"config": {"eos_token_id": 98}, "generation_config": {"eos_token_id": None}}, (98, 256)),
        ({"config": {"eos_token_id": None}, "generation_config": {}}, (256,)),
        # Ids that only the model has may end an answer; ids outside the model cannot.
        ({"config": {"vocab_size": 260}, "generation_config": {"eos_token_id": [259, 260, -1]}}, (259, 256)),
        ({"generation_config": {"eos_token_id": [300, 7]}}, (7, 256)),
    ],
)
def test_stop_ids_of_a_folder(files, expected, tmp_path):
    make_tokenizer("bytes").save(tmp_path)
    for name, values in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
    assert load_tokenizer(tmp_path).stop_ids == expected


def test_stop_ids_of_vocabularies(tmp_path):
    assert make_tokenizer("bytes").stop_ids == (256,)
    model = byte_level([*CHATML, "<|endoftext|>"])
    tokenizer = load_tokenizer(write(tmp_path / "chat", model, tokenizer_config={"eos_token": "<|im_end|>"}))
    ids = (model.token_to_id("<|im_end|>"), model.token_to_id("<|endoftext|>"))
    assert tokenizer.stop_ids == ids
    # A run and its export keep them; the export names only the end of a document.
    tokenizer.save(tmp_path / "run")
    again = load_tokenizer(tmp_path / "run")
    again.export(tmp_path / "out")
    assert again.stop_ids == load_tokenizer(tmp_path / "out").stop_ids == ids
    model = byte_level(["<|begin_of_text|>", "<|eot_id|>", "<|eot|>", "<|end_of_text|>"])
    ids = [model.token_to_id(name) for name in ("<|eot_id|>", "<|eot|>", "<|end_of_text|>")]
    assert load_tokenizer(write(tmp_path / "llama", model)).stop_ids == tuple(ids)
    model = byte_level(["<|endoftext|>", "<|return|>", "<|call|>"])
    ids = [model.token_to_id(name) for name in ("<|return|>", "<|endoftext|>", "<|call|>")]
    assert load_tokenizer(write(tmp_path / "harmony", model)).stop_ids == tuple(ids)


def test_the_token_cache_depends_on_the_settings_files(tmp_path):
    (tmp_path / "text.txt").write_text("a <e> b")
    folder = write(tmp_path / "in", byte_level(["<b>", "<e>"]), tokenizer_config={"eos_token": "<e>"})

    def build(spec=f"file:{folder}/tokenizer.json"):
        config = DataConfig(
            source=f"text:{tmp_path}/text.txt",
            tokenizer=spec,
            val_fraction=0.5,
            cache_dir=str(tmp_path / "c"),
        )
        return token_cache.build_cache(config)

    first = build()
    assert names_of(first.tokenizer) == ("<e>", "<e>")
    assert first.tokens[0] == first.tokens[-1] == first.tokenizer.eos_id
    write(folder, byte_level(["<b>", "<e>"]), tokenizer_config={"bos_token": "<b>", "eos_token": "<e>"})
    second = build()
    assert names_of(second.tokenizer) == ("<b>", "<e>") and second.folder != first.folder
    third = build(f"file:{folder}/tokenizer.json#bos=<e>,eos=<b>")
    assert names_of(third.tokenizer) == ("<e>", "<b>")
    assert (third.tokens[0], third.tokens[-1]) == (third.tokenizer.bos_id, third.tokenizer.eos_id)


def test_word_pieces_are_decoded_with_spaces(tmp_path):
    tokenizer = load_tokenizer(write(tmp_path / "bert", FAMILIES["bert"][0]))
    assert tokenizer.decode(tokenizer.encode("cats [SEP] a")) == " cats [ sep ] a"
    words = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1, "the": 2, "cat": 3}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = load_tokenizer(write(tmp_path / "words", words))
    assert tokenizer.encode("the </s> cat") == [2, 0, 3]
    assert tokenizer.decode([2, 3, 1]) == " the cat"


def test_lone_surrogates_become_replacement_characters():
    for tokenizer in make_tokenizer("bytes"), make_tokenizer("bpe:300", lambda: iter(TEXTS)):
        assert tokenizer.decode(tokenizer.encode("a\udcffb")) == "a\ufffdb"
