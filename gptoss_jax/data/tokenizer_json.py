"""tokenizer.json, as the Hugging Face world keeps a vocabulary, and what goes beside it."""

import itertools
import json
import re
import secrets
from collections.abc import Callable, Sequence
from typing import Any

import tokenizers

from gptoss_jax.data.special_tokens import RETURN

PAD_NAMES = ("<pad>", "<|pad|>", "[PAD]")
NO_LIMIT = int(1e30)  # what transformers takes for a text of any length


def byte_letters() -> list[str]:
    """The letter that byte-level vocabularies write a byte as: itself if it prints, or one from U+0100."""
    printing = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(0x100)
    return [chr(byte if byte in printing else next(others)) for byte in range(256)]


def byte_level_json(tokens: Sequence[bytes], special_tokens: dict[str, int], words: str | None) -> str:
    """The tokenizer.json of a vocabulary in which two neighbours join whenever that gives a token.

    That is tiktoken's rule: of all neighbours the pair goes first whose whole has the lowest id.

    Args:
      tokens: what each id below the special tokens stands for; all 256 single bytes are among them.
      special_tokens: the ids of the tokens that no text gives.
      words: the regular expression of the pieces that are never joined, or None if there is only one.
    """
    table = {byte: letter for byte, letter in enumerate(byte_letters())}
    written = [token.decode("latin-1").translate(table) for token in tokens]
    ids = {token: i for i, token in enumerate(tokens)}
    merges = []
    for token in tokens:
        cuts = ((ids.get(token[:i]), ids.get(token[i:])) for i in range(1, len(token)))
        pairs = sorted(cut for cut in cuts if None not in cut)
        merges += [[written[left], written[right]] for left, right in pairs]
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    to_letters = byte_level | {"add_prefix_space": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": False}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    by_id = sorted((token, name) for name, token in special_tokens.items())
    # Keys stand in the order of the tokenizers library, so that the same vocabulary gives the same bytes.
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": token, "content": name} | plain for token, name in by_id],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, to_letters]} if words else to_letters,
        "post_processor": byte_level | {"trim_offsets": False},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            # A word that is a token is taken whole, as tiktoken does, even if no row of merges leads to it.
            "ignore_merges": True,
            "vocab": {text: i for i, text in enumerate(written)},
            "merges": merges,
        },
    }
    return json.dumps(content, indent=2, ensure_ascii=False)


def mark_special(content: str, model: tokenizers.Tokenizer, names: set[str]) -> str:
    """A tokenizer.json that lists all of these tokens as special; unchanged where it does already."""
    added = {token.content for token in model.get_added_tokens_decoder().values() if token.special}
    if names <= added:
        return content
    values = json.loads(content)
    tokens = {token["content"]: token for token in values.get("added_tokens") or []}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    for name in names:
        token = tokens.setdefault(name, {"id": model.token_to_id(name), "content": name} | plain)
        token["special"] = True
    values["added_tokens"] = sorted(tokens.values(), key=lambda token: token["id"])
    return json.dumps(values, indent=2, ensure_ascii=False)


def text_encoder(content: str, model: tokenizers.Tokenizer, names: set[str]) -> tokenizers.Tokenizer:
    """A tokenizer.json's tokenizer for plain text, which never gives a token with one of these names.

    With `encode_special_tokens` the library does not look for the names of special tokens. Where they are in
    the model's vocabulary too, the model may still find them: T5's does. So there they get names that no text
    spells.
    """
    names = {name for name in names if model.model.token_to_id(name) is not None}
    if names:
        model = tokenizers.Tokenizer.from_str(json.dumps(_renamed(json.loads(content), names)))
    model.encode_special_tokens = True
    # Training text is plain text of any length, whatever the file was last used for.
    model.no_truncation()
    model.no_padding()
    return model


