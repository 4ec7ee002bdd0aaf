"""Typed access to a request's JSON body. Errors are ApiError 400 with the field's path in `param`."""

import json
import math
import re
from collections.abc import Collection, Mapping
from typing import Any, NoReturn, TypeVar, overload

from gptoss_jax.server.errors import ApiError, bad_request

# Maximum nesting of objects and lists; tool schemas have about 20 levels.
MAX_DEPTH = 64
# Maximum length of a value in an error message.
MAX_SHOWN = 60
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
Choice = TypeVar("Choice", bound=str)


# vLLM's fields for structured output.
GUIDED = ("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar")


class Fields:
    """The fields of a JSON object; null counts as absent.

    `path` is the object's path in the body, such as `messages[2]`, used for `param`.
    """

    def __init__(self, values: Mapping[str, Any], path: str = "") -> None:
        self.values, self.path = values, path

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def get(self, name: str) -> Any:
        """Returns a field's raw value; None if absent."""
        return self.values.get(name)

    def param(self, name: str) -> str:
        """Returns the full path of a field."""
        return f"{self.path}.{name}" if self.path else name

    def fault(self, name: str, allowed: str, code: str | None = None) -> ApiError:
        """Returns the ApiError 400 for a field with its path, its value and what is allowed."""
        message = f"{self.param(name)} is {shown(self.values.get(name))}: {allowed}"
        return bad_request(message, self.param(name), code)

    def require(self, condition: bool, name: str, allowed: str) -> None:
        """Raises ApiError 400 for a field unless the condition holds."""
        if not condition:
            raise self.fault(name, allowed)

    @overload
    def text(self, name: str) -> str | None: ...
    @overload
    def text(self, name: str, default: str) -> str: ...
    def text(self, name: str, default: str | None = None) -> str | None:
        """Returns a string."""
        value = self.get(name)
        self.require(value is None or isinstance(value, str), name, "must be a string")
        return default if value is None else value

    def boolean(self, name: str, default: bool = False) -> bool:
        """Returns a boolean."""
        value = self.get(name)
        self.require(value is None or isinstance(value, bool), name, "must be true or false")
        return default if value is None else value

    @overload
    def integer(
        self, name: str, default: None = None, low: int | None = None, high: int | None = None
    ) -> int | None: ...
    @overload
    def integer(self, name: str, default: int, low: int | None = None, high: int | None = None) -> int: ...
    def integer(
        self, name: str, default: int | None = None, low: int | None = None, high: int | None = None
    ) -> int | None:
        """Returns an integer from `low` to `high`; accepts 3.0 as 3."""
        value = self.get(name)
        if value is None:
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        self.require(
            is_integer and in_range(value, low, high), name, f"must be an integer{limits(low, high)}"
        )
        return value

    @overload
    def number(
        self, name: str, default: None = None, low: float | None = None, high: float | None = None
    ) -> float | None: ...
    @overload
    def number(
        self, name: str, default: float, low: float | None = None, high: float | None = None
    ) -> float: ...
    def number(
        self, name: str, default: float | None = None, low: float | None = None, high: float | None = None
    ) -> float | None:
        """Returns a finite number from `low` to `high`."""
        value = self.get(name)
        if value is None:
            return default
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        is_finite = is_number and abs(value) < 1e308 and math.isfinite(value)
        self.require(is_finite and in_range(value, low, high), name, f"must be a number{limits(low, high)}")
        return float(value)

    @overload
    def choice(self, name: str, allowed: Collection[Choice]) -> Choice | None: ...
    @overload
    def choice(self, name: str, allowed: Collection[Choice], default: Choice) -> Choice: ...
    def choice(self, name: str, allowed: Collection[Choice], default: Choice | None = None) -> Choice | None:
        """Returns one of the allowed strings."""
        value = self.get(name)
        names = ", ".join(allowed)
        self.require(
            value is None or (isinstance(value, str) and value in allowed), name, f"must be one of {names}"
        )
        return default if value is None else value

    def object(self, name: str) -> "Fields | None":
        """Returns the fields of an object."""
        value = self.get(name)
        self.require(value is None or isinstance(value, dict), name, "must be an object")
        return None if value is None else Fields(value, self.param(name))

    def array(self, name: str) -> list[Any] | None:
        """Returns a list with its raw values."""
        value = self.get(name)
        self.require(value is None or isinstance(value, list), name, "must be a list")
        return value

    def objects(self, name: str) -> list["Fields"] | None:
        """Returns the fields of each object in a list."""
        values = self.array(name)
        if values is None:
            return None
        for i, value in enumerate(values):
            if not isinstance(value, dict):
                path = f"{self.param(name)}[{i}]"
                raise bad_request(f"{path} is {shown(value)}: must be an object", path)
        return [Fields(value, f"{self.param(name)}[{i}]") for i, value in enumerate(values)]

    def texts(self, name: str) -> tuple[str, ...]:
        """Returns a list of strings; accepts a single string."""
        value = self.get(name)
        values = [value] if isinstance(value, str) else [] if value is None else value
        is_list = isinstance(values, list) and all(isinstance(item, str) for item in values)
        self.require(is_list, name, "must be a string or a list of strings")
        return tuple(values)

    def needed(self, name: str) -> None:
        """Raises ApiError 400 if a field is absent."""
        if name not in self:
            raise bad_request(
                f"{self.param(name)} is missing", self.param(name), "missing_required_parameter"
            )

    def needed_text(self, name: str) -> str:
        """Returns a string; raises the 400 if it is absent."""
        self.needed(name)
        return self.text(name, "")

    def needed_object(self, name: str) -> "Fields":
        """Returns the fields of an object; raises the 400 if it is absent."""
        self.needed(name)
        return self.object(name) or Fields({})

    def refuse(self, neutral: Mapping[str, Collection[Any]], allowed: str = "not supported") -> None:
        """Raises ApiError 400 for the first of these fields that is present with a non-neutral value."""
        for name, values in neutral.items():
            hint = "; use response_format of /v1/chat/completions" if name in GUIDED else ""
            self.require(name not in self or self.get(name) in list(values), name, f"{allowed}{hint}")


