"""What is asked of the engine: each prompt with its own settings, checked."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from gptoss_jax.config import ModelConfig, require

LARGEST = float(np.finfo(np.float32).max)
WHOLE = int, np.integer
NUMBER = float, np.floating, *WHOLE
# The types of a setting, which values are allowed, and how that is said; some may be None.
NUMBERS = {
    "max_new_tokens": (WHOLE, lambda value: value >= 1, "1 or more"),
    "temperature": (NUMBER, lambda value: 0 <= value <= LARGEST, "0 (greedy) or more, and fit in float32"),
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
    prompts = list(prompts)
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
    last = config.vocab_size - 1
    columns["stop_tokens"] = _sets(
        "stop_tokens", stop_tokens, count, lambda one: _is(WHOLE, one) and 0 <= one <= last,
        f"token ids from 0 to {last}",
    )  # fmt: skip
    columns["stop_strings"] = _sets(
        "stop_strings", stop_strings, count, lambda one: isinstance(one, str) and one != "",
        "strings that are not empty",
    )  # fmt: skip
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


def _is(kinds: tuple[type, ...], value: Any) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


def _plain(value: Any) -> Any:
    """A number that an array of no dimensions holds, as Python's."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def _tokens(config: ModelConfig, i: int, prompt: Sequence[int]) -> np.ndarray:
    name = f"prompts[{i}]"
    try:
        array = np.asarray(prompt)
    except ValueError:  # rows of several lengths
        array = np.empty((0, 0))
    require(array.ndim == 1, name, prompt, "must be a sequence of token ids")
    require(array.size > 0, name, prompt, "must hold at least one token")
    known = array.dtype.kind in "iu" and (array >= 0) & (array < config.vocab_size)
    allowed = f"a token id must be an integer from 0 to {config.vocab_size - 1}"
    first = int(np.argmin(known))
    require(np.all(known), f"{name}[{first}]", array.tolist()[first], allowed)
    return array.astype(np.int32)


def _each(name: str, value: Any, count: int) -> list:
    """A setting for each prompt, from one for all of them or one for each."""
    kinds, is_allowed, allowed = NUMBERS[name]
    several = isinstance(value, (list, tuple, range)) or getattr(value, "ndim", 0) == 1
    values = [_plain(one) for one in value] if several else [_plain(value)]
    if several:
        require(len(values) == count, name, value, f"must be one value, or {count}, one for each prompt")
    for i, one in enumerate(values):
        fits = is_allowed(one) if _is(kinds, one) else one is None and allowed.endswith("None")
        require(fits, f"{name}[{i}]" if several else name, one, f"must be {allowed}")
    return values if several else values * count


def _sets(name: str, value: Any, count: int, is_allowed: Callable[[Any], bool], allowed: str) -> list:
    """The stop tokens or strings of each prompt, from a sequence for all of them or one for each."""
    require(isinstance(value, Iterable), name, value, f"must be a sequence of {allowed}")
    value = [value] if isinstance(value, str) else [_plain(one) for one in value]
    several = bool(value) and all(isinstance(one, Iterable) and not isinstance(one, str) for one in value)
    if several:
        require(len(value) == count, name, value, f"must be one sequence, or {count}, one for each prompt")
    sets = [tuple(map(_plain, one)) for one in value] if several else [tuple(value)]
    for i, each in enumerate(sets):
        place = f"{name}[{i}]" if several else name
        require(all(map(is_allowed, each)), place, list(each), f"must hold {allowed}")
    return sets if several else sets * count
