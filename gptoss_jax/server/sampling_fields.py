"""Sampling parameters of a request: the fields shared by chat, completions and responses."""

import dataclasses
import secrets
from collections.abc import Mapping, Sequence

from gptoss_jax.data.harmony import Reasoning
from gptoss_jax.inference.sampling_params import (
    MAX_FLOAT32,
    MAX_LOGIT_BIAS,
    MAX_TOP_LOGPROBS,
    SamplingParams,
)
from gptoss_jax.server.errors import bad_request, context_length_exceeded
from gptoss_jax.server.fields import Fields, shown
from gptoss_jax.server.service import Service

MAX_N = 128
MAX_STOPS = 16
MAX_STOP_LENGTH = 1024
MAX_INT32 = (1 << 31) - 1
# OpenAI's value for tokens with probability 0: JSON has no infinities.
MIN_LOGPROB = -9999.0
# OpenAI's reasoning efforts, mapped to Harmony's.
EFFORTS: Mapping[str, Reasoning] = {
    "none": "low", "minimal": "low", "low": "low", "medium": "medium", "high": "high", "xhigh": "high",
    "max": "high",
}  # fmt: skip


def read_sampling(
    fields: Fields,
    service: Service,
    stop_tokens: Sequence[int],
    prompt_len: int,
    max_tokens_names: Sequence[str] = ("max_completion_tokens", "max_tokens"),
    default_max_tokens: int | None = None,
    *,
    prompt_name: str = "messages",
) -> SamplingParams:
    """Returns the sampling parameters of a request, for its first choice; the seed is random if not given.

    Parses temperature, top_p, top_k, min_p, presence_penalty, frequency_penalty, logit_bias, seed,
    stop_token_ids, ignore_eos and the token limit. The endpoints parse `stop`, log-probabilities and
    grammars.

    Args:
      fields: the request body.
      service: provides the model's limits and defaults.
      stop_tokens: stop tokens, unless the request has ignore_eos.
      prompt_len: tokens of the (longest) prompt.
      max_tokens_names: fields for the limit on sampled tokens; the first one given is used.
      default_max_tokens: the default limit; None: the rest of the context.
      prompt_name: the field to report if the prompt is too long.
    """
    defaults = service.defaults
    top_k = fields.integer("top_k", defaults.top_k or 0, -1, MAX_INT32)
    ends = () if fields.boolean("ignore_eos") else tuple(stop_tokens)
    max_new_tokens = read_max_tokens(
        fields, service, prompt_len, max_tokens_names, default_max_tokens, prompt_name=prompt_name
    )
    return SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=fields.number("temperature", defaults.temperature, 0, MAX_FLOAT32),
        top_k=top_k if top_k > 0 else None,
        top_p=_top_p(fields, defaults.top_p),
        min_p=_min_p(fields),
        presence_penalty=fields.number("presence_penalty", 0.0, -2, 2),
        frequency_penalty=fields.number("frequency_penalty", 0.0, -2, 2),
        logit_bias=read_logit_bias(fields, service.vocab_size),
        seed=read_seed(fields),
        stop_tokens=tuple(dict.fromkeys((*ends, *read_tokens(fields, "stop_token_ids", service.vocab_size)))),
    )


def read_max_tokens(
    fields: Fields,
    service: Service,
    prompt_len: int,
    names: Sequence[str],
    default: int | None = None,
    *,
    prompt_name: str = "messages",
) -> int:
    """Returns the limit on sampled tokens, at most the rest of the context.

    Raises ApiError 400 context_length_exceeded if the prompt fills the context or the limit exceeds it.
    """
    limit, left = service.max_context, service.max_context - prompt_len
    given = {name: fields.integer(name, low=1) for name in names}
    name, wanted = next(((name, n) for name, n in given.items() if n is not None), (names[0], None))
    has = f"This model's context length is {limit:,} tokens, and the prompt has {prompt_len:,}"
    if left < 1:
        raise context_length_exceeded(f"{has}, which leaves no room for output.", prompt_name)
    if wanted is None:
        return left if default is None else min(default, left)
    if wanted > left:
        raise context_length_exceeded(f"{has}: {name} is {wanted:,} and must be at most {left:,}.", name)
    return wanted


