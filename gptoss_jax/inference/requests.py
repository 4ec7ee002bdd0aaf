"""What is asked of the engine: each prompt with its own settings, checked."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from gptoss_jax.config import ModelConfig, require

WHOLE = int, np.integer
NUMBER = float, np.floating, *WHOLE
# The types of a setting, which values are allowed, and how that is said; some may be None.
NUMBERS = {
    "max_new_tokens": (WHOLE, lambda value: value >= 1, "1 or more"),
    "temperature": (NUMBER, lambda value: 0 <= value < math.inf, "0 (greedy) or more"),
    "top_k": (WHOLE, lambda value: value >= 1, "1 or more, or None"),
    "top_p": (NUMBER, lambda value: 0 < value <= 1, "above 0 and at most 1, or None"),
    "min_p": (NUMBER, lambda value: 0 <= value < 1, "at least 0 and below 1, or None"),
    "seed": (WHOLE, lambda value: 0 <= value < 1 << 32, "from 0 to 4294967295"),
}


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt and how it is to be continued; the fields are those of `generate.generate`."""

    prompt: np.ndarray  # int32, at least one token
    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    stop_tokens: tuple[int, ...]
    stop_strings: tuple[str, ...]
    seed: int


def requests(
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int] = 32,
    temperature: float | Sequence[float] = 0.0,
    top_k: int | None | Sequence[int | None] = None,
    top_p: float | None | Sequence[float | None] = None,
    min_p: float | None | Sequence[float | None] = None,
    stop_tokens: Sequence[int] | Sequence[Sequence[int]] = (),
    stop_strings: str | Sequence[str] | Sequence[Sequence[str]] = (),
    seed: int | Sequence[int] = 0,
) -> list[Request]:
    """A request for each prompt. Raises ValueError as `generate.generate` does."""
    require(len(prompts) > 0, "prompts", prompts, "must hold at least one prompt")
    tokens = [_tokens(config, i, prompt) for i, prompt in enumerate(prompts)]
    count = len(tokens)
    numbers = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "seed": seed,
    }
    columns = {name: _each(name, value, count) for name, value in numbers.items()}
    columns["stop_tokens"] = _sets("stop_tokens", stop_tokens, count, WHOLE, "token ids")
    columns["stop_strings"] = _sets("stop_strings", stop_strings, count, str, "strings that are not empty")
    room = [config.max_position_embeddings - len(prompt) for prompt in tokens]
    for i, (left, wanted) in enumerate(zip(room, columns["max_new_tokens"], strict=True)):
        limit, length = config.max_position_embeddings, len(tokens[i])
        has = f"prompts[{i}] has {length} tokens and model.max_position_embeddings is {limit}"
        require(left > 0, "prompts", f"{length} tokens long", f"must leave room for an answer; {has}")
        require(wanted <= left, "max_new_tokens", wanted, f"must be at most {left}, because {has}")
    rows = zip(*columns.values(), strict=True)
    return [
        Request(prompt, **dict(zip(columns, row, strict=True)))
        for prompt, row in zip(tokens, rows, strict=True)
    ]


def _tokens(config: ModelConfig, i: int, prompt: Sequence[int]) -> np.ndarray:
    name, array = f"prompts[{i}]", np.asarray(prompt)
    require(array.ndim == 1, name, prompt, "must be a sequence of token ids")
    require(array.size > 0, name, prompt, "must hold at least one token")
    known = array.dtype.kind in "iu" and (array >= 0) & (array < config.vocab_size)
    allowed = f"a token id must be an integer from 0 to {config.vocab_size - 1}"
    require(np.all(known), f"{name}[{np.argmin(known)}]", array[np.argmin(known)].item(), allowed)
    return array.astype(np.int32)


def _each(name: str, value: Any, count: int) -> list:
    """A setting for each prompt, from one for all of them or one for each."""
    kinds, is_allowed, allowed = NUMBERS[name]
    several = isinstance(value, (list, tuple, range, np.ndarray))
    if several:
        require(len(value) == count, name, value, f"must be one value, or {count}, one for each prompt")
    for i, one in enumerate(value if several else [value]):
        is_number = isinstance(one, kinds) and not isinstance(one, bool)
        fits = is_allowed(one) if is_number else one is None and allowed.endswith("None")
        require(fits, f"{name}[{i}]" if several else name, one, f"must be {allowed}")
    return list(value) if several else [value] * count


def _sets(name: str, value: Any, count: int, kind: type | tuple[type, ...], allowed: str) -> list:
    """The stop tokens or strings of each prompt, from a sequence for all of them or one for each."""
    value = [value] if isinstance(value, str) else list(value)
    sequences = [isinstance(one, Iterable) and not isinstance(one, str) for one in value]
    several = bool(value) and all(sequences)
    if several:
        require(len(value) == count, name, value, f"must be one sequence, or {count}, one for each prompt")
    sets = [tuple(one) for one in value] if several else [tuple(value)]
    for i, each in enumerate(sets):
        for one in each:
            place = f"{name}[{i}]" if several else name
            require(isinstance(one, kind) and one != "", place, list(each), f"must hold {allowed}")
    return sets if several else sets * count