def parse_json(body: bytes) -> Fields:
    """Parses a request's body.

    Stricter than `json.loads`: no NaN or infinities, no duplicate keys, no lone surrogates, no deep nesting,
    and the top level must be an object.
    """
    try:
        values = json.loads(
            body.decode(),
            parse_constant=_refuse_number,
            parse_float=_finite,
            object_pairs_hook=_without_repeats,
        )
    except RecursionError:
        raise bad_request(f"The body is nested more than {MAX_DEPTH} levels deep.") from None
    except UnicodeDecodeError as error:
        raise bad_request(f"The body is not UTF-8: invalid byte at {error.start}.") from None
    except ValueError as error:
        # Drop Python's hint on how to raise its limit.
        reason = str(error).partition("; use sys.")[0][:200]
        raise bad_request(f"The body is not JSON: {reason}.") from None
    if not isinstance(values, dict):
        raise bad_request(f"The body is {shown(values)}: must be a JSON object.")
    _check_tree(values, b"\\u" in body)
    return Fields(values)


def shown(value: Any) -> str:
    """Formats a value for an error message, as at most `MAX_SHOWN` ASCII characters."""
    if isinstance(value, (dict, list)) and len(value) > 8:
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value):,} items"
    if isinstance(value, str):
        value = value[: MAX_SHOWN + 1]
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 1 << 64:
        return "an integer with more than 64 bits"
    text = json.dumps(value)
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "…"


def in_range(value: float, low: float | None, high: float | None) -> bool:
    """Returns True if a value is between `low` and `high`, inclusive."""
    return (low is None or value >= low) and (high is None or value <= high)


def limits(low: float | None, high: float | None) -> str:
    """Describes a range for an error message."""
    if low is not None and high is not None:
        return f" from {low} to {high}"
    if low is not None:
        return f", {low} or more"
    return "" if high is None else f", at most {high}"


def _refuse_number(name: str) -> NoReturn:
    raise ValueError(f"{name[:MAX_SHOWN]} is not a finite number")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse_number(text)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                break
            seen.add(name)
        param = None if LONE_SURROGATE.search(name) else name[:MAX_SHOWN]
        raise bad_request(f"{shown(name)} occurs more than once in the same object.", param)
    return values


# The keys and indices that lead to a value, as a linked list, innermost first: `(index, (name, ()))`.
Trail = tuple[()] | tuple[str | int, Any]


def _check_tree(values: Mapping[str, Any], has_escapes: bool) -> None:
    """Raises ApiError 400 for deep nesting and, if the body has `\\u` escapes, for lone surrogates."""
    stack: list[tuple[Any, Trail, int]] = [(values, (), 1)]
    while stack:
        value, trail, depth = stack.pop()
        if depth > MAX_DEPTH:
            raise bad_request(f"The body is nested more than {MAX_DEPTH} levels deep.", _path(trail))
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if has_escapes and isinstance(key, str) and LONE_SURROGATE.search(key):
                raise bad_request("A key contains a lone surrogate, which is not a character.", _path(trail))
            if isinstance(inner, (dict, list)):
                stack.append((inner, (key, trail), depth + 1))
            elif has_escapes and isinstance(inner, str) and LONE_SURROGATE.search(inner):
                path = _path((key, trail))
                raise bad_request(f"{path} contains a lone surrogate, which is not a character.", path)


def _path(trail: Trail) -> str | None:
    keys: list[str | int] = []
    while trail:
        key, trail = trail
        keys.append(key)
    path = ""
    for key in list(reversed(keys))[:8]:
        path += f"[{key}]" if isinstance(key, int) else f"{'.' * bool(path)}{key[:MAX_SHOWN]}"
    return path or None
