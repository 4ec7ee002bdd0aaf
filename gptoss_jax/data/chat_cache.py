"""Builds the token cache for conversations, pairs of them, and prompts."""

import collections
import dataclasses
import gzip
import itertools
import json
import lzma
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from gptoss_jax.config import DataConfig, require
from gptoss_jax.config.base import one_line, write_json
from gptoss_jax.config.train import is_preferences, is_prompts
from gptoss_jax.data.chat import Example, make_examples, needs_training
from gptoss_jax.data.chat_messages import TrainMessage, harmony_messages
from gptoss_jax.data.chat_rows import ChatCorpus, RowError, read_conversation
from gptoss_jax.data.harmony import Harmony
from gptoss_jax.data.preference_rows import FORMAT as PAIR_FORMAT
from gptoss_jax.data.preference_rows import history_length, read_pair
from gptoss_jax.data.prompt_rows import FORMAT as PROMPT_FORMAT
from gptoss_jax.data.prompt_rows import read_prompt
from gptoss_jax.data.sources import is_picked, with_next
from gptoss_jax.data.tokenizer import make_tokenizer, token_dtype
from gptoss_jax.status import status

FORMAT = 3
ROWS_AT_ONCE = 1024  # rows encoded together, to use all cores and bound memory
MAX_HELD_OUT_BYTES = 8 << 20
SKIPPED_FILE, ROWS_FILE = "skipped.txt", "rows.jsonl"
SHOWN_ROWS = 10  # maximum number of skipped rows to print


@dataclasses.dataclass(frozen=True)
class Row:
    """A usable row: its location, its format, its messages in Harmony (of a prompt, those before the answer);
    in a pair, those of the rejected conversation; and for prompts, the row as it was read."""

    prefix: str
    number: int
    format: str
    messages: list[TrainMessage]
    rejected: list[TrainMessage] | None = None
    fields: Mapping[str, Any] | None = None

    @property
    def texts(self) -> list[str]:
        return [one.message.text for one in (*self.messages, *(self.rejected or ()))]


def usable_rows(corpus: ChatCorpus, config: DataConfig, skipped: list[tuple[str, RowError]]) -> Iterator[Row]:
    """Yields the usable rows and adds the others to `skipped`, each with its location."""
    for prefix, number, row in corpus.rows():
        try:
            if isinstance(row, RowError):
                raise row
            if is_prompts(corpus.source):
                prompt = read_prompt(row, config.reasoning_effort)
                yield Row(prefix, number, PROMPT_FORMAT, prompt, fields=row)
                continue
            if is_preferences(corpus.source):
                pair = read_pair(row, config.reasoning_effort)
                for side in (pair.chosen, pair.rejected):
                    _check_trained(side[history_length(side) - 1 :], config)
                yield Row(prefix, number, PAIR_FORMAT, pair.chosen, pair.rejected)
                continue
            conversation = read_conversation(row)
            messages = harmony_messages(conversation, config.reasoning_effort)
            _check_trained(messages, config)
            yield Row(prefix, number, conversation.format, messages)
        except RowError as error:
            skipped.append((f"{prefix}{number}", error))
        except RecursionError:
            skipped.append((f"{prefix}{number}", RowError("invalid JSON", "is nested too deeply")))


def _check_trained(messages: list[TrainMessage], config: DataConfig) -> None:
    if not needs_training(messages, config.train_on):
        raise RowError("nothing to train on", f"has no token to train on ({config.train_on})")


def _examples(harmony: Harmony, rows: list[Row], config: DataConfig) -> list[list[Example]]:
    """Returns the examples of each row: of every turn; in a pair, the last turns of both conversations; of a
    prompt, its tokens up to the answer, with nothing to train on."""
    if is_prompts(config.source):
        return [[_prompt(harmony.render([one.message for one in row.messages]))] for row in rows]
    sides = [[row.messages] if row.rejected is None else [row.messages, row.rejected] for row in rows]
    made = iter(make_examples(harmony, [side for some in sides for side in some], config.train_on))
    return [next(made) if row.rejected is None else [next(made)[-1], next(made)[-1]] for row in rows]


def _prompt(tokens: list[int]) -> Example:
    return Example(np.array(tokens, np.int32), np.zeros(len(tokens), np.uint8), turn=1, has_thinking=False)


def _read(
    corpus: ChatCorpus, config: DataConfig, skipped: list[tuple[str, RowError]]
) -> Iterator[tuple[Row, bool]]:
    """Yields (row, is_held_out) for the usable rows, deterministically, and adds the others to `skipped`.

    At least one row is held out and one is not. Raises ValueError if there are fewer than two.
    """
    index, held_bytes = -1, 0
    for index, (row, following) in enumerate(with_next(usable_rows(corpus, config, skipped))):
        is_last = following is None
        picked = is_picked(index, config.val_fraction) or (is_last and not held_bytes)
        size = sum(len(text.encode()) for text in row.texts)
        picked = picked and (not held_bytes or held_bytes + size <= MAX_HELD_OUT_BYTES)
        held_bytes += size if picked else 0
        if not (index == 0 and is_last):
            yield row, picked
    if index < 1:
        first = f"; {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
        allowed = f"has {index + 1} rows that can be used, needs two, one to be held out{first}"
        require(False, "data.source", corpus.source, allowed)


