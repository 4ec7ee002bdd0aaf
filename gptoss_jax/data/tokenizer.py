"""Text to token ids and back: `bytes`, `bpe:SIZE`, `file:PATH` and `o200k_harmony` behind one class."""

import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import tiktoken
import tokenizers

from gptoss_jax.config import require
from gptoss_jax.config.base import one_line
from gptoss_jax.config.paths import user_path
from gptoss_jax.data import special_tokens as special
from gptoss_jax.data.bpe import train_bpe
from gptoss_jax.data.files import readable
from gptoss_jax.data.special_tokens import END_OF_TEXT, NO_ROLES, NOTHING_NAMED, NamedTokens, Roles
from gptoss_jax.data.tokenizer_json import (
    byte_level_json,
    bytes_of_tokens,
    mark_special,
    settings_files,
    text_encoder,
    token_roles,
)

KINDS = "bytes, bpe:SIZE, file:tokenizer.json or o200k_harmony"
HARMONY = "o200k_harmony"
NAME_FILE = "tokenizer_name.txt"
# Every id that text or a named special token has. The released embedding has 201088 rows: the rest is unused.
HARMONY_VOCAB_SIZE = 200019


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A vocabulary. Made by `make_tokenizer` or `load_tokenizer`.

    `name` is the spec, ids run from 0 to `vocab_size` - 1, and a document is stored as bos, its ids, eos. The
    two are the same token where the vocabulary has only one for both.
    `special_tokens` are the ids of the tokens that are never text, bos and eos among them, by name.
    """

    name: str
    vocab_size: int
    bos_id: int
    eos_id: int
    special_tokens: dict[str, int] = dataclasses.field(repr=False)
    _encode: Callable[[list[str]], Sequence[Sequence[int] | np.ndarray]] = dataclasses.field(repr=False)
    _make_token_bytes: Callable[[], list[bytes]] = dataclasses.field(repr=False)
    _make_json: Callable[[], str] = dataclasses.field(repr=False)
    _files: dict[str, str] = dataclasses.field(repr=False)  # names and contents of what `save` writes
    _named_stop_ids: tuple[int, ...] = ()  # what the files of its folder name

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end an answer: those that the model's folder names (`load_tokenizer`), the tokens that
        end a turn, in gpt-oss's vocabulary also the end of a tool call, and eos.
        """
        harmony = (special.RETURN, END_OF_TEXT, special.CALL)
        ends = harmony if self.special_tokens.keys() >= set(harmony) else special.TURN_ENDS
        ids = [self.special_tokens[name] for name in ends if name in self.special_tokens]
        return tuple(dict.fromkeys((*self._named_stop_ids, *ids, self.eos_id)))

    @property
    def token_roles(self) -> dict[str, str]:
        """The names of the tokens that `export` writes as bos_token, eos_token and pad_token."""
        return token_roles(self.special_tokens, self.bos_id, self.eos_id)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without bos and eos. A special token that it spells is encoded as characters."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text as int32, as from `encode`; works on all cores."""
        return [np.asarray(ids, dtype=np.int32) for ids in self._encode([valid_text(text) for text in texts])]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of some ids, without special tokens; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The exact bytes of some ids, without special tokens; a list's are those of its parts, joined.

        Raises ValueError for an id outside the vocabulary.
        """
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
        """Tells tokenizers apart: those of one digest give the same ids. Two forms of one have two."""
        parts = [part for file in self._files.items() for part in file]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def same_ids_as(self, other: "Tokenizer") -> bool:
        """Returns True if each id stands for the same bytes, or the same special token, in both.

        Then one decodes what the other has encoded, and a model can be used with either. How a text is split
        into tokens is not compared.
        """
        if self.digest == other.digest:
            return True
        ours, theirs = (
            (one.bos_id, one.eos_id, one.special_tokens, one._token_bytes) for one in (self, other)
        )
        return ours == theirs

    def save(self, folder: str | os.PathLike) -> None:
        """Writes what `load_tokenizer` needs for the same ids: tokenizer.json, tokenizer_name.txt, or both.

        tokenizer_name.txt holds the name of a tokenizer that needs no file, or names the bos and the eos of a
        tokenizer.json where they are not known from its content.
        """
        folder = user_path(folder, "folder")
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            (folder / name).write_bytes(content.encode())

    def export(self, folder: str | os.PathLike, model_max_length: int | None = None) -> None:
        """Writes the tokenizer as Hugging Face's programs read it, over what is there.

        The files are tokenizer.json, tokenizer_config.json and special_tokens_map.json. `load_tokenizer`
        reads the folder too, with the same ids.

        Args:
          folder: made if it is missing.
          model_max_length: the most tokens that the model takes, for transformers to warn at; None: no limit.

        Raises ValueError for a length below 1, a folder that cannot be written, and one that holds the
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
    """Makes the tokenizer that a spec (`data.tokenizer`) names.

    Args:
      spec: bytes, bpe:SIZE, file:PATH or o200k_harmony.
      training_texts: gives the texts that bpe:SIZE is trained on, of which it reads the first 64 MiB.

    Raises ValueError for an unknown kind, a bad size, or a file that is missing or damaged.
    """
    kind, _, rest = spec.partition(":")
    if spec == "bytes":
        return _bytes()
    if spec == HARMONY:
        return _harmony()
    if kind == "bpe":
        fits = rest.isdecimal() and int(rest) >= 257
        require(fits, "data.tokenizer", spec, "must be bpe:SIZE with a SIZE of 257 or more")
        require(training_texts is not None, "data.tokenizer", spec, "needs text to be trained on")
        return _from_json(spec, train_bpe(int(rest), training_texts()), spec)
    require(kind == "file" and bool(rest), "data.tokenizer", spec, f"must be {KINDS}")
    path, chosen = special.parse_file_spec(spec)
    return _from_file(path, spec, chosen)


