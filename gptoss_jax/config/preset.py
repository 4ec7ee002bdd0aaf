"""Presets (Python files that end with `config = TrainConfig(...)`), and flags for their fields."""

import copy
import dataclasses
import inspect
import itertools
import os
import pathlib
import re
import runpy
import shlex
from collections.abc import Sequence
from typing import Any

from gptoss_jax.config.base import FORMER_NAMES, nearest, require
from gptoss_jax.config.command_line import EXAMPLES, parse
from gptoss_jax.config.model import LoraConfig, RopeScaling
from gptoss_jax.config.paths import user_path
from gptoss_jax.config.train import TrainConfig

# Optional sections of `model`, which tyro could switch on and off only with subcommands.
OPTIONAL_SECTIONS = {"model.rope_scaling": RopeScaling, "model.lora": LoraConfig}
# Fields with any number of values.
TUPLES = ("model.layer_types", "model.lora.targets", "grpo.rewards", "grpo.reward_weights")


def read_preset(
    path: str | pathlib.Path,
    flags: Sequence[str] = (),
    prog: str | None = None,
    description: str | None = None,
) -> TrainConfig:
    """Returns the config of a preset, with flags such as `--model.remat block` applied.

    Args:
      path: a preset file, or one of `preset_names`.
      flags: as in `sys.argv`.
      prog: name of the command in `--help`; None uses that of the process.
      description: for `--help`; see `command_line.parse`.

    Raises ValueError for a file that is missing or not a preset, for former field names, and for
    contradictory flags; SystemExit, as tyro does, for `--help` and flags that it cannot parse.
    """
    import tyro

    path = find_preset(path)
    config: Any = _run(path) if path.suffix == ".py" else None
    allowed = "must be a Python file that ends with `config = TrainConfig(...)`"
    require(isinstance(config, TrainConfig), "config", str(path), allowed)
    for flag in flags:
        if _field(flag) in FORMER_NAMES:
            raise ValueError(f"{flag}: renamed to {_flag(FORMER_NAMES[_field(flag)])}")
    off = [section for section in OPTIONAL_SECTIONS if getattr(config.model, _name(section)) is None]
    note = (
        f"{' and '.join(map(_flag, OPTIONAL_SECTIONS))} are optional sections. Setting any of their fields "
        "switches a section on, with the defaults below for the others; the value None switches it off. Off "
        f"in this preset: {', '.join(map(_flag, off)) or 'none'}."
    )
    summary, heading, examples = inspect.cleandoc(description or TrainConfig.__doc__ or "").partition(
        EXAMPLES
    )
    for section in OPTIONAL_SECTIONS:
        config, flags = _switch_section(config, flags, section)
    settings = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
    about = f"{summary.strip()}\n\n{note}\n{heading}{examples}"
    return parse(TrainConfig, prog, flags, about, default=config, config=settings)


def preset_folder() -> pathlib.Path:
    """Returns the folder with the presets: in the installed package, or `configs/` in the checkout."""
    package = pathlib.Path(__file__).parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def preset_names() -> list[str]:
    """Returns the names of the presets, pretraining first."""
    paths = preset_folder().rglob("*.py")
    return [path.stem for path in sorted(paths, key=lambda path: (len(path.parts), path.name))]


def find_preset(path: str | os.PathLike) -> pathlib.Path:
    """Finds the file of a preset.

    Args:
      path: an existing file, the name of a preset (`gpt_oss_20b`, `gpt-oss-20b`), or its path in the
        repository (`configs/gpt_oss_20b.py`).

    Raises ValueError for anything else.
    """
    found = user_path(path, "config")
    if found.is_file():
        return found
    name = found.with_suffix("") if found.suffix == ".py" else found
    stem, folder = name.name.replace("-", "_"), name.parent.as_posix()
    for preset in preset_folder().rglob("*.py"):
        in_repository = ("configs" / preset.parent.relative_to(preset_folder())).as_posix()
        if preset.stem == stem and folder in (".", in_repository, in_repository.removeprefix("configs/")):
            return preset
    if (found / "config.json").is_file():
        allowed = (
            "a run folder, not a preset; to resume the run, repeat the command that started it (its "
            f"settings are in {found / 'config.json'})"
        )
        require(False, "config", os.fspath(path), allowed)
    names, near = ", ".join(preset_names()), nearest(name.name, preset_names())
    hint = f" (did you mean {near}?)" if near else ""
    raise ValueError(f"config is {os.fspath(path)!r}: no such file or preset{hint}; the presets are {names}")


