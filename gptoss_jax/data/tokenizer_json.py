"""Hugging Face's tokenizer.json: training, conversion, encoding without special tokens, bytes of tokens."""

import itertools
import json
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from gptoss_jax.data.special_tokens import END_OF_TEXT, HARMONY_TOKENS

NO_LIMIT = int(1e30)  # transformers' value for unlimited length
TRAINING_BYTES = 64 << 20
# Single bytes, the end of a document and the special tokens of a chat.
MIN_BPE_SIZE = 256 + 1 + len(HARMONY_TOKENS)

# Pre-tokenization pattern of trained vocabularies, for code and prose: runs of spaces stay whole, a name
# keeps the space, dot or underscore before it, numbers are split into groups of three digits.
WORDS = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",  # letters, and one sign or space before them
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+",  # operators and punctuation
        r"\s*[\r\n]+",  # blank lines and the end of a line
        r"\s+(?!\S)",  # spaces, except the one before a word
        r"\s+",
    )
)


def train_bpe(size: int, texts: Iterator[str]) -> str:
    """Trains a byte-level BPE vocabulary of at most `size` tokens, the last of which are HARMONY_TOKENS.

    Returns its tokenizer.json.
    """
    model = tokenizers.Tokenizer(models.BPE())
    words = pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated")
    to_letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = pre_tokenizers.Sequence([words, to_letters])
    model.decoder = decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size - len(HARMONY_TOKENS),
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(_first_bytes(texts, TRAINING_BYTES), trainer)
    model.add_special_tokens(list(HARMONY_TOKENS))
    return model.to_str()


def _first_bytes(texts: Iterator[str], size: int) -> Iterator[str]:
    """Yields the first `size` UTF-8 bytes of a stream of texts."""
    for text in texts:
        data = text.encode()[:size]
        yield data.decode(errors="ignore")
        size -= len(data)
        if size == 0:
            return


def byte_letters() -> list[str]:
    """Returns the character of each byte in byte-level BPE: itself if printable, otherwise from U+0100 on."""
    printing = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(0x100)
    return [chr(byte if byte in printing else next(others)) for byte in range(256)]


def byte_level_json(tokens: Sequence[bytes], special_tokens: dict[str, int], words: str | None) -> str:
    """Converts a tiktoken vocabulary, in which the pair with the lowest id is merged first.

    Args:
      tokens: the bytes of each id below the special tokens, including all 256 single bytes.
      special_tokens: name -> id of the tokens that are never text; their ids follow the others without gaps.
      words: regular expression for pre-tokenization; None does not split the text.
    """
    table = {byte: letter for byte, letter in enumerate(byte_letters())}
    written = [token.decode("latin-1").translate(table) for token in tokens]
    ids = {token: i for i, token in enumerate(tokens)}
    merges = []
    for token in tokens:
        cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
        pairs = sorted((ids[left], ids[right]) for left, right in cuts if left in ids and right in ids)
        merges += [(written[left], written[right]) for left, right in pairs]
    model = tokenizers.Tokenizer(
        # As in tiktoken, a word in the vocabulary is one token, even if no merges lead to it.
        models.BPE({text: i for i, text in enumerate(written)}, merges, ignore_merges=True)
    )
    to_letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(tokenizers.Regex(words), "isolated") if words else None
    model.pre_tokenizer = pre_tokenizers.Sequence([split, to_letters]) if words else to_letters
    model.post_processor = processors.ByteLevel(trim_offsets=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens(sorted(special_tokens, key=special_tokens.__getitem__))
    return model.to_str(pretty=True)


def mark_special(content: str, model: tokenizers.Tokenizer, names: set[str]) -> str:
    """Returns the tokenizer.json with these tokens marked as special; unchanged if they already are."""
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
    """Returns a tokenizer that encodes special tokens in text as characters.

    With `encode_special_tokens`, the library does not look for them. A model with them in its vocabulary,
    such as T5's, may still find them, so they are renamed there to names that no text contains.
    """
    names = {name for name in names if model.model.token_to_id(name) is not None}
    if names:
        model = tokenizers.Tokenizer.from_str(json.dumps(_renamed(json.loads(content), names)))
    model.encode_special_tokens = True
    # Settings that the file may contain from earlier use.
    model.no_truncation()
    model.no_padding()
    return model


def _renamed(values: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """Renames these tokens in the model of a tokenizer.json, and removes them from the added tokens."""
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
    """Returns the bytes of each id; empty for special tokens and ids without a token.

    Exact for byte-level vocabularies and byte fallback. WordPiece does not encode spaces: each word gets one.
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
    """Returns a function that maps a vocabulary entry to its bytes, according to the file's decoder."""
    decoders = {part["type"]: part for part in _flat(values.get("decoder"))}
    before = [part for key in ("normalizer", "pre_tokenizer") for part in _flat(values.get(key))]
    to_byte = {letter: byte for byte, letter in enumerate(byte_letters())}

    def byte_level(piece: str) -> bytes:
        known = all(letter in to_byte for letter in piece)
        return bytes(map(to_byte.__getitem__, piece)) if known else piece.encode()

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
    """Returns the components of a normalizer, pre-tokenizer or decoder, with sequences flattened."""
    if part is None:
        return []
    parts = next((part[key] for key in ("normalizers", "pretokenizers", "decoders") if key in part), None)
    return [part] if parts is None else [inner for one in parts for inner in _flat(one)]


def settings_files(content: str, roles: dict[str, str], max_length: int | None) -> dict[str, str]:
    """Returns {name: content} of the files next to a tokenizer.json; `roles` is `Tokenizer.token_roles`."""
    added = {str(token.pop("id")): token for token in json.loads(content).get("added_tokens") or []}
    config = roles | {
        "added_tokens_decoder": added,
        # By default, transformers may remove the space before a period.
        "clean_up_tokenization_spaces": False,
        "extra_special_tokens": {},
        # By default, transformers may pass token types to the model.
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": NO_LIMIT if max_length is None else max_length,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    files = {"tokenizer_config.json": config, "special_tokens_map.json": roles}
    return {
        name: json.dumps(values, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
        for name, values in files.items()
    }