def fingerprint(spec: str) -> list[str]:
    """Returns the content that a file: tokenizer depends on: the file, and the tokens named beside it."""
    path, _ = special.parse_file_spec(spec)
    require(path.is_file(), "data.tokenizer", spec, f"there is no file {path}")
    named = special.read_named_tokens(path.parent)
    with readable(path):
        parts = [hashlib.sha256(path.read_bytes()).hexdigest()]
    if named != NOTHING_NAMED:
        parts.append(repr((named.roles, named.without_bos, sorted(named.special), sorted(named.ids.items()))))
    return parts


def load_tokenizer(folder: str | os.PathLike) -> Tokenizer:
    """Reads what `save` or `export` wrote, or the tokenizer.json of a Hugging Face folder.

    The eos_token_id of the folder's generation_config.json or config.json is then among its `stop_ids`.

    Raises ValueError if the folder holds no tokenizer, or a damaged one.
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


def valid_text(text: str) -> str:
    """Returns a text with its lone surrogates, bytes that Python could not decode, replaced by U+FFFD."""
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
        allowed = f"{hint} ({one_line(error)})"
        raise ValueError(f"data.tokenizer is {HARMONY!r}: {allowed}") from None

    names: dict[str, int] = {}
    for name in sorted(encoding.special_tokens_set, key=lambda name: ("reserved" in name, name)):
        token = encoding.encode_single_token(name)
        # tiktoken names one id twice, <|endofprompt|> and a reserved one, and goes on to reserve unused rows.
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
        # The pattern has no public name, but tiktoken's own guide to new encodings takes it from there.
        _make_json=lambda: byte_level_json(table(), names, words=encoding._pat_str),
        _files={NAME_FILE: HARMONY + "\n"},
    )


def _from_file(path: pathlib.Path, spec: str, chosen: Roles) -> Tokenizer:
    try:
        content = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise ValueError(f"data.tokenizer is {spec!r}: cannot read {path} ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ValueError(f"data.tokenizer is {spec!r}: {path} is not a tokenizer.json (not UTF-8)") from None
    return _from_json(spec, content, str(path), chosen, special.read_named_tokens(path.parent))


def _from_json(
    spec: str, content: str, origin: str, chosen: Roles = NO_ROLES, named: NamedTokens = NOTHING_NAMED
) -> Tokenizer:
    try:
        model = tokenizers.Tokenizer.from_str(content)
    except Exception as error:  # the library raises Exception itself for every kind of damage
        allowed = f"{origin} is not a tokenizer.json ({one_line(error)})"
        raise ValueError(f"data.tokenizer is {spec!r}: {allowed}") from None
    roles = special.find_roles(model, chosen, named)
    special.check_roles(spec, origin, model, roles)
    names = special.special_names(model, roles, named)
    marked = mark_special(content, model, names)
    if marked != content:
        content, model = marked, tokenizers.Tokenizer.from_str(marked)
    files = {"tokenizer.json": content}
    if special.find_roles(model, NO_ROLES, NOTHING_NAMED) != roles:
        files[NAME_FILE] = special.saved_spec(roles)
    encoder = text_encoder(content, model, names)

    def encode(texts: list[str]) -> list[list[int]]:
        return [encoded.ids for encoded in encoder.encode_batch_fast(texts, add_special_tokens=False)]

    return Tokenizer(
        name=spec,
        vocab_size=1 + max(model.get_vocab(with_added_tokens=True).values()),
        bos_id=model.token_to_id(roles.bos),
        eos_id=model.token_to_id(roles.eos),
        special_tokens={name: model.token_to_id(name) for name in names},
        _encode=encode,
        _make_token_bytes=lambda: bytes_of_tokens(content, model, names),
        _make_json=lambda: content,
        _files=files,
    )
