"""Answers that a grammar allows."""

from collections.abc import Sequence

import numpy as np

from gptoss_jax.data.tokenizer import Tokenizer
from gptoss_jax.inference.grammar import GrammarMatcher
from gptoss_jax.inference.sampling import num_mask_words


def sample(
    tokenizer: Tokenizer, grammar: str, rng: np.random.Generator, limit: int, begin: Sequence[int] = ()
) -> tuple[list[int], bool]:
    """Returns tokens, and if they are a whole answer: after `begin`, each is drawn uniformly from those that
    the grammar allows."""
    vocab_size = tokenizer.vocab_size + 40
    matcher, row = (
        GrammarMatcher(tokenizer, vocab_size, grammar),
        np.zeros(num_mask_words(vocab_size), np.int32),
    )
    tokens = list(begin)
    for token in tokens:
        matcher.accept(token)
    while not matcher.is_finished and len(tokens) < limit:
        matcher.fill_mask(row)
        allowed = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))
        tokens.append(int(rng.choice(allowed)))
        matcher.accept(tokens[-1])
    return tokens, matcher.is_finished
