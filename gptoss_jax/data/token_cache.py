"""The tokenized corpus: built once on disk, then memory-mapped."""

import collections
import dataclasses
import gzip
import hashlib
import itertools
import json
import lzma
import os
import pathlib
import re
import shutil
import socket
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from gptoss_jax.config import DataConfig, require
from gptoss_jax.config.base import read_json, write_json
from gptoss_jax.config.paths import cache_root, user_path
from gptoss_jax.data.chat_cache import FORMAT as CHAT_FORMAT
from gptoss_jax.data.chat_cache import ROWS_FILE, SKIPPED_FILE, build_chat
from gptoss_jax.data.chat_rows import ChatCorpus, is_chat_source, open_chat
from gptoss_jax.data.sources import Corpus, Source, open_corpus, split
from gptoss_jax.data.tokenizer import Tokenizer, fingerprint, load_tokenizer, make_tokenizer, token_dtype
from gptoss_jax.interrupts import cleanup
from gptoss_jax.status import status

FORMAT = 3
BATCH_CHARS = 4 << 20
# Longer documents are encoded in chunks, to use all cores and bound memory.
CHUNK_CHARS = 1 << 18


@dataclasses.dataclass(frozen=True, eq=False)
class TokenCache:
    """A tokenized corpus on disk. Document i is `tokens[offsets[i] : offsets[i + 1]]`, with bos and eos.

    In a corpus of conversations, a document is an example (`chat.py`) in Harmony format, without bos and eos.
    """

    folder: pathlib.Path
    # source, tokenizer, vocab_size, documents, tokens, held_out_{documents,tokens,bytes}, null_records
    # (skipped), and {gzip,xz}_bits_per_byte of the compressed held-out text. For conversations, also chat
    # (see `build_chat`), and held-out text means the trained tokens.
    meta: dict[str, Any]
    tokenizer: Tokenizer
    tokens: np.ndarray  # memory-mapped, uint16 or uint32
    offsets: np.ndarray  # int64 [documents + 1]
    held_out: np.ndarray  # bool [documents]
    # For conversations: 1 for each token to train on, uint8, memory-mapped; file, row and turn of each
    # example, int64 [documents, 3].
    weights: np.ndarray | None = None
    origins: np.ndarray | None = None
    # For pairs: log p of each token according to the reference model, float32, memory-mapped; see
    # `training/reference.py`.
    reference: np.ndarray | None = None
    # For prompts: where the JSON of each row begins in the file of rows, int64 [documents + 1].
    row_offsets: np.ndarray | None = None

    @property
    def is_pairs(self) -> bool:
        """True if documents 2i and 2i + 1 are the chosen and the rejected answer of pair i."""
        return self.meta.get("pairs", False)

    @property
    def is_prompts(self) -> bool:
        """True if documents are prompts, up to the answer."""
        return self.meta.get("prompts", False)

    def row(self, document: int) -> dict[str, Any]:
        """Returns the row that a prompt comes from."""
        assert self.row_offsets is not None, "not a cache of prompts"
        start, end = self.row_offsets[document : document + 2].tolist()
        with open(self.folder / ROWS_FILE, "rb") as file:
            file.seek(start)
            return json.loads(file.read(end - start))

    def where(self, document: int) -> str:
        """Returns the location of a document, such as `a.jsonl:17 turn 2`."""
        if self.origins is None:
            return f"document {document}"
        file, row, turn = self.origins[document].tolist()
        part = (" chosen", " rejected")[document % 2] if self.is_pairs else f" turn {turn}"
        return f"{self.meta['chat']['files'][file]}{row}{'' if self.is_prompts else part}"