def _run(path: pathlib.Path) -> object:
    """Runs a preset and returns its `config`. Raises ValueError for a former field name."""
    try:
        return runpy.run_path(str(path)).get("config")
    except TypeError as error:
        named = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        for former, name in FORMER_NAMES.items():
            if named and former.endswith(f".{named[1]}"):
                raise ValueError(f"{path}: {former} was renamed to {name}") from None
        raise


def _flag(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def _field(word: str) -> str:
    """Returns the field that a command-line word sets, such as model.remat; "" if it is not a flag."""
    return word.partition("=")[0][2:].replace("-", "_") if word.startswith("--") else ""


def _name(section: str) -> str:
    return section.partition(".")[2]


def _switch_section(config: TrainConfig, flags: Sequence[str], section: str) -> tuple[TrainConfig, list[str]]:
    """Applies a flag such as `--model.rope-scaling None`, or switches the section on if a flag sets one of
    its fields.

    Returns the config, and the flags that are left.
    """
    words, value = list(flags), getattr(config.model, _name(section))
    fields = [word.partition("=")[0] for word in words if _field(word).startswith(f"{section}.")]
    # Help shows the fields of every section.
    if fields or {"-h", "--help"} & set(words):
        value = value or OPTIONAL_SECTIONS[section]()
    while section in (names := [_field(word) for word in words]):
        at = names.index(section)
        _, equals, given = words.pop(at).partition("=")
        if not equals and at < len(words):
            given = words.pop(at)
        require(given != "", section, given, "must be None, or left out")
        example = f"{_flag(section)}.{dataclasses.fields(OPTIONAL_SECTIONS[section])[0].name}"
        require(given == "None", section, given, f"must be None; a flag such as {example} switches it on")
        allowed = f"leave out {' and '.join(fields)}, which switches it on"
        require(not fields, section, None, allowed)
        value = None
    model = dataclasses.replace(config.model, **{_name(section): value})
    # Not yet checked against the other sections: flags that are left may change these.
    switched = copy.copy(config)
    object.__setattr__(switched, "model", model)
    return switched, words


def with_settings(args: Sequence[str]) -> list[str]:
    """Rewrites `--model.remat block`, and any other flag with a dot, as `--set model.remat=block`."""
    words, rest = [], list(args)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if not name.startswith("--") or "." not in name:
            words.append(word)
            continue
        count = len(rest) if _field(word) in TUPLES else 1
        values = list(itertools.takewhile(lambda word: not word.startswith("--"), rest[:count]))
        if not equals and values:
            value, rest = shlex.join(values), rest[len(values) :]
        words += ["--set", f"{name[2:]}={value}"]
    return words


def flags_of(settings: Sequence[str]) -> list[str]:
    """Converts settings such as `model.remat=block` to flags of `gptoss train`."""
    flags = []
    for setting in settings:
        name, _, value = setting.partition("=")
        values = _split(name, value) if _field(f"--{name}") in TUPLES else [value]
        flags += [f"--{name}", *values]
    return flags


def _split(name: str, values: str) -> list[str]:
    """Splits values at spaces outside of quotes, like a shell, but keeps backslashes, as in patterns. Raises
    ValueError for a quote that is not closed."""
    lexer = shlex.shlex(values, posix=True, punctuation_chars=False)
    lexer.whitespace_split, lexer.escape, lexer.commenters = True, "", ""
    try:
        return list(lexer)
    except ValueError:
        raise ValueError(f"{name} is {values!r}: has a quote that is not closed") from None
