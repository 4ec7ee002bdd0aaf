"""What all settings share: the one form of error, type checks, and a plain dict there and back."""

import dataclasses
import difflib
import functools
import json
import math
import pathlib
import types
import typing
from collections.abc import Callable, Collection, Iterable
from typing import Any, Literal, Self

# Fields that were renamed. A config.json written before has the former names.
FORMER_NAMES = {
    "data.held_out": "data.val_fraction",
    "model.expert_capacity": "model.expert_capacity_factor",
    "optim.accumulate": "optim.grad_accum_steps",
    "optim.clip_norm": "optim.max_grad_norm",
    "optim.final_fraction": "optim.min_lr_ratio",
}


def require(condition: bool, field: str, value: object, allowed: str) -> None:
    """Raises the one form of error that a bad setting gets."""
    if not condition:
        raise ValueError(f"{field} is {value!r}: {allowed}")


def unknown_field(name: str, known: Collection[str], path: str = "") -> ValueError:
    """The error for a field that is not one of those known; `path` stands before its name."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
    return ValueError(f"{path}{name}: unknown field; {hint}")


def missing(name: str, names: Collection[str], allowed: str) -> ValueError:
    """Returns the error for a field that must be there; `names` may hold it misspelled."""
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; the file has {near[0]}" if near else ""
    return ValueError(f"{name} is missing: {allowed}{hint}")


def list_unknown(names: Collection[str], known: Collection[str], path: str = "") -> str:
    """Returns the names that are not known as one text, each with the one it may stand for; "" for none."""
    found = []
    for name in sorted(set(names) - set(known)):
        near = difflib.get_close_matches(name, known, n=1)
        found.append(f"{path}{name} (did you mean {near[0]}?)" if near else f"{path}{name}")
    return ", ".join(found)


def listed(names: Iterable[str], limit: int = 4) -> str:
    """Returns names separated by commas for an error message: the first `limit`, then how many more."""
    names = list(names)
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more:,} more" if more > 0 else "")


def one_line(error: BaseException) -> str:
    """Returns the message of an error on one line, or the name of its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def agreed(said: dict[str, Any]) -> Any:
    """Returns the one value of several fields that mean the same."""
    (first, value), *others = said.items()
    for name, other in others:
        if other != value:
            raise ValueError(
                f"{name} is {other!r}, but {first} is {value!r}: they mean the same and must agree"
            )
    return value


def number(name: str, value: Any) -> float:
    """Returns `value` if it is a finite number; raises ValueError otherwise."""
    fine = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    require(fine, name, value, "must be a finite number")
    return value


def read_json(path: str | pathlib.Path, hint: str = "") -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError for a file that is missing (`hint` says more about that),
    cannot be read, is not JSON, or holds something else."""
    try:
        values = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file{hint}") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must hold a JSON object")
    return values


def write_json(path: str | pathlib.Path, values: Any, default: Callable[[Any], Any] | None = None) -> None:
    """Writes a value as indented JSON in UTF-8; `default` converts what JSON does not know. Raises ValueError
    for NaN and infinities, which JSON does not have, before anything is written."""
    text = json.dumps(values, indent=2, allow_nan=False, default=default) + "\n"
    pathlib.Path(path).write_text(text, encoding="utf-8")


def _fits(value: object, kind: Any) -> bool:
    """Whether a value may stand in a field of this annotation; an int may stand for a float."""
    origin = typing.get_origin(kind)
    if origin is Literal:
        return value in typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, choice) for choice in typing.get_args(kind))
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, typing.get_args(kind)[0]) for item in value)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


@functools.cache
def _annotations(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _spelled(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return " or ".join(repr(choice) for choice in typing.get_args(kind))
    if typing.get_origin(kind) is types.UnionType:
        return " or ".join(_spelled(choice) for choice in typing.get_args(kind))
    return {
        type(None): "None",
        float: "a finite number",
        int: "an integer",
        bool: "True or False",
        str: "text",
    }.get(kind, getattr(kind, "__name__", str(kind)))


class ConfigBase:
    """What the config classes share: type checks, and a plain dict there and back."""

    _section: typing.ClassVar[str] = ""

    def __post_init__(self) -> None:
        for name, kind in _annotations(type(self)).items():
            if name != "_section":
                value = getattr(self, name)
                require(_fits(value, kind), self._path(name), value, f"must be {_spelled(kind)}")
        self._check()

    def _check(self) -> None:
        """Checks what types cannot say."""

    def _path(self, name: str) -> str:
        return f"{self._section}.{name}" if self._section else name

    def _require(self, condition: bool, name: str, allowed: str) -> None:
        require(condition, self._path(name), getattr(self, name), allowed)

    def _require_positive(self, *names: str) -> None:
        for name in names:
            self._require(getattr(self, name) > 0, name, "must be above 0")

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON-ready values; `from_dict` reads it back."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Builds the config from the result of `to_dict`, whose fields may have their former names.

        Raises ValueError with a suggestion for an unknown field.
        """
        kinds = {field.name: _annotations(cls)[field.name] for field in dataclasses.fields(cls)}
        made = {}
        for name, value in values.items():
            former = f"{cls._section}.{name}"
            name = FORMER_NAMES.get(former, former).rpartition(".")[2]
            if name not in kinds:
                raise unknown_field(name, kinds, f"{cls._section}." if cls._section else "")
            if isinstance(value, list):
                value = tuple(value)
            parts = [c for c in (kinds[name], *typing.get_args(kinds[name])) if dataclasses.is_dataclass(c)]
            if isinstance(value, dict) and parts:
                value = parts[0].from_dict(value)
            made[name] = value
        return cls(**made)
