"""Loss, perplexity and bits per byte over text of any length, in windows that slide over each document.

A document is what training makes of it: bos, its tokens, eos. Every token but bos is predicted exactly once,
eos too, and none of its predictions sees another document. Loss is the mean over these tokens; bits per byte
is their sum over the UTF-8 bytes of the text. So with windows of `data.seq_len` that do not overlap, the
numbers are those of training's evaluations of the same text.
"""

import collections
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from gptoss_jax.config import ModelConfig, require
from gptoss_jax.data.packing import pack
from gptoss_jax.data.sources import Corpus
from gptoss_jax.data.token_cache import encode_documents, group_documents
from gptoss_jax.data.tokenizer import Tokenizer
from gptoss_jax.evaluation.logprobs import Batch, batch_rows, token_logprobs
from gptoss_jax.training.losses import bits_per_byte

# Tokens of a window, where the model takes as many and nobody asks for others.
CONTEXT = 2048


@dataclasses.dataclass(frozen=True)
class TextScore:
    """The result of an evaluation."""

    loss: float  # nats per token
    perplexity: float
    bits_per_byte: float
    documents: int
    null_records: int  # skipped, because their field is null
    # Tokens that were predicted, and UTF-8 bytes of their text.
    tokens: int
    bytes: int
    context: int
    stride: int
    batch_size: int
    # Without those of compiling.
    seconds: float
    compile_seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@dataclasses.dataclass(frozen=True)
