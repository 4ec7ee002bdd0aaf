"""Loss, perplexity and bits per byte on text, with sliding windows over each document.

A document is tokenized as in training: bos, its tokens, eos. Every token except bos, including eos, is
predicted exactly once, using only context from its own document. The loss is the mean over these tokens; bits
per byte is their sum divided by the UTF-8 bytes of the text. Windows of `data.seq_len` without overlap give
the loss that training reports for the same text.
"""

import collections
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from gptoss_jax.config import ModelConfig, require
from gptoss_jax.config.base import ConfigBase
from gptoss_jax.data.batches import BATCH_FIELDS, Batch
from gptoss_jax.data.packing import pack
from gptoss_jax.data.sources import Corpus, with_next
from gptoss_jax.data.token_cache import encode_documents, group_documents
from gptoss_jax.data.tokenizer import Tokenizer
from gptoss_jax.evaluation.logprobs import batch_rows, split_rows
from gptoss_jax.model.transformer import Transformer, get_params
from gptoss_jax.training.losses import bits_per_byte
from gptoss_jax.training.step import make_eval_step

# Default window length in tokens, unless the model's context is smaller.
DEFAULT_CONTEXT = 2048


@dataclasses.dataclass(frozen=True)
class TextScore:
    """The result of an evaluation."""

    loss: float  # nats per token
    perplexity: float
    bits_per_byte: float
    documents: int
    null_records: int  # skipped, because their field is null
    tokens: int  # that were predicted
    bytes: int  # UTF-8 bytes of their text
    context: int
    stride: int
    batch_size: int
    seconds: float  # without compiling
    compile_seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@dataclasses.dataclass(frozen=True)
