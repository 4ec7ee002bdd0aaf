"""Grammars for sampling: which tokens may come next, by llguidance (extra `serve`).

A grammar is Lark in llguidance's dialect, over the whole answer
(https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md). Special tokens are symbols of it, such
as `<|channel|>`, and never match text.
"""

import functools
import types
from typing import TYPE_CHECKING

import numpy as np

from gptoss_jax.config import require
from gptoss_jax.data.tokenizer import Tokenizer
from gptoss_jax.inference.sampling import num_words

if TYPE_CHECKING:
    import llguidance

# Of llguidance, on the work for a token and the states in memory; its own are about 20 ms and 500 MB.
LIMITS = {"max_lexer_states": 100_000, "verbose_errors": False}


class GrammarMatcher:
    """The state of one answer in a grammar.

    Where the grammar may end, the tokenizer's `stop_ids` are allowed too. Ids of the model that the
    tokenizer does not have are never allowed.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, grammar: str) -> None:
        """Compiles the grammar, which takes milliseconds; a recent one is only copied.

        The first call for a tokenizer takes longer, a second for gpt-oss's vocabulary.

        Args:
          tokenizer: of the model.
          vocab_size: of the model, at least the tokenizer's.
          grammar: Lark.

        Raises ValueError for a bad grammar.
        """
        fits = vocab_size >= tokenizer.vocab_size
        require(fits, "vocab_size", vocab_size, f"must be at least the tokenizer's {tokenizer.vocab_size}")
        self._matcher = _compile(tokenizer, grammar).deep_copy()
        self._known_words = num_words(tokenizer.vocab_size)

    def fill_mask(self, row: np.ndarray) -> None:
        """Writes which tokens may come next: a token mask, int32 [U]; see `sampling.token_bits`."""
        known = row[: self._known_words]
        self._matcher.unsafe_compute_mask_ptr(known.ctypes.data, known.nbytes)
        row[self._known_words :] = 0

    def accept(self, token: int) -> None:
        """Advances by a token. One that the mask does not allow is a failure."""
        self._matcher.consume_token(int(token))

    @property
    def is_finished(self) -> bool:
        """True if the grammar allows nothing more, only the end of the answer."""
        return self._matcher.is_stopped()

    @property
    def failure(self) -> str | None:
        """Why the answer cannot be completed, if the grammar has become too complex; it is finished then."""
        return self._matcher.get_error().partition("\n")[0] if self._matcher.is_error() else None


@functools.lru_cache(maxsize=16)
def _compile(tokenizer: Tokenizer, grammar: str) -> "llguidance.LLMatcher":
    limits = _llguidance().LLParserLimits(**LIMITS)
    matcher = _llguidance().LLMatcher(_llguidance_tokenizer(tokenizer), grammar, log_level=0, limits=limits)
    if matcher.is_error():
        first, *more = matcher.get_error().splitlines()
        # A fault in a regular expression is shown by a drawing, and told below it.
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
    """A tokenizer in the form that llguidance asks for."""

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
