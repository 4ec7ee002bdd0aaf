"""tokenizer.json, as the Hugging Face world keeps a vocabulary, and what goes beside it."""

import itertools
import json
from collections.abc import Sequence

import tokenizers

END_OF_TEXT = "<|endoftext|>"
# Ends an assistant's turn in gpt-oss's chat format, where END_OF_TEXT ends a document.
RETURN = "<|return|>"
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


def bytes_of_tokens(model: tokenizers.Tokenizer, decoder: dict | None) -> list[bytes]:
    """The bytes that each id stands for: exact for byte-level vocabularies and those with byte fallback.

    Special tokens and ids without a token stand for none. `decoder` is that of the tokenizer.json.
    """
    byte_level = "ByteLevel" in json.dumps(decoder)
    to_byte = {letter: byte for byte, letter in enumerate(byte_letters())}
    vocab = model.get_vocab(with_added_tokens=True)
    added = model.get_added_tokens_decoder()
    table = [b""] * (1 + max(vocab.values()))
    for piece, token in vocab.items():
        if token in added:
            table[token] = b"" if added[token].special else piece.encode()
        elif byte_level:
            known = all(letter in to_byte for letter in piece)
            table[token] = bytes(map(to_byte.get, piece)) if known else piece.encode()
        elif len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            table[token] = bytes.fromhex(piece[3:5])
        else:
            table[token] = piece.replace("\u2581", " ").encode()
    return table


def settings_files(
    content: str, special_tokens: dict[str, int], bos_id: int, eos_id: int, max_length: int | None
) -> dict[str, str]:
    """What goes with a tokenizer.json: {"tokenizer_config.json": its text, "special_tokens_map.json": …}.

    In gpt-oss's vocabulary the end of a turn is the eos and the end of a document the padding, as published.
    In others the end of a document is the eos, and the padding too if there is no token for it.
    """
    names = {token: name for name, token in special_tokens.items()}
    roles = {
        "bos_token": names[bos_id],
        "eos_token": RETURN if RETURN in special_tokens else names[eos_id],
        "pad_token": next((name for name in PAD_NAMES if name in special_tokens), names[eos_id]),
    }
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
