"""Loss on conversations, per trained token, computed as the held-out loss of training is."""

import collections
import dataclasses
import math
import pathlib
import time
from collections.abc import Callable

import numpy as np

from gptoss_jax.config import DataConfig, require
from gptoss_jax.data.batches import PackedRows, held_out_batches
from gptoss_jax.data.chat import Example, make_examples
from gptoss_jax.data.chat_cache import usable_rows
from gptoss_jax.data.chat_rows import ChatCorpus, RowError
from gptoss_jax.data.harmony import Harmony
from gptoss_jax.data.token_cache import TokenCache
from gptoss_jax.data.tokenizer import Tokenizer
from gptoss_jax.evaluation.logprobs import batch_rows, split_rows
from gptoss_jax.model.transformer import Transformer, get_params
from gptoss_jax.training.step import make_eval_step


@dataclasses.dataclass(frozen=True)
class ChatScore:
    """The result of an evaluation."""

    loss: float  # nats per trained token
    perplexity: float
    rows: int  # that were used
    skipped: dict[str, int]  # reason -> rows that cannot be used
    examples: int  # that were scored: one for each answered turn
    left_out: int  # examples longer than the context
    trained_tokens: int
    context: int
    seconds: float  # with compiling


def evaluate_conversations(
    model: Transformer,
    tokenizer: Tokenizer,
    corpus: ChatCorpus,
    config: DataConfig,
    *,
    context: int | None = None,
    batch_size: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> ChatScore:
    """Evaluates a model on conversations, which are read into memory.

    Args:
      config: train_on and reasoning_effort are used.
      context: tokens per row. None: of the longest example, at most the model's limit.
      batch_size: rows per forward pass. None: as many as make 16,384 tokens.
      on_progress: called with the number of batches done, and of all.

    Raises ValueError if no row can be used or no example fits, for a context beyond the model's limit, and
    for tokens outside the model's vocabulary.
    """
    began, params, limit = time.monotonic(), get_params(model), model.config.max_position_embeddings
    require(context is None or 2 <= context <= limit, "context", context, f"must be between 2 and {limit}")
    skipped: list[tuple[str, RowError]] = []
    conversations = [row.messages for row in usable_rows(corpus, config, skipped)]
    first = f"; {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
    require(bool(conversations), "source", corpus.source, f"has no row that can be used{first}")
    groups = make_examples(Harmony(tokenizer), conversations, config.train_on)
    cache = _in_memory([example for some in groups for example in some], tokenizer)
    lengths = np.diff(cache.offsets) - 1
    context = min(int(lengths.max()), limit) if context is None else context
    allowed = f"no example fits; the shortest needs {lengths.min()}"
    require(bool(lengths.min() <= context), "context", context, allowed)
    allowed = f"must be below the model's vocab_size, {model.config.vocab_size}"
    largest = int(cache.tokens.max())
    require(largest < model.config.vocab_size, "token id", largest, allowed)
    rows = split_rows(min(batch_size or batch_rows(context), len(PackedRows(cache, True, context))))
    batches = held_out_batches(cache, DataConfig(seq_len=context, batch_size=rows))
    eval_step, nats, tokens = make_eval_step(model.config), 0.0, 0
    for done, batch in enumerate(batches, start=1):
        sums, weight = eval_step(params, batch)
        nats, tokens = nats + float(sums["loss"]), tokens + int(weight)
        on_progress(done, len(batches))
    loss = nats / tokens
    return ChatScore(
        loss=loss,
        perplexity=math.exp(loss) if not loss > 709 else math.inf,  # exp(710) overflows
        rows=len(conversations),
        skipped=dict(collections.Counter(error.kind for _, error in skipped)),
        examples=int((lengths <= context).sum()),
        left_out=int((lengths > context).sum()),
        trained_tokens=tokens,
        context=context,
        seconds=time.monotonic() - began,
    )


def _in_memory(examples: list[Example], tokenizer: Tokenizer) -> TokenCache:
    """Returns a cache that was never written, with all examples held out."""
    return TokenCache(
        folder=pathlib.Path(),
        meta={},
        tokenizer=tokenizer,
        tokens=np.concatenate([example.tokens for example in examples]),
        offsets=np.cumsum([0, *(len(example.tokens) for example in examples)]),
        held_out=np.ones(len(examples), bool),
        weights=np.concatenate([example.weights for example in examples]),
    )