class TextSettings(ConfigBase):
    """Window settings for evaluating text. Raises ValueError for a value out of range."""

    # Window length in tokens. Default: DEFAULT_CONTEXT, or the model's context if smaller.
    context: int | None = None
    # Tokens between the starts of two windows. Default: half the context.
    stride: int | None = None
    # Rows per forward pass. Default: 16,384 tokens per batch.
    batch_size: int | None = None
    # Predict at most this many tokens. Default: all.
    max_tokens: int | None = None

    def _check(self) -> None:
        for name, least in (("context", 2), ("stride", 1), ("batch_size", 1), ("max_tokens", 1)):
            value = getattr(self, name)
            self._require(value is None or value >= least, name, f"must be {least} or more")
        if self.context and self.stride:
            fits = self.stride <= self.context
            self._require(fits, "stride", f"must be at most the context, {self.context}")

    def resolve(self, config: ModelConfig) -> "ResolvedTextSettings":
        """Fills in the defaults. Raises ValueError for a context longer than the model's."""
        limit = config.max_position_embeddings
        context = min(DEFAULT_CONTEXT, limit) if self.context is None else self.context
        allowed = f"must be at most the model's max_position_embeddings, {limit}"
        require(context <= limit, "context", context, allowed)
        return ResolvedTextSettings(
            context=context,
            stride=self.stride or context // 2,
            batch_size=self.batch_size or batch_rows(context),
            max_tokens=self.max_tokens,
        )

    def windows(self, num_targets: int) -> np.ndarray:
        """Returns windows over a document, int64 [windows, 3]: first target, targets, scored targets.

        The first window scores all its targets; later ones skip the first context - stride targets, which
        the previous window has scored.
        """
        context, stride = self.context, self.stride
        assert context is not None and stride is not None
        count = 1 + -(-max(num_targets - context, 0) // stride)
        start = np.arange(count) * stride
        length = np.minimum(context, num_targets - start)
        scored = np.where(start > 0, length - (context - stride), length)
        return np.stack([start, length, scored], axis=1)


@dataclasses.dataclass(frozen=True)
class ResolvedTextSettings(TextSettings):
    """`TextSettings` with defaults filled in."""

    context: int = DEFAULT_CONTEXT
    stride: int = DEFAULT_CONTEXT // 2
    batch_size: int = 1


def evaluate_text(
    model: Transformer,
    tokenizer: Tokenizer,
    corpus: Corpus,
    settings: TextSettings = TextSettings(),  # noqa: B008 (it is frozen)
    on_progress: Callable[[int, int | None, float], None] = lambda done, total, loss: None,
) -> TextScore:
    """Evaluates a model on a corpus, streaming: memory does not grow with the length of the text.

    Args:
      on_progress: called with the tokens done, the total (None until known), and the loss so far.

    Raises ValueError for settings that do not fit the model, unreadable text, an empty corpus, and tokens
    outside the model's vocabulary.
    """
    config, params = model.config, get_params(model)
    resolved = settings.resolve(config)
    began, compile_seconds, eval_step = time.monotonic(), 0.0, None
    nats, done, documents, total, num_bytes = 0.0, 0, 0, 0, 0
    skipped: collections.Counter[str] = collections.Counter()
    groups = _groups(tokenizer, corpus.documents(skipped), resolved.max_tokens)
    # Read one group ahead, to know the total before the last group.
    for group, following in with_next(groups):
        documents += len(group)
        total += sum(len(tokens) - 1 for tokens, _ in group)
        num_bytes += sum(count for _, count in group)
        if eval_step is None:
            # A short text does not need a full batch.
            count = sum(len(resolved.windows(len(tokens) - 1)) for tokens, _ in group)
            rows = split_rows(min(resolved.batch_size, count))
            resolved = dataclasses.replace(resolved, batch_size=rows)
        for batch in _batches([tokens for tokens, _ in group], resolved):
            largest = int(batch["tokens"].max())
            allowed = f"must be below the model's vocab_size, {config.vocab_size}"
            require(largest < config.vocab_size, "token id", largest, allowed)
            if eval_step is None:
                before = time.monotonic()
                eval_step = make_eval_step(config).lower(params, batch).compile()
                compile_seconds = time.monotonic() - before
            sums, weight = eval_step(params, batch)
            nats, done = nats + float(sums["loss"]), done + int(weight)
            on_progress(done, total if following is None else None, nats / done)
    loss = nats / done
    return TextScore(
        loss=loss,
        # exp(710) overflows.
        perplexity=math.exp(loss) if not loss > 709 else math.inf,
        # The first tokens of a truncated document may have no bytes.
        bits_per_byte=bits_per_byte(nats, num_bytes) if num_bytes else math.nan,
        documents=documents,
        null_records=skipped["null"],
        tokens=done,
        bytes=num_bytes,
        context=resolved.context,
        stride=resolved.stride,
        batch_size=resolved.batch_size,
        seconds=time.monotonic() - began - compile_seconds,
        compile_seconds=compile_seconds,
    )


def _groups(
    tokenizer: Tokenizer, documents: Iterable[str], max_tokens: int | None
) -> Iterator[list[tuple[np.ndarray, int]]]:
    """Yields groups of documents, a few megabytes each: the tokens, and the number of bytes of text."""
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


def _batches(documents: list[np.ndarray], settings: ResolvedTextSettings) -> Iterator[Batch]:
    """Yields batches of windows; `loss_weights` is 1 for scored targets.

    Short windows are packed into rows as separate segments.
    """
    windows, offset = [], 0
    for tokens in documents:
        windows.append(settings.windows(len(tokens) - 1) + [offset, 0, 0])
        offset += len(tokens)
    start, length, scored = np.concatenate(windows).T
    stored = np.concatenate(documents)
    plan = pack(length, settings.context)
    rows = len(plan.row_offsets) - 1
    for first_row in range(0, rows, settings.batch_size):
        shape = settings.batch_size, settings.context
        batch: Batch = {name: np.zeros(shape, dtype) for name, dtype in BATCH_FIELDS.items()}
        for b, row in enumerate(range(first_row, min(first_row + settings.batch_size, rows))):
            end = 0
            segments = plan.document[plan.row_offsets[row] : plan.row_offsets[row + 1]]
            for segment, window in enumerate(segments, 1):
                begin, end = end, end + length[window]
                tokens = stored[start[window] : start[window] + length[window] + 1]
                batch["tokens"][b, begin:end] = tokens[:-1]
                batch["targets"][b, begin:end] = tokens[1:]
                batch["segment_ids"][b, begin:end] = segment
                batch["positions"][b, begin:end] = np.arange(length[window])
                batch["loss_weights"][b, end - scored[window] : end] = 1
        yield batch
