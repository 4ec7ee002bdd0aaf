"""Host-side state of a request to the engine: prompt, sampling parameters, and the completion so far."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Literal

import numpy as np

from gptoss_jax.config import require
from gptoss_jax.data.tokenizer import Tokenizer
from gptoss_jax.inference.detokenizer import StreamingDetokenizer
from gptoss_jax.inference.grammar import GrammarMatcher
from gptoss_jax.inference.sampling_params import Completion, SamplingParams
from gptoss_jax.inference.slots import NOT_RUN, STOPPED, DecodeOutput

log = logging.getLogger(__name__)
TopLogprobs = list[list[tuple[int, float]]]


class Request:
    """A prompt and its completion so far; created by `Engine.submit`, compared by identity."""

    def __init__(
        self,
        prompt: np.ndarray,
        params: SamplingParams,
        cache_salt: str,
        tokenizer: Tokenizer | None = None,
        matcher: GrammarMatcher | None = None,
    ) -> None:
        """`prompt` is int32 [T]; stop strings need `tokenizer`, grammars need `matcher`."""
        self.prompt, self.params, self.cache_salt, self.matcher = prompt, params, cache_salt, matcher
        # Prompt tokens taken from the prefix cache; set before the first part is yielded.
        self.cached_tokens = 0
        self.tokens: list[int] = []
        self.finish_reason: Literal["stop", "length"] | None = None
        self.is_cancelled = False
        # The prompt's log-probabilities, until they are returned with the first part.
        self.prompt_part: Completion | None = None
        self._detokenizer = None
        if params.stop_strings:
            assert tokenizer is not None, "stop strings need a tokenizer"
            self._detokenizer = StreamingDetokenizer(tokenizer, params.stop_strings)

    @property
    def is_done(self) -> bool:
        """True if the request yields no further parts."""
        return self.is_cancelled or self.finish_reason is not None

    @property
    def num_remaining(self) -> int:
        """Maximum number of tokens still to be generated."""
        return self.params.max_new_tokens - len(self.tokens)

    def add(self, decoded: DecodeOutput, b: int, num_steps: int) -> Completion:
        """Appends the tokens that a decode call of `num_steps` steps sampled in slot `b`.

        `decoded` holds NumPy arrays. Returns the new part.
        """
        found = [int(token) for token in decoded.tokens_BC[b, :num_steps] if token != NOT_RUN]
        stop_token = None
        if found and found[-1] <= STOPPED:
            self.finish_reason, stop_token = "stop", STOPPED - found.pop()
        tokens = self._until_stop_string(found)
        if len(tokens) < len(found):
            stop_token = None
        self._follow_grammar(tokens)
        self.tokens += tokens
        if self.finish_reason is None and not self.num_remaining:
            self.finish_reason = "length"
        part = Completion(tokens, None, self.finish_reason, stop_token=stop_token)
        if self.params.logprobs:
            logprobs = decoded.logprobs_BC[b].tolist()
            of_stop = None if stop_token is None else logprobs[len(tokens)]
            part = dataclasses.replace(part, logprobs=logprobs[: len(tokens)], stop_logprob=of_stop)
        if self.params.logprobs and self.params.top_logprobs:
            tokens_TK, logprobs_TK = (
                np.asarray(x)[b, : len(tokens)] for x in (decoded.top_tokens_BCK, decoded.top_logprobs_BCK)
            )
            best = top_pairs(tokens_TK, logprobs_TK, self.params.top_logprobs)
            part = dataclasses.replace(part, top_logprobs=best)
        if self.prompt_part is not None and (tokens or self.is_done):
            prompt_part, self.prompt_part = self.prompt_part, None
            part = dataclasses.replace(
                part,
                prompt_logprobs=prompt_part.prompt_logprobs,
                prompt_top_logprobs=prompt_part.prompt_top_logprobs,
            )
        return part

    def _until_stop_string(self, tokens: list[int]) -> list[int]:
        if self._detokenizer is None:
            return tokens
        for i, token in enumerate(tokens):
            self._detokenizer.feed([token])
            if self._detokenizer.stopped:
                self.finish_reason = "stop"
                return tokens[: i + 1]
        return tokens

    def _follow_grammar(self, tokens: list[int]) -> None:
        if self.matcher is None:
            return
        for token in tokens:
            self.matcher.accept(token)
        if self.matcher.failure is not None:  # truncated: the completion is not complete under the grammar
            log.warning("grammar failed, completion truncated: %s", self.matcher.failure)
            self.finish_reason = "length"
        elif self.matcher.is_finished:
            self.finish_reason = "stop"


def top_pairs(tokens_TK: np.ndarray, logprobs_TK: np.ndarray, count: int) -> TopLogprobs:
    """Returns (token, log-probability) pairs of the `count` most likely tokens at each position."""
    rows = zip(tokens_TK[:, :count].tolist(), logprobs_TK[:, :count].tolist(), strict=True)
    return [list(zip(*row, strict=True)) for row in rows]


def check_tokens(prompt: Sequence[int], params: SamplingParams, name: str, vocab_size: int) -> np.ndarray:
    """Returns a prompt as int32 [T]; raises ValueError if it or `params` has an id outside the vocabulary."""
    try:
        tokens = np.asarray(prompt)
    except ValueError:  # ragged nested lists
        tokens = np.empty((0, 0))
    require(tokens.ndim == 1, name, prompt, "must be a sequence of token ids")
    require(tokens.size > 0, name, prompt, "must hold at least one token")
    is_known = tokens.dtype.kind in "iu" and (tokens >= 0) & (tokens < vocab_size)
    first = int(np.argmin(is_known))
    allowed = f"must be an integer from 0 to {vocab_size - 1}"
    require(bool(np.all(is_known)), f"{name}[{first}]", tokens.tolist()[first], f"a token id {allowed}")
    stops, biased = params.stop_tokens, [token for token, _ in params.logit_bias]
    require(all(0 <= token < vocab_size for token in stops), "stop_tokens", stops, f"each {allowed}")
    require(all(token < vocab_size for token in biased), "logit_bias", biased, f"each token {allowed}")
    return tokens.astype(np.int32)


def check_length(
    tokens: np.ndarray, params: SamplingParams, name: str, max_context: int, limit_name: str
) -> None:
    """Raises ValueError if a prompt plus `max_new_tokens` does not fit in the context."""
    left, has = (
        max_context - len(tokens),
        f"{name} has {len(tokens)} tokens and {limit_name} is {max_context}",
    )
    require(left > 0, name, f"{len(tokens)} tokens long", f"must leave room for a completion; {has}")
    wanted = params.max_new_tokens
    require(wanted <= left, "max_new_tokens", wanted, f"must be at most {left}, because {has}")