def _renamed(values: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """A tokenizer.json where these tokens of the model have other names, and are not added tokens."""
    new = {name: f"\0{secrets.token_hex(32)}" for name in names}
    model = values["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {new.get(piece, piece): token for piece, token in model["vocab"].items()}
    else:  # Unigram's has pieces with their scores
        model["vocab"] = [[new.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = new[model["unk_token"]]
    if model.get("merges"):
        pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
        model["merges"] = [pair for pair in pairs if names.isdisjoint((*pair, "".join(pair)))]
    added = values.get("added_tokens") or []
    values["added_tokens"] = [token for token in added if token["content"] not in names]
    return values


def bytes_of_tokens(content: str, model: tokenizers.Tokenizer, special: set[str]) -> list[bytes]:
    """The bytes that each id stands for, special tokens and ids without a token for none.

    They are exact for byte-level vocabularies and those with byte fallback. WordPiece does not encode spaces,
    so each word comes with one before it.
    """
    vocab = model.get_vocab(with_added_tokens=True)
    added = {token.content for token in model.get_added_tokens_decoder().values()}
    decode = _piece_decoder(json.loads(content))
    table = [b""] * (1 + max(vocab.values()))
    for piece, token in vocab.items():
        if piece not in special:
            table[token] = piece.encode() if piece in added else decode(piece)
    return table


def _piece_decoder(values: dict[str, Any]) -> Callable[[str], bytes]:
    """The bytes of one piece of a tokenizer.json's vocabulary, by what its decoder does to a whole text."""
    decoders = {part["type"]: part for part in _flat(values.get("decoder"))}
    before = [part for key in ("normalizer", "pre_tokenizer") for part in _flat(values.get(key))]
    to_byte = {letter: byte for byte, letter in enumerate(byte_letters())}

    def byte_level(piece: str) -> bytes:
        known = all(letter in to_byte for letter in piece)
        return bytes(map(to_byte.get, piece)) if known else piece.encode()

    def words(piece: str) -> bytes:
        inside = prefix is not None and piece.startswith(prefix)
        return (piece.removeprefix(prefix) if inside else f" {piece}").encode()

    def spaced(piece: str) -> bytes:
        if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", piece):
            return bytes.fromhex(piece[3:5])
        for mark in marks:
            piece = piece.replace(mark, " ")
        return (piece.removesuffix(suffix) + " " if suffix and piece.endswith(suffix) else piece).encode()

    if "ByteLevel" in decoders or any(part["type"] == "ByteLevel" for part in before):
        return byte_level
    model = values["model"]
    if "WordPiece" in decoders or (not decoders and model.get("type") in ("WordPiece", "WordLevel")):
        prefix = decoders.get("WordPiece", model).get("prefix") or model.get("continuing_subword_prefix")
        return words
    suffix = decoders.get("BPEDecoder", {}).get("suffix")
    marks = {"\u2581", decoders.get("Metaspace", {}).get("replacement", "\u2581")}
    return spaced


def _flat(part: dict | None) -> list[dict]:
    """The parts of a normalizer, pre-tokenizer or decoder, those of a sequence one by one."""
    if part is None:
        return []
    parts = next((part[key] for key in ("normalizers", "pretokenizers", "decoders") if key in part), None)
    return [part] if parts is None else [inner for one in parts for inner in _flat(one)]


def token_roles(special_tokens: dict[str, int], bos_id: int, eos_id: int) -> dict[str, str]:
    """Returns the tokens by their roles in Hugging Face's files: {"bos_token": name, "eos_token": …, …}.

    In gpt-oss's vocabulary the end of a turn is the eos and the end of a document the padding, as published.
    In others the end of a document is the eos, and the padding too if there is no token for it.
    """
    names = {token: name for name, token in special_tokens.items()}
    return {
        "bos_token": names[bos_id],
        "eos_token": RETURN if RETURN in special_tokens else names[eos_id],
        "pad_token": next((name for name in PAD_NAMES if name in special_tokens), names[eos_id]),
    }


def settings_files(content: str, roles: dict[str, str], max_length: int | None) -> dict[str, str]:
    """The files that go with a tokenizer.json, {name: content}; `roles` are those of `token_roles`."""
    added = {str(token.pop("id")): token for token in json.loads(content).get("added_tokens") or []}
    config = roles | {
        "added_tokens_decoder": added,
        # Without it transformers may take a space away before a full stop.
        "clean_up_tokenization_spaces": False,
        "extra_special_tokens": {},
        # Without it transformers may hand the model token types, which it does not know.
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": NO_LIMIT if max_length is None else max_length,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    files = {"tokenizer_config.json": config, "special_tokens_map.json": roles}
    return {
        name: json.dumps(values, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
        for name, values in files.items()
    }