def build_cache(config: DataConfig, report: Callable[[str], None] | None = None) -> TokenCache:
    """Tokenizes the source, or opens the cache of an earlier call in `config.cache_dir`.

    Several processes may build the same cache at once; all use the one that is finished first. A killed build
    is never used, and the next build removes it.

    Args:
      config: source, tokenizer, val_fraction and cache_dir (None: `cache_root()`) are used and, for
        conversations, train_on, invalid_rows and reasoning_effort.
      report: called with progress messages during a build.

    Raises ValueError if the source or tokenizer cannot be read, if the folder cannot be written, and for
    unusable rows if `config.invalid_rows` is "fail".
    """
    corpus: ChatCorpus | Corpus
    if is_chat_source(config.source):
        corpus = open_chat(config.source)
        build: Callable[..., None] = build_chat
    else:
        corpus = open_corpus(config.source)
        build = _build
    given = config.cache_dir
    root = cache_root("data.cache_dir") if given is None else user_path(given, "data.cache_dir")
    folder = root / _key(config, corpus)
    if not folder.exists():
        partial = root / f".partial-{os.getpid()}-{uuid.uuid4().hex}@{socket.gethostname()}"
        with cleanup(partial):
            try:
                partial.mkdir(parents=True)
            except OSError as error:
                raise ValueError(f"data.cache_dir is {str(root)!r}: {error.strerror}") from None
            _remove_stale_builds(root)
            try:
                build(config, corpus, partial, report or (lambda line: None))
                try:
                    partial.rename(folder)
                except OSError:
                    if not folder.exists():
                        raise
                    # Another process finished first; its cache is identical.
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    cache = _open(folder)
    chat = cache.meta.get("chat", {})
    if chat.get("skipped") and config.invalid_rows == "fail":
        count = f"{sum(chat['skipped'].values()):,} of {chat['rows']:,} rows"
        allowed = f"{count} cannot be used, listed in {folder / SKIPPED_FILE}; {chat['first_skipped'][0]}"
        require(False, "data.invalid_rows", config.invalid_rows, allowed)
    return cache


