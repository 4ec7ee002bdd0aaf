"""Tokenizers: `bytes`, `bpe:SIZE`, `file:PATH` and `o200k_harmony` behind one class."""

import dataclasses
import functools
import hashlib
import os
import pathlib
import textwrap
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import tiktoken
import tokenizers

from gptoss_jax.config import require
from gptoss_jax.config.base import one_line
from gptoss_jax.config.paths import user_path
from gptoss_jax.data import special_tokens as special
from gptoss_jax.data.files import readable
from gptoss_jax.data.special_tokens import END_OF_TEXT, NO_ROLES, NOTHING_NAMED, NamedTokens, Roles
from gptoss_jax.data.tokenizer_json import (
    MIN_BPE_SIZE,
    byte_level_json,
    bytes_of_tokens,
    mark_special,
    settings_files,
    text_encoder,
    train_bpe,
)

KINDS = "bytes, bpe:SIZE, file:tokenizer.json or o200k_harmony"
HARMONY = "o200k_harmony"
NAME_FILE = "tokenizer_name.txt"
PAD_NAMES = ("<pad>", "<|pad|>", "[PAD]")
# Number of ids of text and named special tokens. The other rows of the released embedding (201088) are
# unused.
HARMONY_VOCAB_SIZE = 200019


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer, created by `make_tokenizer` or `load_tokenizer`.

    `name` is the spec. A document is stored as bos, text, eos; bos and eos may be the same token.
    `special_tokens` maps the names of tokens that are never text, including bos and eos, to their ids.
    """

    name: str
    vocab_size: int
    bos_id: int
    eos_id: int
    special_tokens: dict[str, int] = dataclasses.field(repr=False)
    _encode: Callable[[list[str]], Sequence[Sequence[int] | np.ndarray]] = dataclasses.field(repr=False)
    _make_token_bytes: Callable[[], list[bytes]] = dataclasses.field(repr=False)
    _make_json: Callable[[], str] = dataclasses.field(repr=False)
    _files: dict[str, str] = dataclasses.field(repr=False)  # contents by name, for `save`
    _named_stop_ids: tuple[int, ...] = ()  # in the files of its folder

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: those declared in the model's folder (`load_tokenizer`), end-of-turn
        tokens, eos and, in gpt-oss's vocabulary, the end of a tool call.
        """
        harmony = (special.RETURN, END_OF_TEXT, special.CALL)
        ends = harmony if self.special_tokens.keys() >= set(harmony) else special.TURN_ENDS
        ids = [self.special_tokens[name] for name in ends if name in self.special_tokens]
        return tuple(dict.fromkeys((*self._named_stop_ids, *ids, self.eos_id)))

    @property
    def token_roles(self) -> dict[str, str]:
        """The tokens that `export` writes as bos_token, eos_token and pad_token, by role.

        In gpt-oss's vocabulary, eos is the end of a turn and padding is the end of a document, as published.
        In others, eos is the end of a document, which is also the padding unless there is a padding token.
        """
        end_of_document = self._names[self.eos_id]
        return {
            "bos_token": self._names[self.bos_id],
            "eos_token": special.RETURN if special.RETURN in self.special_tokens else end_of_document,
            "pad_token": next(filter(self.special_tokens.__contains__, PAD_NAMES), end_of_document),
        }

    def encode(self, text: str) -> list[int]:
        """Encodes a text, without bos and eos. Special tokens in the text are encoded as characters."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encodes texts like `encode` on all cores, each to an int32 array."""
        return [np.asarray(ids, dtype=np.int32) for ids in self._encode([valid_text(text) for text in texts])]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Decodes ids, without special tokens; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """Returns the joined bytes of ids, without special tokens. Raises ValueError for an unknown id."""
        pieces = []
        for token in ids:
            require(0 <= token < self.vocab_size, "token id", int(token), f"must be below {self.vocab_size}")
            pieces.append(self._token_bytes[token])
        return b"".join(pieces)

    @property
    def _names(self) -> dict[int, str]:
        return {token: name for name, token in self.special_tokens.items()}

    @functools.cached_property
    def _token_bytes(self) -> list[bytes]:
        return self._make_token_bytes()

    @property
    def digest(self) -> str:
        """A hash. Equal hashes imply equal ids, but two representations of the same tokenizer differ."""
        parts = [part for file in self._files.items() for part in file]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def same_ids_as(self, other: "Tokenizer") -> bool:
        """Returns True if each id has the same bytes, or is the same special token, in both.

        A model can then be used with either. Does not compare how text is split into tokens.
        """
        if self.digest == other.digest:
            return True
        ours, theirs = (
            (one.bos_id, one.eos_id, one.special_tokens, one._token_bytes) for one in (self, other)
        )
        return ours == theirs

    def save(self, folder: str | os.PathLike) -> None:
        """Writes tokenizer.json, tokenizer_name.txt, or both, for `load_tokenizer`.

        tokenizer_name.txt has the name of a tokenizer without files, or names bos and eos if tokenizer.json
        does not imply them.
        """
        folder = user_path(folder, "folder")
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            (folder / name).write_bytes(content.encode())

    def export(self, folder: str | os.PathLike, model_max_length: int | None = None) -> None:
        """Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json for Hugging Face.

        `load_tokenizer` also reads the folder, with the same ids.

        Args:
          folder: created if it is missing; existing files are overwritten.
          model_max_length: number of tokens above which transformers warns; None for no limit.

        Raises ValueError if the length is below 1, or if the folder cannot be written or contains the
        tokenizer_name.txt of another tokenizer, which `load_tokenizer` would read instead.
        """
        fits = model_max_length is None or model_max_length >= 1
        require(fits, "model_max_length", model_max_length, "must be 1 or more, or None for no limit")
        folder = user_path(folder, "folder")
        content = self._make_json()
        roles = self.token_roles
        files = {"tokenizer.json": content} | settings_files(content, roles, model_max_length)
        if special.document_end(roles["eos_token"], self.special_tokens) != self._names[self.eos_id]:
            files[NAME_FILE] = special.saved_spec(Roles(self._names[self.bos_id], self._names[self.eos_id]))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            name = folder / NAME_FILE
            ours = (files.get(NAME_FILE), self._files.get(NAME_FILE))
            taken = name.exists() and name.read_text(encoding="utf-8") not in ours
            require(not taken, "folder", str(folder), f"must not hold another tokenizer's {NAME_FILE}")
            for file, text in files.items():
                (folder / file).write_bytes(text.encode())
        except OSError as error:
            raise ValueError(f"folder is {str(folder)!r}: cannot be written ({error.strerror})") from None


