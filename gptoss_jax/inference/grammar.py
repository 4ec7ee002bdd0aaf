"""Grammar-constrained decoding with llguidance (extra `serve`).

A grammar covers the whole completion and is written in llguidance's dialect of Lark
(https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md). Special tokens are written as symbols,
such as `<|channel|>`, and never match text.
"""

import functools
import types
from typing import TYPE_CHECKING

import numpy as np

from gptoss_jax.config import require
from gptoss_jax.data.tokenizer import Tokenizer
from gptoss_jax.inference.sampling import num_mask_words

if TYPE_CHECKING:
    import llguidance

# llguidance's limits on the work per token and on the states in memory, about 20 ms and 500 MB.
LIMITS = {"max_lexer_states": 100_000, "verbose_errors": False}


class GrammarMatcher:
    """The grammar state of one completion.

    Where the grammar may end, the tokenizer's `stop_ids` are allowed. Token ids outside the tokenizer's
    vocabulary (the model's may be padded) are never allowed.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, grammar: str) -> None:
        """Compiles the grammar, which takes milliseconds; recent grammars are cached.

        The first call for a tokenizer takes longer, about a second for gpt-oss's vocabulary.

        Args:
          tokenizer: the model's tokenizer.
          vocab_size: the model's vocabulary size, at least the tokenizer's.
          grammar: Lark source.

        Raises ValueError for an invalid grammar.
        """
        fits = vocab_size >= tokenizer.vocab_size
        require(fits, "vocab_size", vocab_size, f"must be at least the tokenizer's {tokenizer.vocab_size}")
        self._matcher = _compile(tokenizer, grammar).deep_copy()
        self._known_words = num_mask_words(tokenizer.vocab_size)

    def fill_mask(self, row: np.ndarray) -> None:
        """Writes the mask of allowed next tokens to `row`, int32 [U]; see `sampling.make_token_mask`."""
        known = row[: self._known_words]
        self._matcher.unsafe_compute_mask_ptr(known.ctypes.data, known.nbytes)
        row[self._known_words :] = 0

    def accept(self, token: int) -> None:
        """Advances the grammar by a token; one that the mask does not allow sets `failure`."""
        self._matcher.consume_token(int(token))

    @property
    def is_finished(self) -> bool:
        """True if the grammar is complete and allows no further token."""
        return self._matcher.is_stopped()

    @property
    def failure(self) -> str | None:
        """The error message if the grammar failed (say, exceeded LIMITS); `is_finished` is then True."""
        return self._matcher.get_error().partition("\n")[0] if self._matcher.is_error() else None


@functools.lru_cache(maxsize=16)
def _compile(tokenizer: Tokenizer, grammar: str) -> "llguidance.LLMatcher":
    limits = _llguidance().LLParserLimits(**LIMITS)
    matcher = _llguidance().LLMatcher(_llguidance_tokenizer(tokenizer), grammar, log_level=0, limits=limits)
    if matcher.is_error():
        first, *more = matcher.get_error().splitlines()
        # For an invalid regex, llguidance prints a drawing followed by an "error: " line.
        reason = " ".join(
            [first, *(line.removeprefix("error: ") for line in more if line.startswith("error: "))]
        )
        raise ValueError(f"grammar: {reason.partition('; following special tokens')[0]}")
    return matcher


@functools.lru_cache(maxsize=2)
def _llguidance_tokenizer(tokenizer: Tokenizer) -> "llguidance.LLTokenizer":
    return _llguidance().LLTokenizer(_Vocabulary(tokenizer), eos_token=list(tokenizer.stop_ids))


def _llguidance() -> types.ModuleType:
    try:
        import llguidance
    except ImportError:
        raise ValueError("grammar: needs llguidance; pip install 'gptoss-jax[serve]'") from None
    return llguidance


class _Vocabulary:
    """Adapts a tokenizer to llguidance's interface."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer) -> None:
        names = {token: name.encode() for name, token in tokenizer.special_tokens.items()}
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        self.special_token_ids = sorted(names)
        ids = range(tokenizer.vocab_size)
        self.tokens = [names.get(token) or tokenizer.decode_bytes([token]) for token in ids]
        self._encode = tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)