def _write_skipped(folder: pathlib.Path, skipped: list[tuple[str, RowError]]) -> list[str]:
    """Writes the list of the rows that are left out, if any, and returns its lines."""
    lines = [f"{where}: {one_line(error)}" for where, error in skipped]
    if lines:
        # File names may have bytes that are not UTF-8.
        data = "".join(line + "\n" for line in lines).encode("utf-8", "surrogateescape")
        (folder / SKIPPED_FILE).write_bytes(data)
    return lines


def _json_line(row: Row) -> bytes:
    """Returns the fields of a prompt's row, for reward functions; empty for others."""
    return b"" if row.fields is None else (json.dumps(row.fields, default=str) + "\n").encode()


def _compression(data: bytes) -> dict[str, float]:
    """Returns the size of the held-out text, and of what compressors make of it."""
    return {
        "held_out_bytes": len(data),
        "gzip_bits_per_byte": 8 * len(gzip.compress(data, 9)) / max(len(data), 1),
        "xz_bits_per_byte": 8 * len(lzma.compress(data, preset=9)) / max(len(data), 1),
    }


def build_chat(
    config: DataConfig, corpus: ChatCorpus, folder: pathlib.Path, report: Callable[[str], None]
) -> None:
    """Writes a cache of examples to an empty folder. The examples of a row are held out together."""
    report(f"Rendering {config.source} with {config.tokenizer} (cached in {folder.parent})")
    tokenizer = make_tokenizer(
        config.tokenizer,
        lambda: (text for row, is_held in _read(corpus, config, []) if not is_held for text in row.texts),
    )
    harmony = Harmony(tokenizer)
    tokenizer.save(folder)
    skipped: list[tuple[str, RowError]] = []
    rows = _read(corpus, config, skipped)
    prefixes: dict[str, int] = {}
    formats: collections.Counter[str] = collections.Counter()
    lengths, flags, origins, held_out_text, row_lengths = [], [], [], [], []
    counts = collections.Counter(
        trained_tokens=0, held_out_trained_tokens=0, with_thinking=0, left_out_calls=0
    )
    with (
        open(folder / "tokens.bin", "wb") as tokens,
        open(folder / "weights.bin", "wb") as weights,
        open(folder / ROWS_FILE, "wb") as fields,
        status("rendering") as shown,
    ):
        while group := list(itertools.islice(rows, ROWS_AT_ONCE)):
            examples = _examples(harmony, [row for row, _ in group], config)
            for (row, is_held_out), some in zip(group, examples, strict=True):
                formats[row.format] += 1
                counts["left_out_calls"] += sum(one.left_out_calls for one in row.messages)
                file = prefixes.setdefault(row.prefix, len(prefixes))
                row_lengths.append(fields.write(_json_line(row)))
                for example in some:
                    tokens.write(example.tokens.astype(token_dtype(tokenizer.vocab_size)).tobytes())
                    weights.write(example.weights.tobytes())
                    lengths.append(len(example.tokens))
                    flags.append(is_held_out)
                    origins.append((file, row.number, example.turn))
                    trained = int(example.weights.sum())
                    counts["trained_tokens"] += trained
                    counts["held_out_trained_tokens"] += trained * is_held_out
                    counts["with_thinking"] += example.has_thinking
                    if is_held_out:
                        held_out_text.append(tokenizer.decode_bytes(example.tokens[example.weights > 0]))
            shown.update(f"{sum(lengths):,} tokens of {len(lengths):,} examples")
    report(f"  {sum(lengths):,} tokens of {len(lengths):,} examples")
    corpus.check_unchanged()
    lines = _write_skipped(folder, skipped)
    lengths_D, flags_D = np.array(lengths, np.int64), np.array(flags, bool)
    np.savez(
        folder / "documents.npz",
        offsets=np.concatenate([[0], np.cumsum(lengths_D)]),
        held_out=flags_D,
        origins=np.array(origins, np.int64),
        row_offsets=np.concatenate([[0], np.cumsum(row_lengths, dtype=np.int64)]),
    )
    meta = {
        "format": FORMAT,
        "source": config.source,
        "tokenizer": config.tokenizer,
        "vocab_size": tokenizer.vocab_size,
        "documents": len(flags),
        "tokens": int(lengths_D.sum()),
        "held_out_documents": int(flags_D.sum()),
        "held_out_tokens": int(lengths_D[flags_D].sum()),
        **_compression(b"".join(held_out_text)),
        "pairs": is_preferences(config.source),
        "prompts": is_prompts(config.source),
        "chat": {
            "rows": sum(formats.values()) + len(skipped),
            "formats": dict(formats),
            "skipped": dict(collections.Counter(error.kind for _, error in skipped)),
            "first_skipped": lines[:SHOWN_ROWS],
            "files": list(prefixes),
            **counts,
        },
    }
    write_json(folder / "meta.json", meta)