def make_tokenizer(spec: str, training_texts: Callable[[], Iterator[str]] | None = None) -> Tokenizer:
    """Creates the tokenizer of a spec (`data.tokenizer`).

    Args:
      spec: bytes, bpe:SIZE, file:PATH or o200k_harmony.
      training_texts: returns the texts for bpe:SIZE, which is trained on the first 64 MiB.

    Raises ValueError for an unknown kind, an invalid size, or a missing or corrupt file.
    """
    kind, _, rest = spec.partition(":")
    if spec == "bytes":
        return _bytes()
    if spec == HARMONY:
        return _harmony()
    if kind == "bpe":
        fits = rest.isdecimal() and int(rest) >= MIN_BPE_SIZE
        allowed = f"must be bpe:SIZE with a SIZE of {MIN_BPE_SIZE} or more"
        require(fits, "data.tokenizer", spec, allowed)
        if training_texts is None:
            raise ValueError(f"data.tokenizer is {spec!r}: needs text to be trained on")
        return _from_json(spec, train_bpe(int(rest), training_texts()).encode(), spec)
    require(kind == "file" and bool(rest), "data.tokenizer", spec, f"must be {KINDS}")
    path, chosen = special.parse_file_spec(spec)
    return _from_file(path, spec, chosen)


def fingerprint(spec: str) -> list[str]:
    """Returns what determines the ids of a `file:` tokenizer: its hash, and tokens named next to it."""
    path, _ = special.parse_file_spec(spec)
    require(path.is_file(), "data.tokenizer", spec, f"there is no file {path}")
    named = special.read_named_tokens(path.parent)
    with readable(path):
        parts = [hashlib.sha256(path.read_bytes()).hexdigest()]
    if named != NOTHING_NAMED:
        parts.append(repr((named.roles, named.without_bos, sorted(named.special), sorted(named.ids.items()))))
    return parts


