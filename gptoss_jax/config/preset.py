"""A preset, a Python file that ends with `config = TrainConfig(...)`, with flags for its fields."""

import dataclasses
import itertools
import pathlib
import re
import runpy
import typing
from collections.abc import Sequence

from gptoss_jax.config.base import FORMER_NAMES, require
from gptoss_jax.config.paths import user_path
from gptoss_jax.config.train import TrainConfig

# Fields by their path: ("model", "rope_scaling").
Path = tuple[str, ...]


def read_preset(
    path: str | pathlib.Path,
    flags: Sequence[str] = (),
    prog: str | None = None,
    description: str | None = None,
) -> TrainConfig:
    """The config of a preset, changed by such flags as `--model.remat block`; `prog` and `description` are
    for help.

    Raises ValueError for a file that is missing or is no preset and for flags that contradict each other, and
    SystemExit where tyro does: for `--help` and for flags that it cannot parse.
    """
    import tyro

    path = user_path(path, "config")
    if not path.is_file():
        folder = pathlib.Path(__file__).parents[2]
        known = ", ".join(sorted(f"configs/{preset.name}" for preset in (folder / "configs").glob("*.py")))
        raise ValueError(f"config is {str(path)!r}: no such file" + (f"; there are {known}" if known else ""))
    config = _run(path).get("config") if path.suffix == ".py" else None
    if not isinstance(config, TrainConfig):
        raise ValueError(
            f"config is {str(path)!r}: must be a Python file that ends with `config = TrainConfig(...)`"
        )
    for flag in flags:
        name = flag.partition("=")[0].removeprefix("--").replace("-", "_")
        if flag.startswith("--") and name in FORMER_NAMES:
            raise ValueError(f"{flag}: renamed to --{_spelled(FORMER_NAMES[name].split('.'))}")
    description = f"{(description or TrainConfig.__doc__).strip()}\n\n{_about_sections(config)}"
    config, flags = switch_sections(config, flags)
    settings = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
    return tyro.cli(
        TrainConfig, default=config, args=flags, prog=prog, description=description, config=settings
    )


def _run(path: pathlib.Path) -> dict[str, typing.Any]:
    """Returns the variables of a preset. Raises ValueError for a field by its former name."""
    try:
        return runpy.run_path(str(path))
    except TypeError as error:
        named = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        for former, name in FORMER_NAMES.items():
            if named and former.endswith(f".{named[1]}"):
                raise ValueError(f"{path}: {former} was renamed to {name}") from None
        raise


def switch_sections(config: TrainConfig, flags: Sequence[str]) -> tuple[TrainConfig, list[str]]:
    """Switches sections off and on that may be None, which tyro does only by subcommands.

    `--model.rope-scaling None` makes the section None; a flag for one of its fields gives a section that is
    None its default values. Returns the config, and the flags without those that say None.
    """
    words = list(flags)
    for path, section in optional_sections(TrainConfig).items():
        name = ".".join(path)
        value, words, fields = _take_flags(name, words)
        example = f"--{_spelled((*path, dataclasses.fields(section)[0].name))}"
        require(value in ("", "None"), name, value, f"must be None; a flag such as {example} switches it on")
        require(not (value and fields), name, None, f"leave out {' and '.join(fields)}, which switches it on")
        if value:
            config = _replaced(config, path, None)
        # Help shows the fields of every section.
        elif _value(config, path) is None and (fields or {"-h", "--help"} & set(words)):
            config = _replaced(config, path, section())
    return config, words


def optional_sections(cls: type, path: Path = ()) -> dict[Path, type]:
    """The fields that hold a section of settings or None, with the class of the section."""
    found = {}
    for name, kind in typing.get_type_hints(cls).items():
        kinds = typing.get_args(kind) or (kind,)
        for section in filter(dataclasses.is_dataclass, kinds):
            found |= {(*path, name): section} if type(None) in kinds else {}
            found |= optional_sections(section, (*path, name))
    return found


def takes_several(flag: str) -> bool:
    """Returns True if a flag, such as model.layer-types, takes any number of values."""
    kind: typing.Any = TrainConfig
    for name in flag.replace("-", "_").split("."):
        sections = [k for k in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(k)]
        kind = typing.get_type_hints(sections[0]).get(name) if sections else None
    return any(typing.get_origin(k) is tuple for k in (kind, *typing.get_args(kind)))


def with_settings(args: Sequence[str]) -> list[str]:
    """Rewrites `--model.remat block`, and any other flag with a dot, as `--set model.remat=block`."""
    words, rest = [], list(args)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if not name.startswith("--") or "." not in name:
            words.append(word)
            continue
        count = len(rest) if takes_several(name[2:]) else 1
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
        flags += [f"--{name}", *(value.split() if takes_several(name) else [value])]
    return flags


def _take_flags(name: str, words: Sequence[str]) -> tuple[str, list[str], list[str]]:
    """The last value given for a section, the words without it, and the flags for fields of the section."""
    value, others, fields, rest = "", [], [], list(words)
    while rest:
        word = rest.pop(0)
        flag, equals, text = word.partition("=")
        flag = flag.replace("-", "_")
        if flag == f"__{name}":
            value = text if equals else rest.pop(0) if rest else ""
            require(value != "", name, value, "must be None, or left out")
            continue
        others.append(word)
        if flag.startswith(f"__{name}."):
            fields.append(word.partition("=")[0])
    return value, others, fields


def _about_sections(config: TrainConfig) -> str:
    """Help text for sections that may be None."""
    sections = optional_sections(TrainConfig)
    names = ", ".join(f"--{_spelled(path)} None" for path in sections)
    off = ", ".join(".".join(path) for path in sections if _value(config, path) is None)
    return (
        f"{names} switches that section off; a flag for one of its fields switches it on, with the defaults "
        f"shown for the others. Off in this preset: {off or 'none'}."
    )


def _spelled(path: Sequence[str]) -> str:
    return ".".join(path).replace("_", "-")


def _value(config: typing.Any, path: Path) -> typing.Any:
    for name in path:
        config = getattr(config, name, None)
    return config


def _replaced(config: typing.Any, path: Path, value: typing.Any) -> typing.Any:
    name, *rest = path
    inner = _replaced(getattr(config, name), tuple(rest), value) if rest else value
    return dataclasses.replace(config, **{name: inner})
