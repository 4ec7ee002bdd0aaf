"""`gptoss inspect-data`."""

import codecs
import dataclasses
import json
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Annotated, Any

import tyro

from gptoss_jax.cli.arguments import JsonFile, OptionalInt
from gptoss_jax.config import require
from gptoss_jax.status import erase, status

if TYPE_CHECKING:
    import numpy as np
    import rich.text

    from gptoss_jax.config import DataConfig, TrainConfig
    from gptoss_jax.data.token_cache import TokenCache
    from gptoss_jax.data.tokenizer import Tokenizer

TRAINED, UNTRAINED = "bold green", "dim"
LENGTHS = {"0": "shortest", "0.5": "median", "0.95": "95th percentile", "1": "longest"}


@dataclasses.dataclass(frozen=True)
class InspectData:
    """Show the tokens that a run trains on, and statistics of the dataset.

    Tokens are separated by vertical bars. Those that the loss is computed on are in brackets and, in a
    terminal, in color. Flags of gptoss train, such as --data.source stdlib, change the config.

    Examples:
      gptoss inspect-data quickstart --examples 1
      gptoss inspect-data sft_qlora_20b --data.source 'chat:data/*.jsonl'
      gptoss inspect-data quickstart_sft --held-out --json tokens.jsonl
    """

    # Preset: its name, such as quickstart_sft, or a Python file.
    config: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]
    # Number of examples to show.
    examples: int = 3
    # Index of the first example to show, counted from 0.
    first: int = 0
    # Show held-out examples instead of training examples.
    held_out: tyro.conf.FlagCreatePairsOff[bool] = False
    # Steps of the run, to count epochs. (default: those of the preset)
    steps: OptionalInt = None
    # Write all examples to this file as JSON lines with the fields where, held_out, used_tokens (0 if the
    # example is skipped), tokens, and loss_weights (one per token, for predicting it).
    json_file: JsonFile = None
    # Override a field of the config. `--data.seq-len 256` is short for `--set data.seq-len=256`.
    overrides: Annotated[
        tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(name="set", metavar="FLAG=VALUE")
    ] = ()

    def run(self) -> None:
        import sys

        import numpy as np
        from rich.console import Console

        from gptoss_jax.config.paths import output_file, replace_file
        from gptoss_jax.config.preset import flags_of, read_preset
        from gptoss_jax.data.token_cache import build_cache
        from gptoss_jax.terminal import encodable, printable

        def report(line: str) -> None:
            erase()
            print(line, file=sys.stderr, flush=True)

        for name in ("examples", "first"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "must be 0 or more")
        overrides = self.overrides if self.steps is None else (*self.overrides, f"steps={self.steps}")
        config = read_preset(self.config, flags_of(overrides), prog="gptoss inspect-data CONFIG")
        path = None if self.json_file is None else output_file(self.json_file, "--json")
        with status("opening the dataset"):
            cache = build_cache(config.data, report)
        # Paths and roles may look like markup.
        console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
        for line in statistics_lines(cache, config):
            console.print(encodable(printable(line), console.file))
        available = np.flatnonzero(cache.held_out == self.held_out)
        chosen = available[self.first :][: self.examples]
        noun = "documents" if cache.weights is None else "prompts" if cache.is_prompts else "examples"
        which = f"{self.first:,} to {self.first + len(chosen) - 1:,}" if len(chosen) else "none"
        asked = "" if len(chosen) else f" (--first {self.first}, --examples {self.examples})"
        kind = "held-out" if self.held_out else "training"
        console.print(f"shown: {which} of {len(available):,} {kind} {noun}, numbered from 0{asked}")
        for document in chosen.tolist():
            tokens, weights = example(cache, document)
            trained = "" if cache.is_prompts else f", {weights.sum():,} trained"
            line = f"\n{cache.where(document)}: {len(tokens):,} tokens{trained}"
            console.print(encodable(printable(line), console.file))
            console.print(spelled(cache.tokenizer, tokens, weights, console.file))
        if path is not None:
            with replace_file(path, "--json") as file:
                file.writelines(json.dumps(record) + "\n" for record in records(cache, config.data))


