"""Presets, Python files that end with `config = TrainConfig(...)`, and flags for their fields."""

import dataclasses
import itertools
import pathlib
import re
import runpy
import typing
from collections.abc import Iterator, Sequence

from gptoss_jax.config.base import FORMER_NAMES, require
from gptoss_jax.config.paths import user_path
from gptoss_jax.config.train import TrainConfig


def read_preset(
    path: str | pathlib.Path,
    flags: Sequence[str] = (),
    prog: str | None = None,
    description: str | None = None,
) -> TrainConfig:
    """Returns the config of a preset, changed by flags such as `--model.remat block`.

    Args:
      path: the preset.
      flags: as in `sys.argv`.
      prog, description: for `--help`.

    Raises ValueError for a file that is missing or is no preset, for former names of fields, and for flags
    that contradict each other; SystemExit, as tyro does, for `--help` and flags that it cannot parse.
    """
    import tyro

    path = user_path(path, "config")
    if not path.is_file():
        folder = pathlib.Path(__file__).parents[2]
        known = ", ".join(sorted(f"configs/{preset.name}" for preset in (folder / "configs").glob("*.py")))
        raise ValueError(f"config is {str(path)!r}: no such file" + (f"; there are {known}" if known else ""))
    config = _run(path) if path.suffix == ".py" else None
    allowed = "must be a Python file that ends with `config = TrainConfig(...)`"
    require(isinstance(config, TrainConfig), "config", str(path), allowed)
    for flag in flags:
        name = flag.partition("=")[0].removeprefix("--").replace("-", "_")
        if flag.startswith("--") and name in FORMER_NAMES:
            raise ValueError(f"{flag}: renamed to {_flag(FORMER_NAMES[name])}")
    description = f"{(description or TrainConfig.__doc__).strip()}\n\n{_about_sections(config)}"
    config, flags = _switch_sections(config, flags)
    settings = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
    return tyro.cli(
        TrainConfig, default=config, args=flags, prog=prog, description=description, config=settings
    )


def _run(path: pathlib.Path) -> object:
    """Returns the `config` of a preset. Raises ValueError for a field by its former name."""
    try:
        return runpy.run_path(str(path)).get("config")
    except TypeError as error:
        named = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        for former, name in FORMER_NAMES.items():
            if named and former.endswith(f".{named[1]}"):
                raise ValueError(f"{path}: {former} was renamed to {name}") from None
        raise


def _fields(cls: type = TrainConfig, path: str = "") -> Iterator[tuple[str, type, tuple[type, ...]]]:
    """Yields all fields as (path such as "model.rope_scaling", class, types it may have)."""
    for name, kind in typing.get_type_hints(cls).items():
        kinds = (kind, *typing.get_args(kind))
        section = next(filter(dataclasses.is_dataclass, kinds), None)
        yield path + name, section, kinds
        if section:
            yield from _fields(section, f"{path}{name}.")


def optional_sections() -> dict[str, type]:
    """The fields that hold a section of settings or None, with the class of the section."""
    return {path: section for path, section, kinds in _fields() if section and type(None) in kinds}


def _switch_sections(config: TrainConfig, flags: Sequence[str]) -> tuple[TrainConfig, list[str]]:
    """Switches sections off and on that may be None, which tyro can only do with subcommands.

    `--model.rope-scaling None` makes the section None; a flag for one of its fields gives a section that is
    None its default values. Returns the config, and the flags without those that say None.
    """
    words = list(flags)
    for path, section in optional_sections().items():
        value, words, fields = _take_flags(path, words)
        example = _flag(f"{path}.{dataclasses.fields(section)[0].name}")
        require(value in ("", "None"), path, value, f"must be None; a flag such as {example} switches it on")
        require(not (value and fields), path, None, f"leave out {' and '.join(fields)}, which switches it on")
        if value:
            config = _replaced(config, path, None)
        # Help shows the fields of every section.
        elif _value(config, path) is None and (fields or {"-h", "--help"} & set(words)):
            config = _replaced(config, path, section())
    return config, words


def _take_flags(name: str, words: Sequence[str]) -> tuple[str, list[str], list[str]]:
    """Returns the last value given for a section, the other words, and the flags for its fields."""
    value, others, fields, rest = "", [], [], list(words)
    while rest:
        word = rest.pop(0)
        flag, equals, text = word.partition("=")
        path = flag.removeprefix("--").replace("-", "_")
        if flag.startswith("--") and path == name:
            value = text if equals else rest.pop(0) if rest else ""
            require(value != "", name, value, "must be None, or left out")
            continue
        others.append(word)
        if flag.startswith("--") and path.startswith(f"{name}."):
            fields.append(flag)
    return value, others, fields


def _about_sections(config: TrainConfig) -> str:
    """Help text for sections that may be None."""
    sections = optional_sections()
    names = ", ".join(f"{_flag(path)} None" for path in sections)
    off = ", ".join(path for path in sections if _value(config, path) is None)
    return (
        f"{names} switches that section off; a flag for one of its fields switches it on, with the defaults "
        f"shown for the others. Off in this preset: {off or 'none'}."
    )


def _flag(path: str) -> str:
    return f"--{path.replace('_', '-')}"


def _value(config: typing.Any, path: str) -> typing.Any:
    for name in path.split("."):
        config = getattr(config, name, None)
    return config


def _replaced(config: typing.Any, path: str, value: typing.Any) -> typing.Any:
    name, _, rest = path.partition(".")
    inner = _replaced(getattr(config, name), rest, value) if rest else value
    return dataclasses.replace(config, **{name: inner})


def _takes_several(flag: str) -> bool:
    """Returns True if a flag, such as model.layer-types, takes any number of values."""
    kinds = {path: kinds for path, _, kinds in _fields()}.get(flag.replace("-", "_"), ())
    return any(typing.get_origin(kind) is tuple for kind in kinds)


def with_settings(args: Sequence[str]) -> list[str]:
    """Rewrites `--model.remat block`, and any other flag with a dot, as `--set model.remat=block`."""
    words, rest = [], list(args)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if not name.startswith("--") or "." not in name:
            words.append(word)
            continue
        count = len(rest) if _takes_several(name[2:]) else 1
        values = list(itertools.takewhile(lambda word: not word.startswith("--"), rest[:count]))
        if not equals and values:
            value, rest = " ".join(values), rest[len(values) :]
        words += ["--set", f"{name[2:]}={value}"]
    return words


def flags_of(settings: Sequence[str]) -> list[str]:
    """Returns the flags of train.py for settings such as `model.remat=block`."""
    flags = []
    for setting in settings:
        name, _, value = setting.partition("=")
        flags += [f"--{name}", *(value.split() if _takes_several(name) else [value])]
    return flags
