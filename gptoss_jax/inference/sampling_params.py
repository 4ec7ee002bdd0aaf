"""Sampling parameters and completions."""

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from gptoss_jax.config.base import ConfigBase, Positive, require

MAX_FLOAT32 = float(np.finfo(np.float32).max)
# Limits of OpenAI's API.
MAX_LOGIT_BIAS = 300
MAX_TOP_LOGPROBS = 20


@dataclasses.dataclass(frozen=True)
class SamplingParams(ConfigBase):
    """Sampling parameters of one request. The default is greedy decoding of up to 32 tokens.

    Accepts NumPy and JAX scalars, and any iterables and mappings. Raises ValueError for a value out of range.
    """

    max_new_tokens: Positive[int] = 32
    # Divides the logits; 0 is greedy decoding.
    temperature: float = 0.0
    # Keeps the k most likely tokens.
    top_k: int | None = None
    # Keeps the smallest set of most likely tokens whose probabilities add up to at least this.
    top_p: float | None = None
    # Keeps the tokens at least this many times as likely as the most likely one.
    min_p: float | None = None
    # Subtracted from the logits of tokens already in the completion: once, or once per occurrence.
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    # (token, bias) pairs or a mapping; the bias is added to the token's logit.
    logit_bias: tuple[tuple[int, float], ...] = ()
    # Grammar for the whole completion, including special tokens, in llguidance's dialect of Lark.
    grammar: str | None = None
    # Token t is sampled with fold_in(key(seed), t); give identical prompts different seeds.
    seed: int = 0
    # End the completion and are not part of it. For a model's folder: `load_tokenizer(folder).stop_ids`.
    stop_tokens: tuple[int, ...] = ()
    # End the completion after the token that completes one; `StreamingDetokenizer` truncates the text.
    stop_strings: tuple[str, ...] = ()
    # Also return each token's log-probability under the model, before any of the above is applied.
    logprobs: bool = False
    # Also return this many most likely tokens per position, with their log-probabilities.
    top_logprobs: int = 0
    # Also return the log-probabilities of the prompt's tokens.
    prompt_logprobs: bool = False

    def __post_init__(self) -> None:
        stop_strings: Any = self.stop_strings
        if isinstance(stop_strings, str):
            object.__setattr__(self, "stop_strings", (stop_strings,))
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
        for name in ("presence_penalty", "frequency_penalty"):
            self._require(-2 <= getattr(self, name) <= 2, name, "must be from -2 to 2")
        self._check_logit_bias()
        self._require(
            self.grammar is None or self.grammar.strip() != "", "grammar", "must not be empty, or None"
        )
        allowed = f"must be from 0 to {MAX_TOP_LOGPROBS}"
        self._require(0 <= self.top_logprobs <= MAX_TOP_LOGPROBS, "top_logprobs", allowed)
        has_logprobs = self.logprobs or self.prompt_logprobs
        self._require(not self.top_logprobs or has_logprobs, "top_logprobs", "must be 0 without logprobs")

    def _check_logit_bias(self) -> None:
        tokens = [token for token, _ in self.logit_bias]
        allowed = f"must be at most {MAX_LOGIT_BIAS}"
        require(len(tokens) <= MAX_LOGIT_BIAS, "number of pairs in logit_bias", len(tokens), allowed)
        twice = [token for token, count in collections.Counter(tokens).items() if count > 1]
        require(not twice, "token in logit_bias", next(iter(twice), None), "must not occur twice")
        for token, bias in self.logit_bias:
            require(0 <= token < 1 << 31, "token in logit_bias", token, "must be from 0 to 2147483647")
            require(-100 <= bias <= 100, f"logit_bias of token {token}", bias, "must be from -100 to 100")


@dataclasses.dataclass(frozen=True)
class Completion:
    """The completion of a prompt or, when streaming, its next part."""

    # Generated tokens, without the stop token.
    tokens: list[int]
    # One per token, in nats; None unless `SamplingParams.logprobs`.
    logprobs: list[float] | None
    # "stop": a stop token or string; "length": max_new_tokens; None: still running.
    finish_reason: Literal["stop", "length"] | None
    # (token, log-probability) pairs of the most likely tokens at each position, best first.
    top_logprobs: list[list[tuple[int, float]]] | None = None
    # For the prompt's tokens, in the first part. The first token has none.
    prompt_logprobs: list[float | None] | None = None
    prompt_top_logprobs: list[list[tuple[int, float]] | None] | None = None
    # The stop token that ended the completion, in the last part, and its log-probability; the latter is None
    # unless `SamplingParams.logprobs`.
    stop_token: int | None = None
    stop_logprob: float | None = None


def join_parts(parts: Sequence[Completion]) -> Completion:
    """Concatenates consecutive parts of a completion."""

    def joined(name: str) -> list | None:
        lists = [values for part in parts if (values := getattr(part, name)) is not None]
        return [one for values in lists for one in values] if lists else None

    lists = ("logprobs", "top_logprobs", "prompt_logprobs", "prompt_top_logprobs")
    return Completion(
        tokens=[token for part in parts for token in part.tokens],
        finish_reason=parts[-1].finish_reason,
        stop_token=next((part.stop_token for part in parts if part.stop_token is not None), None),
        stop_logprob=next((part.stop_logprob for part in parts if part.stop_logprob is not None), None),
        **{name: joined(name) for name in lists},
    )


def _to_python(value: Any) -> Any:
    """Converts NumPy and JAX scalars to Python's, iterables but strings to tuples, and mappings to pairs."""
    if getattr(value, "ndim", None) == 0:
        return value.item()
    if isinstance(value, Mapping):
        value = value.items()
    if isinstance(value, Iterable) and not isinstance(value, str):
        return tuple(map(_to_python, value))
    return value
