"""Base class of the configs: type and range checks, errors that name the field, JSON."""

import dataclasses
import difflib
import functools
import json
import math
import pathlib
import types
import typing
from collections.abc import Callable, Collection, Iterable
from typing import Annotated, Any, Literal, Self, TypeVar

# Former field names and the current ones, so that a config.json written before the rename still loads.
FORMER_NAMES = {
    "data.held_out": "data.val_fraction",
    "model.expert_capacity": "model.expert_capacity_factor",
    "optim.accumulate": "optim.grad_accum_steps",
    "optim.clip_norm": "optim.max_grad_norm",
    "optim.final_fraction": "optim.min_lr_ratio",
}


def require(condition: bool, field: str, value: object, allowed: str) -> None:
    """Raises a ValueError that names the field, its value and what is allowed, unless the condition holds."""
    if not condition:
        raise ValueError(f"{field} is {value!r}: {allowed}")


def nearest(name: str, known: Collection[str]) -> str | None:
    """Returns the known name closest to a misspelled one, or None if none is close."""
    return next(iter(difflib.get_close_matches(name, known, n=1)), None)


def listed(names: Iterable[str], limit: int = 4) -> str:
    """Joins names with commas for an error message: the first `limit`, then a count of the rest."""
    names = list(names)
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more:,} more" if more > 0 else "")


def type_name(value: object) -> str:
    """Returns the name of a value's type with an article: `a str`, `an int`."""
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def one_line(error: BaseException) -> str:
    """Returns an error's message on one line, or the name of its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def read_json(path: str | pathlib.Path, hint: str = "") -> dict[str, Any]:
    """Reads a JSON object.

    Raises ValueError if the file is missing (`hint` is appended to the message), cannot be read, is not JSON,
    or contains anything but an object.
    """
    try:
        values = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file{hint}") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must contain a JSON object")
    return values


def write_json(path: str | pathlib.Path, values: Any, default: Callable[[Any], Any] | None = None) -> None:
    """Writes indented JSON in UTF-8; `default` converts values of other types.

    Raises ValueError for NaN and infinities, which JSON cannot represent, before writing anything.
    """
    text = json.dumps(values, indent=2, allow_nan=False, default=default) + "\n"
    pathlib.Path(path).write_text(text, encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class Bound:
    """A constraint on a field's value, attached to its annotation."""

    allowed: str
    holds: Callable[[Any], bool]


Number = TypeVar("Number")
Positive = Annotated[Number, Bound("must be above 0", lambda x: x > 0)]
NonNegative = Annotated[Number, Bound("must be 0 or more", lambda x: x >= 0)]
PositiveOrNone = Annotated[float | None, Bound("must be above 0, or None", lambda x: x is None or x > 0)]
BelowOne = Annotated[float, Bound("must be at least 0 and below 1", lambda x: 0 <= x < 1)]


@functools.cache
def _fields(cls: type) -> dict[str, tuple[Any, tuple[Bound, ...]]]:
    """The type and the bounds of each field of a dataclass."""
    kinds = typing.get_type_hints(cls)
    bounds = typing.get_type_hints(cls, include_extras=True)
    names = [field.name for field in dataclasses.fields(cls)]
    return {name: (kinds[name], getattr(bounds[name], "__metadata__", ())) for name in names}


def fits(value: object, kind: Any) -> bool:
    """Returns True if a value matches a type annotation; an int also matches float."""
    origin = typing.get_origin(kind)
    if origin is Literal:
        return value in typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return any(fits(value, choice) for choice in typing.get_args(kind))
    if origin is tuple and typing.get_args(kind)[-1] is not Ellipsis:
        kinds = typing.get_args(kind)
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(fits, value, kinds))
    if origin in (tuple, list):
        return isinstance(value, origin) and all(fits(item, typing.get_args(kind)[0]) for item in value)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def spelled(kind: Any) -> str:
    """Describes a type annotation in words."""
    if typing.get_origin(kind) is Literal:
        return " or ".join(repr(choice) for choice in typing.get_args(kind))
    if typing.get_origin(kind) is types.UnionType:
        return " or ".join(spelled(choice) for choice in typing.get_args(kind))
    if typing.get_origin(kind) is tuple and typing.get_args(kind)[-1] is not Ellipsis:
        return f"({', '.join(spelled(item) for item in typing.get_args(kind))})"
    if typing.get_origin(kind) in (tuple, list):
        return f"a sequence, each item {spelled(typing.get_args(kind)[0])}"
    return {
        type(None): "None",
        float: "a finite number",
        int: "an integer",
        bool: "True or False",
        str: "text",
        dict: "a JSON object",
    }.get(kind, getattr(kind, "__name__", str(kind)))


@dataclasses.dataclass(frozen=True)
class ConfigBase:
    """Base class of the frozen config dataclasses; validates their fields on creation."""

    _section: typing.ClassVar[str] = ""

    def __post_init__(self) -> None:
        for name, (kind, bounds) in _fields(type(self)).items():  # type: ignore[arg-type]
            self._require(fits(getattr(self, name), kind), name, f"must be {spelled(kind)}")
            for bound in bounds:
                self._require(bound.holds(getattr(self, name)), name, bound.allowed)
        self._check()

    def _check(self) -> None:
        """Checks the constraints that annotations cannot express."""

    @classmethod
    def _path(cls, name: str) -> str:
        return f"{cls._section}.{name}" if cls._section else name

    def _require(self, condition: bool, name: str, allowed: str) -> None:
        require(condition, self._path(name), getattr(self, name), allowed)

    def to_dict(self) -> dict[str, Any]:
        """Returns the config as JSON-serializable values, the input of `from_dict`."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Builds a config from the output of `to_dict`; former field names are accepted.

        Raises ValueError for an unknown field, with a suggestion.
        """
        fields = _fields(cls)  # type: ignore[arg-type]  # mypy: a class of dataclasses is not hashable
        arguments = {}
        for given, value in values.items():
            name = FORMER_NAMES.get(cls._path(given), given).rpartition(".")[2]
            if name not in fields:
                near = nearest(name, fields)
                hint = f"did you mean {near}?" if near else f"known: {', '.join(fields)}"
                raise ValueError(f"{cls._path(name)}: unknown field; {hint}")
            kind = fields[name][0]
            if isinstance(value, list):
                value = tuple(value)
            choices = (kind, *typing.get_args(kind))
            sections = [c for c in choices if isinstance(c, type) and issubclass(c, ConfigBase)]
            if isinstance(value, dict) and sections:
                value = sections[0].from_dict(value)
            arguments[name] = value
        return cls(**arguments)
