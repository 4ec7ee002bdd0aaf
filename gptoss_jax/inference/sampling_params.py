"""Sampling settings, and the completion they produce."""

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np

from gptoss_jax.config.base import ConfigBase, Positive

MAX_FLOAT32 = float(np.finfo(np.float32).max)
# Most log-probabilities of a position beside the chosen token's, and most biases of a request.
MAX_TOP_LOGPROBS = 20
MAX_LOGIT_BIAS = 300


@dataclasses.dataclass(frozen=True)
class SamplingParams(ConfigBase):
    """Settings for one prompt. The default is greedy decoding of at most 32 tokens.

    NumPy and JAX scalars and any iterables are accepted. Raises ValueError for a value out of range.
    """

    max_new_tokens: Positive[int] = 32
    # Divides the logits; 0 takes the most likely token.
    temperature: float = 0.0
    # Keeps the k most likely tokens.
    top_k: int | None = None
    # Keeps the smallest set of most likely tokens whose probabilities add up to at least this.
    top_p: float | None = None
    # Keeps the tokens at least this many times as likely as the most likely one.
    min_p: float | None = None
    # Token t is drawn with fold_in(key(seed), t): identical prompts need different seeds to differ.
    seed: int = 0
    # Each ends the answer and is not part of it. For a model's folder: `load_tokenizer(folder).stop_ids`.
    stop_tokens: tuple[int, ...] = ()
    # The answer ends with the token that completes one of these; `StreamingDetokenizer` cuts the text.
    stop_strings: tuple[str, ...] = ()
    # Also return each token's log-probability under the model, before temperature and filters.
    logprobs: bool = False
    # Also return the most likely tokens of each position; needs `logprobs`.
    top_logprobs: int = 0
    # Also return the log-probabilities of the prompt's tokens.
    prompt_logprobs: bool = False
    # Subtracted from the logits of tokens that the answer has; the second times their count.
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    # (token, added to its logit).
    logit_bias: tuple[tuple[int, float], ...] = ()
    # Lark grammar of the whole answer, in llguidance's dialect.
    grammar: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop_strings, str):
            object.__setattr__(self, "stop_strings", (self.stop_strings,))
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _to_python(getattr(self, field.name)))
        super().__post_init__()

    def _check(self) -> None:
        top_k, top_p, min_p = self.top_k, self.top_p, self.min_p
        in_range = 0 <= self.temperature <= MAX_FLOAT32
        self._require(in_range, "temperature", "must be 0 (greedy) or more, and fit in float32")
        self._require(top_k is None or 0 < top_k < 1 << 31, "top_k", "must be from 1 to 2147483647, or None")
        self._require(top_p is None or 0 < top_p <= 1, "top_p", "must be above 0 and at most 1, or None")
        self._require(min_p is None or 0 <= min_p < 1, "min_p", "must be at least 0 and below 1, or None")
        self._require(0 <= self.seed < 1 << 32, "seed", "must be from 0 to 4294967295")
        for name in ("presence_penalty", "frequency_penalty"):
            self._require(-2 <= getattr(self, name) <= 2, name, "must be from -2 to 2")
        few = len(self.logit_bias) <= MAX_LOGIT_BIAS
        self._require(few, "logit_bias", f"must have at most {MAX_LOGIT_BIAS} tokens")
        in_range = all(-100 <= bias <= 100 for _, bias in self.logit_bias)
        self._require(in_range, "logit_bias", "each bias must be from -100 to 100")
        top = self.top_logprobs
        self._require(0 <= top <= MAX_TOP_LOGPROBS, "top_logprobs", f"must be from 0 to {MAX_TOP_LOGPROBS}")
        self._require(top == 0 or self.logprobs, "top_logprobs", "needs logprobs")
        self._require("" not in self.stop_strings, "stop_strings", "must not contain an empty string")


@dataclasses.dataclass(frozen=True)
class Completion:
    """An answer or, in a stream, its new part."""

    # Without the prompt and the stop token.
    tokens: list[int]
    # One for each token, in nats; None unless `SamplingParams.logprobs` asks for them.
    logprobs: list[float] | None
    # "stop": a stop token or string; "length": max_new_tokens; None: stream still running.
    finish_reason: Literal["stop", "length"] | None
    # (token, log-probability) of the most likely tokens, best first, for each token.
    top_logprobs: list[list[tuple[int, float]]] | None = None
    # Of the prompt's tokens, in a stream's first part; None for the first token.
    prompt_logprobs: list[float | None] | None = None
    prompt_top_logprobs: list[list[tuple[int, float]] | None] | None = None
    # The stop token that ended the answer, in a stream's last part.
    stop_token: int | None = None


def _to_python(value: Any) -> Any:
    """Converts scalars of NumPy and JAX to Python's, and iterables other than strings to tuples."""
    if getattr(value, "ndim", None) == 0:
        return value.item()
    if isinstance(value, Iterable) and not isinstance(value, str):
        return tuple(map(_to_python, value))
    return value