def load_tokenizer(folder: str | os.PathLike) -> Tokenizer:
    """Loads a tokenizer from a folder written by `save`, `export` or Hugging Face.

    Its `stop_ids` include the eos_token_id of the folder's generation_config.json or config.json. Raises
    ValueError if the folder has no tokenizer, or a corrupt one.
    """
    folder = user_path(folder, "tokenizer folder")
    name, file = folder / NAME_FILE, folder / "tokenizer.json"
    has_one = name.is_file() or file.exists()
    require(has_one, "tokenizer folder", str(folder), f"must hold tokenizer.json or {NAME_FILE}")
    spec = name.read_text(encoding="utf-8").removesuffix("\n") if name.is_file() else special.SAVED_SPEC
    if spec.startswith(special.SAVED_SPEC):
        chosen = special.parse_saved_spec(spec)
        tokenizer = _from_file(file, spec.replace("tokenizer.json", str(file), 1), chosen)
    else:
        tokenizer = make_tokenizer(spec.strip())
    named = special.read_stop_ids(folder, tokenizer.vocab_size)
    return dataclasses.replace(tokenizer, _named_stop_ids=named)


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the dtype in which ids are stored."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def valid_text(text: str) -> str:
    """Replaces lone surrogates (bytes that Python could not decode) with U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _bytes() -> Tokenizer:
    table = [bytes([byte]) for byte in range(256)]
    names = {END_OF_TEXT: 256}
    return Tokenizer(
        name="bytes",
        vocab_size=257,
        bos_id=256,
        eos_id=256,
        special_tokens=names,
        _encode=lambda texts: [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts],
        _make_token_bytes=lambda: [*table, b""],
        _make_json=lambda: byte_level_json(table, names, words=None),
        _files={NAME_FILE: "bytes\n"},
    )


def _harmony() -> Tokenizer:
    try:
        encoding = tiktoken.get_encoding(HARMONY)
    except (OSError, ValueError) as error:  # the second for a file with the wrong hash
        hint = "tiktoken cannot fetch its file; set TIKTOKEN_CACHE_DIR, see docs/tokenizers.md"
        allowed = f"{hint} ({textwrap.shorten(one_line(error), 120, placeholder=' …')})"
        raise ValueError(f"data.tokenizer is {HARMONY!r}: {allowed}") from None

    names: dict[str, int] = {}
    for name in sorted(encoding.special_tokens_set, key=lambda name: ("reserved" in name, name)):
        token = encoding.encode_single_token(name)
        # tiktoken has two names for one id, <|endofprompt|> and a reserved one, and also reserves unused
        # rows.
        if token < HARMONY_VOCAB_SIZE and token not in names.values():
            names[name] = token

    def table() -> list[bytes]:
        return [encoding.decode_single_token_bytes(token) for token in range(min(names.values()))]

    return Tokenizer(
        name=HARMONY,
        vocab_size=HARMONY_VOCAB_SIZE,
        bos_id=encoding.encode_single_token("<|startoftext|>"),
        eos_id=encoding.encode_single_token(END_OF_TEXT),
        special_tokens=names,
        _encode=lambda texts: encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1),
        _make_token_bytes=lambda: table() + [b""] * len(names),
        # Not public, but tiktoken's guide to new encodings uses it.
        _make_json=lambda: byte_level_json(table(), names, words=encoding._pat_str),
        _files={NAME_FILE: HARMONY + "\n"},
    )


def _from_file(path: pathlib.Path, spec: str, chosen: Roles) -> Tokenizer:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"data.tokenizer is {spec!r}: cannot read {path} ({error.strerror})") from None
    return _from_json(spec, content, str(path), chosen, special.read_named_tokens(path.parent))


def _from_json(
    spec: str, data: bytes, origin: str, chosen: Roles = NO_ROLES, named: NamedTokens = NOTHING_NAMED
) -> Tokenizer:
    try:
        content = data.decode()
        model = tokenizers.Tokenizer.from_str(content)
    except Exception as error:  # the library raises Exception itself
        allowed = f"{origin} is not a tokenizer.json ({one_line(error)})"
        raise ValueError(f"data.tokenizer is {spec!r}: {allowed}") from None
    roles = special.find_roles(model, chosen, named)
    bos, eos = special.check_roles(spec, origin, model, roles)
    names = special.special_names(model, roles, named)
    marked = mark_special(content, model, names)
    if marked != content:
        content, model = marked, tokenizers.Tokenizer.from_str(marked)
    files = {"tokenizer.json": content}
    if special.find_roles(model, NO_ROLES, NOTHING_NAMED) != roles:
        files[NAME_FILE] = special.saved_spec(roles)
    encoder = text_encoder(content, model, names)
    vocabulary = model.get_vocab(with_added_tokens=True)

    def encode(texts: list[str]) -> list[list[int]]:
        return [encoded.ids for encoded in encoder.encode_batch_fast(texts, add_special_tokens=False)]

    return Tokenizer(
        name=spec,
        vocab_size=1 + max(vocabulary.values()),
        bos_id=vocabulary[bos],
        eos_id=vocabulary[eos],
        special_tokens={name: vocabulary[name] for name in names},
        _encode=encode,
        _make_token_bytes=lambda: bytes_of_tokens(content, model, names),
        _make_json=lambda: content,
        _files=files,
    )
