"""Sampling settings, and the completion they produce."""

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np

from gptoss_jax.config.base import ConfigBase, Positive

MAX_FLOAT32 = float(np.finfo(np.float32).max)


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


def _to_python(value: Any) -> Any:
    """Converts scalars of NumPy and JAX to Python's, and iterables other than strings to tuples."""
    if getattr(value, "ndim", None) == 0:
        return value.item()
    if isinstance(value, Iterable) and not isinstance(value, str):
        return tuple(map(_to_python, value))
    return value