class TextSettings:
    """How text is read; what is None is chosen for the model.

    Raises ValueError for a setting outside its range.
    """

    # Tokens that the model sees at once. Default: `CONTEXT`, or all it takes if that is fewer.
    context: int | None = None
    # Tokens that a window is ahead of the one before it. Default: half the context.
    stride: int | None = None
    # Windows in one call of the model. Default: as many as have 16,384 tokens.
    batch_size: int | None = None
    # Tokens to predict at most; None: all there are.
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("context", 2), ("stride", 1), ("batch_size", 1), ("max_tokens", 1)):
            value = getattr(self, name)
            require(value is None or value >= least, name, value, f"must be {least} or more")
        if self.context is not None and self.stride is not None:
            self._check_stride()

    def _check_stride(self) -> None:
        allowed = f"must be at most the context, {self.context}"
        require(self.stride <= self.context, "stride", self.stride, allowed)

    def chosen_for(self, config: ModelConfig) -> "TextSettings":
        """The settings with the defaults filled in. Raises ValueError for a context that is too long."""
        limit = config.max_position_embeddings
        context = min(CONTEXT, limit) if self.context is None else self.context
        allowed = f"must be at most the model's max_position_embeddings, {limit}"
        require(context <= limit, "context", context, allowed)
        chosen = dataclasses.replace(
            self,
            context=context,
            stride=self.stride or context // 2,
            batch_size=self.batch_size or batch_rows(context),
        )
        chosen._check_stride()
        return chosen

    def windows(self, pairs: int) -> np.ndarray:
        """Where a document of so many (input, target) pairs is read: int64 [windows, 3].

        A row has a window's first pair, its pairs, and how many of these, the last, are scored. The first
        window scores all of its pairs; each of the others has context - stride of them in front of those.
        """
        count = 1 + -(-max(pairs - self.context, 0) // self.stride)
        start = np.arange(count) * self.stride
        length = np.minimum(self.context, pairs - start)
        scored = np.where(start > 0, length - (self.context - self.stride), length)
        return np.stack([start, length, scored], axis=1)


def evaluate_text(
    config: ModelConfig,
    params: dict,
    tokenizer: Tokenizer,
    corpus: Corpus,
    settings: TextSettings = TextSettings(),  # noqa: B008 (it is frozen)
    show: Callable[[int, int | None, float], None] = lambda done, total, loss: None,
) -> TextScore:
    """Reads a corpus and says how well the model predicts it. Memory does not grow with the text's length.

    Args:
      show: gets the tokens done, those of all text (None while that is not known), and the loss so far.

    Raises ValueError for settings that do not fit the model, text that cannot be read, a corpus without text,
    and tokens that the model does not know.
    """
    chosen = settings.chosen_for(config)
    began, compile_seconds, score = time.monotonic(), 0.0, None
    nats, done, documents, total, size = 0.0, 0, 0, 0, 0
    skipped = collections.Counter()
    groups = itertools.chain(_groups(tokenizer, corpus.documents(skipped), chosen.max_tokens), (None,))
    # One group ahead, to know the number of tokens before the last of them.
    for group, following in itertools.pairwise(groups):
        documents += len(group)
        total += sum(len(tokens) - 1 for tokens, _ in group)
        size += sum(count for _, count in group)
        if score is None:
            # A text of few windows does not need a whole batch.
            count = sum(len(chosen.windows(len(tokens) - 1)) for tokens, _ in group)
            chosen = dataclasses.replace(chosen, batch_size=min(chosen.batch_size, count))
        for batch, scored_BT in _batches([tokens for tokens, _ in group], chosen):
            top = int(batch["tokens"].max())
            allowed = f"must be below the model's vocab_size, {config.vocab_size}"
            require(top < config.vocab_size, "token id", top, allowed)
            if score is None:
                compiling = time.monotonic()
                score = token_logprobs.lower(config, params, batch).compile()
                compile_seconds = time.monotonic() - compiling
            log_probs_BT, _ = score(params, batch)
            nats -= np.sum(np.asarray(log_probs_BT)[scored_BT], dtype=np.float64)
            done += int(np.count_nonzero(scored_BT))
            show(done, total if following is None else None, nats / done)
    loss = float(nats / done)
    return TextScore(
        loss=loss,
        # The largest exponent whose power is finite is 709.
        perplexity=math.exp(loss) if not loss > 709 else math.inf,
        # The first tokens of a document that was cut may stand for no bytes.
        bits_per_byte=bits_per_byte(float(nats), size) if size else math.nan,
        documents=documents,
        null_records=skipped["null"],
        tokens=done,
        bytes=size,
        context=chosen.context,
        stride=chosen.stride,
        batch_size=chosen.batch_size,
        seconds=time.monotonic() - began - compile_seconds,
        compile_seconds=compile_seconds,
    )


def _groups(
    tokenizer: Tokenizer, documents: Iterable[str], max_tokens: int | None
) -> Iterator[list[tuple[np.ndarray, int]]]:
    """The stored tokens of documents, with the bytes of their texts, some megabytes at a time."""
    left = math.inf if max_tokens is None else max_tokens
    for batch in group_documents((text, False) for text in documents):
        texts, group = [text for text, _ in batch], []
        for text, tokens in zip(texts, encode_documents(tokenizer, texts), strict=True):
            size = len(text.encode())
            if len(tokens) - 1 > left:
                tokens = tokens[: left + 1]
                size = len(tokenizer.decode_bytes(tokens[1:]))
            group.append((tokens, size))
            left -= len(tokens) - 1
            if left == 0:
                yield group
                return
        yield group


def _batches(documents: list[np.ndarray], settings: TextSettings) -> Iterator[tuple[Batch, np.ndarray]]:
    """The documents' windows in batches, and which positions are scored, bool [B, T].

    Windows that are short share a row, as segments of their own.
    """
    found, first = [], 0
    for tokens in documents:
        found.append(settings.windows(len(tokens) - 1) + [first, 0, 0])
        first += len(tokens)
    start, length, scored = np.concatenate(found).T
    stored = np.concatenate(documents)
    plan = pack(length, settings.context)
    rows = len(plan.row_offsets) - 1
    for first_row in range(0, rows, settings.batch_size):
        shape = settings.batch_size, settings.context
        batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "segment_ids")}
        scored_BT = np.zeros(shape, bool)
        for b, row in enumerate(range(first_row, min(first_row + settings.batch_size, rows))):
            end = 0
            pieces = plan.document[plan.row_offsets[row] : plan.row_offsets[row + 1]]
            for segment, window in enumerate(pieces, 1):
                begin, end = end, end + length[window]
                part = stored[start[window] : start[window] + length[window] + 1]
                batch["tokens"][b, begin:end] = part[:-1]
                batch["targets"][b, begin:end] = part[1:]
                batch["segment_ids"][b, begin:end] = segment
                scored_BT[b, end - scored[window] : end] = True
        yield batch, scored_BT
