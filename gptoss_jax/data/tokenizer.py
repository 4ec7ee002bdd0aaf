"""Text to token ids and back: `bytes`, `bpe:SIZE`, `file:PATH` and `o200k_harmony` behind one class."""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import tiktoken
import tokenizers

from gptoss_jax.config import require
from gptoss_jax.data.tokenizer_json import END_OF_TEXT, byte_level_json, bytes_of_tokens, settings_files

KINDS = "bytes, bpe:SIZE, file:tokenizer.json or o200k_harmony"
BOS_NAMES = ("<|startoftext|>", "<|begin_of_text|>", "<s>")
EOS_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>")
HARMONY = "o200k_harmony"
NAME_FILE = "tokenizer_name.txt"
# Every id that text or a named special token has. The released embedding has 201088 rows: the rest is unused.
HARMONY_VOCAB_SIZE = 200019
TRAINING_BYTES = 64 << 20

# What the trained tokenizer never merges across. Suits code as well as prose: runs of spaces stay whole, a
# name keeps the space, dot or underscore before it, numbers go three digits at a time.
WORDS = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",  # letters, and one sign or space before them
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+",  # operators and punctuation
        r"\s*[\r\n]+",  # blank lines and the end of a line
        r"\s+(?!\S)",  # spaces, but for one that goes to the word after them
        r"\s+",
    )
)


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A vocabulary. Made by `make_tokenizer` or `load_tokenizer`.

    `name` is the spec, ids run from 0 to `vocab_size` - 1, and a document is stored as bos, its ids, eos.
    `special_tokens` are the ids of the tokens that are no text, bos and eos among them, by name.
    """

    name: str
    vocab_size: int
    bos_id: int
    eos_id: int
    special_tokens: dict[str, int] = dataclasses.field(repr=False)
    _encode: Callable[[list[str]], Sequence[Sequence[int] | np.ndarray]] = dataclasses.field(repr=False)
    _make_token_bytes: Callable[[], list[bytes]] = dataclasses.field(repr=False)
    _make_json: Callable[[], str] = dataclasses.field(repr=False)
    _file: tuple[str, str] = dataclasses.field(repr=False)  # name and content of what `save` writes

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without bos and eos. A special token that it spells is encoded as characters."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text as int32, as from `encode`; works on all cores."""
        return [np.asarray(ids, dtype=np.int32) for ids in self._encode(list(texts))]

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

    @functools.cached_property
    def _token_bytes(self) -> list[bytes]:
        return self._make_token_bytes()

    @property
    def digest(self) -> str:
        """Tells tokenizers apart: those of one digest give the same ids. Two forms of one have two."""
        return hashlib.sha256("\n".join(self._file).encode()).hexdigest()

    def same_ids_as(self, other: "Tokenizer") -> bool:
        """Whether each id stands for the same bytes, or the same special token, in both.

        Then what one has encoded the other decodes, and a model can go from one to the other. How a text is
        cut into tokens plays no part.
        """
        if self.digest == other.digest:
            return True
        ours, theirs = (
            (one.bos_id, one.eos_id, one.special_tokens, one._token_bytes) for one in (self, other)
        )
        return ours == theirs

    def save(self, folder: str | os.PathLike) -> None:
        """Writes `tokenizer.json`, or for a tokenizer that needs none its name to `tokenizer_name.txt`."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        name, content = self._file
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
        folder = pathlib.Path(folder)
        content = self._make_json()
        files = {"tokenizer.json": content} | settings_files(
            content, self.special_tokens, self.bos_id, self.eos_id, model_max_length
        )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            name = folder / NAME_FILE
            taken = name.exists() and (NAME_FILE, name.read_text(encoding="utf-8")) != self._file
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
        return _from_json(spec, _train(int(rest), training_texts()), spec)
    require(kind == "file" and bool(rest), "data.tokenizer", spec, f"must be {KINDS}")
    return _from_file(pathlib.Path(rest).expanduser(), spec)


def load_tokenizer(folder: str | os.PathLike) -> Tokenizer:
    """Reads what `save` or `export` wrote, or the tokenizer.json of a Hugging Face folder.

    Raises ValueError if the folder holds no tokenizer, or a damaged one.
    """
    folder = pathlib.Path(folder)
    name, file = folder / NAME_FILE, folder / "tokenizer.json"
    if name.is_file():
        return make_tokenizer(name.read_text(encoding="utf-8").strip())
    require(file.exists(), "tokenizer folder", str(folder), f"must hold tokenizer.json or {NAME_FILE}")
    return _from_file(file, f"file:{file}")


def _bytes() -> Tokenizer:
    table = [bytes([byte]) for byte in range(256)]
    special = {END_OF_TEXT: 256}
    return Tokenizer(
        name="bytes",
        vocab_size=257,
        bos_id=256,
        eos_id=256,
        special_tokens=special,
        _encode=lambda texts: [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts],
        _make_token_bytes=lambda: [*table, b""],
        _make_json=lambda: byte_level_json(table, special, words=None),
        _file=(NAME_FILE, "bytes\n"),
    )


def _harmony() -> Tokenizer:
    try:
        encoding = tiktoken.get_encoding(HARMONY)
    except (OSError, ValueError) as error:  # the second for a file with the wrong hash
        reason = " ".join(str(error).split())
        allowed = f"tiktoken cannot fetch its file; set TIKTOKEN_CACHE_DIR, see docs/tokenizers.md ({reason})"
        raise ValueError(f"data.tokenizer is {HARMONY!r}: {allowed}") from None

    special: dict[str, int] = {}
    for name in sorted(encoding.special_tokens_set, key=lambda name: ("reserved" in name, name)):
        token = encoding.encode_single_token(name)
        # tiktoken names one id twice, <|endofprompt|> and a reserved one, and goes on to reserve unused rows.
        if token < HARMONY_VOCAB_SIZE and token not in special.values():
            special[name] = token

    def table() -> list[bytes]:
        return [encoding.decode_single_token_bytes(token) for token in range(min(special.values()))]

    return Tokenizer(
        name=HARMONY,
        vocab_size=HARMONY_VOCAB_SIZE,
        bos_id=encoding.encode_single_token("<|startoftext|>"),
        eos_id=encoding.encode_single_token(END_OF_TEXT),
        special_tokens=special,
        _encode=lambda texts: encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1),
        _make_token_bytes=lambda: table() + [b""] * len(special),
        # The pattern has no public name, but tiktoken's own guide to new encodings takes it from there.
        _make_json=lambda: byte_level_json(table(), special, words=encoding._pat_str),
        _file=(NAME_FILE, HARMONY + "\n"),
    )


def _train(size: int, texts: Iterator[str]) -> str:
    """Trains a byte-level BPE vocabulary of at most `size` tokens; returns its tokenizer.json."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated"),
            byte_level(add_prefix_space=False, use_regex=False),
        ]
    )
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(_first_bytes(texts, TRAINING_BYTES), trainer)
    return model.to_str()