def example(cache: "TokenCache", document: int) -> "tuple[np.ndarray, np.ndarray]":
    """Returns the tokens of a document and their weights, uint8 [n]; of a text, all but the first are 1."""
    import numpy as np

    place = slice(cache.offsets[document], cache.offsets[document + 1])
    tokens = cache.tokens[place]
    weights = np.arange(len(tokens)) > 0 if cache.weights is None else cache.weights[place]
    return tokens, weights.astype(np.uint8)


def spelled(
    tokenizer: "Tokenizer", tokens: "np.ndarray", weights: "np.ndarray", file: IO[str]
) -> "rich.text.Text":
    """Returns the text of tokens: separated, with those that are trained on in brackets and in color.

    Tokens that make up a character only together are shown as one. Bytes that are no character are escaped,
    and so are control characters.
    """
    from rich.text import Text

    from gptoss_jax.terminal import encodable, printable

    signs = "⟦⟧│↵"
    left, right, line, newline = tuple(signs) if encodable(signs, file) == signs else ("[[", "]]", "|", "\\n")
    text, before = Text(), 0
    for index, (written, weight) in enumerate(_cells(tokenizer, tokens, weights)):
        separator = (right if before else left) if bool(weight) != bool(before) else line if index else ""
        text.append(separator)
        shown = encodable(printable(written).replace("\n", f"{newline}\n"), file)
        text.append(shown, TRAINED if weight else UNTRAINED)
        before = weight
    return text.append(right if before else "")


def _cells(tokenizer: "Tokenizer", tokens: "np.ndarray", weights: "np.ndarray") -> Iterator[tuple[str, int]]:
    """Yields the text and weight of each token, or of several with the same weight that share a character."""
    names = {token: name for name, token in tokenizer.special_tokens.items()}
    pending: list[bytes] = []  # tokens' bytes that end within a character
    before = 0  # their weight

    def flush() -> Iterator[tuple[str, int]]:
        yield from ((data.decode(errors="backslashreplace"), before) for data in pending)
        pending.clear()

    for token, weight in zip(tokens.tolist(), weights.tolist(), strict=True):
        if token in names or weight != before:
            yield from flush()
        before = weight
        if token in names:
            yield names[token], weight
            continue
        pending.append(tokenizer.decode_bytes([token]))
        try:
            decoder = codecs.getincrementaldecoder("utf-8")()
            written = decoder.decode(b"".join(pending))
        except UnicodeDecodeError:
            yield from flush()
            continue
        if not decoder.getstate()[0]:
            pending.clear()
            yield written, weight
    yield from flush()


def statistics_lines(cache: "TokenCache", config: "TrainConfig") -> Iterator[str]:
    """Yields the statistics, for the console."""
    import numpy as np

    from gptoss_jax.data.batches import PackedRows
    from gptoss_jax.data.chat_statistics import statistics, summary
    from gptoss_jax.data.epochs import describe_epochs

    meta, data = cache.meta, config.data
    if cache.weights is None:
        yield f"documents: {meta['documents']:,}, {meta['held_out_documents']:,} of them held out"
        yield f"tokens: {meta['tokens']:,}; records without text: {meta['null_records']:,}"
    else:
        yield from summary(cache, data)
        lengths = statistics(cache, data)["lengths"]
        what = "a prompt" if cache.is_prompts else "an example"
        yield f"tokens of {what}: " + ", ".join(f"{LENGTHS[q]} {lengths[q]:,}" for q in LENGTHS)
    if not cache.is_prompts:
        plan = PackedRows(cache, False, data.seq_len, data.overlong).plan
        rows = len(plan.row_offsets) - 1
        share = np.sum(plan.length) / (rows * data.seq_len)
        yield f"training rows: {rows:,} of {data.seq_len:,} tokens, {share:.1%} full"
    yield from describe_epochs(config, cache)


def records(cache: "TokenCache", data: "DataConfig") -> Iterator[dict[str, Any]]:
    """Yields each document, JSON-ready. `used_tokens` is 0 for an example that is left out."""
    from gptoss_jax.data.batches import packed_lengths

    pairs = packed_lengths(cache, data.seq_len, data.overlong)
    for document, used in enumerate(pairs.tolist()):
        tokens, weights = example(cache, document)
        yield {
            "where": cache.where(document),
            "held_out": bool(cache.held_out[document]),
            "used_tokens": used + 1 if used else 0,
            "tokens": tokens.tolist(),
            "loss_weights": weights.tolist(),
        }