def read_seed(fields: Fields) -> int:
    """Returns `seed` (any 64-bit integer) modulo 2^32, or a random seed if absent."""
    seed = fields.integer("seed", low=-(1 << 63), high=(1 << 64) - 1)
    return secrets.randbits(32) if seed is None else seed % (1 << 32)


def read_effort(fields: Fields, name: str, default: Reasoning) -> Reasoning:
    """Returns the reasoning effort in a field."""
    effort = fields.choice(name, EFFORTS)
    return default if effort is None else EFFORTS[effort]


def choice_params(params: SamplingParams, i: int) -> SamplingParams:
    """Returns the parameters of choice `i` of a request: seed plus `i`."""
    return params if i == 0 else dataclasses.replace(params, seed=(params.seed + i) % (1 << 32))


def read_n(fields: Fields) -> int:
    """Returns `n`, the number of choices."""
    return fields.integer("n", 1, 1, MAX_N)


def read_stop(fields: Fields) -> tuple[str, ...]:
    """Returns the stop strings."""
    stops = fields.texts("stop")
    fields.require(len(stops) <= MAX_STOPS, "stop", f"must have at most {MAX_STOPS} strings")
    are_short = all(0 < len(stop) <= MAX_STOP_LENGTH for stop in stops)
    fields.require(are_short, "stop", f"each must have 1 to {MAX_STOP_LENGTH} characters")
    return stops


def read_tokens(fields: Fields, name: str, vocab_size: int) -> list[int]:
    """Returns a list of token ids; raises ApiError 400 for the first one outside the vocabulary."""
    tokens = fields.array(name) or []
    check_tokens(tokens, fields.param(name), vocab_size)
    return tokens


def check_tokens(tokens: Sequence[object], path: str, vocab_size: int) -> None:
    """Raises ApiError 400 for the first item that is not a token id."""
    for i, token in enumerate(tokens):
        if type(token) is not int or not 0 <= token < vocab_size:
            allowed = f"a token id must be an integer from 0 to {vocab_size - 1}"
            raise bad_request(f"{path}[{i}] is {shown(token)}: {allowed}", f"{path}[{i}]")


def read_logit_bias(fields: Fields, vocab_size: int) -> tuple[tuple[int, float], ...]:
    """Returns `logit_bias` (an object with token ids as keys) as (token, bias) pairs, sorted by token."""
    biases = fields.object("logit_bias")
    if biases is None:
        return ()
    few = len(biases.values) <= MAX_LOGIT_BIAS
    fields.require(few, "logit_bias", f"must have at most {MAX_LOGIT_BIAS} tokens")
    found = {}
    for name in biases.values:
        is_token = name.isascii() and name.isdecimal() and len(name) < 10 and int(name) < vocab_size
        if not is_token:
            message = f"logit_bias has the key {shown(name)}: must be a token id below {vocab_size}"
            raise bad_request(message, "logit_bias")
        found[int(name)] = biases.number(name, 0.0, -100, 100)
    return tuple(sorted(found.items()))


def read_top_logprobs(fields: Fields, name: str = "top_logprobs") -> int:
    """Returns the requested number of most likely tokens per position."""
    return fields.integer(name, 0, 0, MAX_TOP_LOGPROBS)


def _top_p(fields: Fields, default: float) -> float | None:
    top_p = fields.number("top_p", default, 0, 1)
    fields.require(top_p > 0, "top_p", "must be above 0 and at most 1")
    return top_p if top_p < 1 else None


def _min_p(fields: Fields) -> float | None:
    min_p = fields.number("min_p", 0.0, 0, 1)
    fields.require(min_p < 1, "min_p", "must be at least 0 and below 1")
    return min_p or None