def _first_bytes(texts: Iterator[str], room: int) -> Iterator[str]:
    """The first `room` UTF-8 bytes of a stream of texts."""
    for text in texts:
        data = text.encode()[:room]
        yield data.decode(errors="ignore")
        room -= len(data)
        if room == 0:
            return


def _from_file(path: pathlib.Path, spec: str) -> Tokenizer:
    try:
        content = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise ValueError(f"data.tokenizer is {spec!r}: cannot read {path} ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ValueError(f"data.tokenizer is {spec!r}: {path} is not a tokenizer.json (not UTF-8)") from None
    return _from_json(spec, content, str(path))


def _from_json(spec: str, content: str, origin: str) -> Tokenizer:
    try:
        model = tokenizers.Tokenizer.from_str(content)
    except Exception as error:  # the library raises Exception itself for every kind of damage
        reason = " ".join(str(error).split())
        raise ValueError(f"data.tokenizer is {spec!r}: {origin} is not a tokenizer.json ({reason})") from None
    # Training text is plain text of any length, whatever the file was last used for.
    model.encode_special_tokens = True
    model.no_truncation()
    model.no_padding()
    bos = next((name for name in BOS_NAMES if model.token_to_id(name) is not None), None)
    eos = next((name for name in EOS_NAMES if model.token_to_id(name) is not None), None)
    allowed = f"{origin} has none of {', '.join(BOS_NAMES + EOS_NAMES)}"
    require(bos is not None or eos is not None, "data.tokenizer", spec, allowed)
    bos, eos = bos or eos, eos or bos
    special = {token.content: i for i, token in model.get_added_tokens_decoder().items() if token.special}
    special |= {name: model.token_to_id(name) for name in (bos, eos)}

    def encode(texts: list[str]) -> list[list[int]]:
        return [encoded.ids for encoded in model.encode_batch_fast(texts, add_special_tokens=False)]

    return Tokenizer(
        name=spec,
        vocab_size=1 + max(model.get_vocab(with_added_tokens=True).values()),
        bos_id=special[bos],
        eos_id=special[eos],
        special_tokens=special,
        _encode=encode,
        _make_token_bytes=lambda: bytes_of_tokens(model, json.loads(content).get("decoder")),
        _make_json=lambda: content,
        _file=("tokenizer.json", content),
    )