def _key(config: DataConfig, corpus: Source) -> str:
    """Returns the folder name of a cache: readable words, and a hash of everything its content depends on."""
    parts = [str(FORMAT), corpus.fingerprint, config.tokenizer, repr(float(config.val_fraction))]
    if config.tokenizer.startswith("file:"):
        parts += fingerprint(config.tokenizer)
    elif config.tokenizer.startswith("bpe:"):
        parts.append("with Harmony's special tokens")  # since they were added
    if is_chat_source(config.source):
        parts += [f"chat {CHAT_FORMAT}", config.train_on, config.reasoning_effort]
    words = re.sub(r"[^a-z0-9]+", "-", f"{config.source} {config.tokenizer}".lower()).strip("-")
    # File names may have bytes that are not UTF-8.
    digest = hashlib.sha256("\n\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()
    return f"{words[-48:].strip('-')}-{digest[:16]}"


def _remove_stale_builds(root: pathlib.Path) -> None:
    """Removes partial caches left by dead processes on this host."""
    for path in root.glob(f".partial-*@{socket.gethostname()}"):
        try:
            os.kill(int(path.name.split("-")[1]), 0)
        except ProcessLookupError:
            shutil.rmtree(path, ignore_errors=True)
        except PermissionError:
            pass  # alive, and another user's


def _chunks(text: str) -> Iterator[str]:
    """Splits a long text before unindented lines, which tokens rarely cross."""
    start = 0
    while len(text) - start > CHUNK_CHARS:
        cut = start + CHUNK_CHARS
        while (cut := text.rfind("\n", start, cut - 1) + 1) > start and text[cut].isspace():
            pass
        cut = cut if cut > start else start + CHUNK_CHARS
        yield text[start:cut]
        start = cut
    yield text[start:]


def group_documents(documents: Iterable[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    """Groups documents into batches of about `BATCH_CHARS` characters, to use all cores and bound memory."""
    batch, size = [], 0
    for text, is_held_out in documents:
        batch.append((text, is_held_out))
        size += len(text)
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_documents(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[np.ndarray]:
    """Yields the stored tokens of each document: bos, text, eos."""
    chunks = [list(_chunks(text)) for text in texts]
    encoded = iter(tokenizer.encode_batch(list(itertools.chain.from_iterable(chunks))))
    for of_document in chunks:
        middle = itertools.islice(encoded, len(of_document))
        ids: list[Any] = [[tokenizer.bos_id], *middle, [tokenizer.eos_id]]
        stored: np.ndarray = np.concatenate(ids)
        top = int(stored.max())
        require(top < tokenizer.vocab_size, "token id", top, f"must be below {tokenizer.vocab_size}")
        yield stored


def _build(config: DataConfig, corpus: Corpus, folder: pathlib.Path, report: Callable[[str], None]) -> None:
    """Writes a cache to an empty folder."""

    def documents(skipped: collections.Counter[str] | None = None) -> Iterator[tuple[str, bool]]:
        return split(corpus.documents(skipped), config.val_fraction, source=config.source)

    report(f"Tokenizing {config.source} with {config.tokenizer} (cached in {folder.parent})")
    with status("training the tokenizer" if config.tokenizer.startswith("bpe:") else "opening the tokenizer"):
        tokenizer = make_tokenizer(
            config.tokenizer, lambda: (text for text, is_held in documents() if not is_held)
        )
    tokenizer.save(folder)
    lengths, flags, held_out_text, written = [], [], [], 0
    skipped: collections.Counter[str] = collections.Counter()
    with open(folder / "tokens.bin", "wb") as file, status("tokenizing") as shown:
        for batch in group_documents(documents(skipped)):
            stored_tokens = encode_documents(tokenizer, (text for text, _ in batch))
            for (text, is_held_out), stored in zip(batch, stored_tokens, strict=True):
                file.write(stored.astype(token_dtype(tokenizer.vocab_size)).tobytes())
                lengths.append(len(stored))
                flags.append(is_held_out)
                if is_held_out:
                    held_out_text.append(text.encode())
            written += sum(lengths[-len(batch) :])
            shown.update(f"{written:,} tokens of {len(lengths):,} documents")
    report(f"  {written:,} tokens of {len(lengths):,} documents")
    corpus.check_unchanged()
    if skipped["null"]:
        report(f"  {skipped['null']:,} records were skipped: their field is null")
    lengths_D, flags_D = np.array(lengths, np.int64), np.array(flags, bool)
    offsets = np.concatenate([[0], np.cumsum(lengths_D)])
    np.savez(folder / "documents.npz", offsets=offsets, held_out=flags_D)
    data = b"".join(held_out_text)
    with status("compressing the held-out text, to compare with"):
        sizes = {"gzip": len(gzip.compress(data, 9)), "xz": len(lzma.compress(data, preset=9))}
    meta = {
        "format": FORMAT,
        "source": config.source,
        "tokenizer": config.tokenizer,
        "vocab_size": tokenizer.vocab_size,
        "documents": len(flags),
        "tokens": int(offsets[-1]),
        "null_records": skipped["null"],
        "held_out_documents": int(flags_D.sum()),
        "held_out_tokens": int(lengths_D[flags_D].sum()),
        "held_out_bytes": len(data),
    } | {f"{name}_bits_per_byte": 8 * size / len(data) for name, size in sizes.items()}
    write_json(folder / "meta.json", meta)


def _open(folder: pathlib.Path) -> TokenCache:
    meta = read_json(folder / "meta.json", "; remove the folder")
    dtype = token_dtype(meta["vocab_size"])

    def memory_map(name: str, dtype: np.dtype) -> np.ndarray:
        size = (folder / name).stat().st_size
        if size != meta["tokens"] * dtype.itemsize:
            raise ValueError(f"{folder}: damaged ({name} has {size} bytes); remove the folder")
        return np.memmap(folder / name, dtype, mode="r")

    tokens = memory_map("tokens.bin", dtype)
    weights = memory_map("weights.bin", np.dtype(np.uint8)) if "chat" in meta else None
    with np.load(folder / "documents.npz") as arrays:
        names = ("offsets", "held_out", "origins", "row_offsets")
        documents = {name: arrays[name] for name in names if name in arrays}
    return TokenCache(folder, meta, load_tokenizer(folder), tokens, weights=weights, **documents)
