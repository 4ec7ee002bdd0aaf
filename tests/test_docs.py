"""README, docs and benchmarks/README: links lead somewhere, and shown commands parse."""

import pathlib
import re
import runpy
import shlex
import tomllib

import pytest

from gptoss_jax.cli.main import COMMANDS
from gptoss_jax.config.command_line import parse
from gptoss_jax.config.preset import flags_of, preset_names, read_preset, with_settings
from gptoss_jax.model.parameters import LETTERS

ROOT = pathlib.Path(__file__).parents[1]
LINKS = runpy.run_path(str(ROOT / "docs" / "check_links.py"))
PAGES = [path for path in LINKS["markdown_files"]() if path.suffix == ".md"]
SHELL_BLOCK = re.compile(r"^ *```(?:sh|bash|console)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:gptoss|python train\.py|python benchmarks/)[^`\n]*)`")
# Words that stand for something of the reader's: FOLDER, RUN, OUT, or an elision.
PLACEHOLDER = re.compile(r"…|NAME")


def shown_commands(text: str) -> list[str]:
    """Returns the commands of a page, those of shell blocks and those in backticks."""
    lines = []
    for block in SHELL_BLOCK.findall(text):
        lines += block.replace("\\\n", " ").splitlines()
    commands = []
    for line in lines:
        line = re.sub(r"\s#.*|^#.*", "", line.removeprefix("$ "))
        line = re.sub(r"\s\d?[<>]&?\s*\S+", "", line)  # redirections
        for part in re.split(r"&&|\||;|(?<!&)&(?!&)", line):
            start = re.search(
                r"(?:\S*/)?\b(gptoss|python3? train\.py|python3? benchmarks/)(?=[\s\w]|$)", part
            )
            if start and re.fullmatch(
                r"\s*(?:[A-Z_]+=\S+ |mpirun .*|srun .*|nohup )*(?:\.venv/bin/)?", part[: start.start(1)]
            ):
                command = part[start.start(1) :].strip()
                # The last command of a quoted script, as for `ssh --command='…'`, ends with its quote.
                commands.append(command.removesuffix("'") if command.count("'") % 2 else command)
    inline = [" ".join(command.split()) for command in INLINE.findall(text)]
    # `gptoss eval --task` mentions a flag, without its value.
    commands += [words for words in inline if " " in words and not words.split()[-1].startswith("--")]
    return [command for command in commands if not PLACEHOLDER.search(command)]


SHOWN = sorted({command for path in PAGES for command in shown_commands(path.read_text(encoding="utf-8"))})


def test_finds_the_shown_commands():
    text = """Run `gptoss check`.
```sh
$ FLAG=1 gptoss eval runs/a \\
    --source stdlib  # comment
nohup gptoss train > log 2>&1 < /dev/null &
pip install x && python train.py
```"""
    assert shown_commands(text) == [
        "gptoss eval runs/a      --source stdlib",
        "gptoss train",
        "python train.py",
        "gptoss check",
    ]
    assert len(SHOWN) > 60


@pytest.mark.parametrize("command", SHOWN)
def test_shown_command_parses(command):
    words = shlex.split(command)
    if words[0] == "gptoss" and words[1] in ("--help", "--version"):
        return
    if words[0] == "gptoss" and words[2:] in (["--help"], []):
        assert words[1] in COMMANDS
    elif words[:2] in (["gptoss", "train"], ["python", "train.py"], ["python3", "train.py"]):
        preset, flags = ("quickstart", words[2:])
        if flags and not flags[0].startswith("-"):
            preset, flags = flags[0], flags[1:]
        if flags != ["--help"]:
            read_preset(preset, flags)
    elif words[0] == "gptoss":
        assert words[1] in COMMANDS
        rest = with_settings(words[2:]) if words[1] in ("plan", "inspect-data") else words[2:]
        arguments = parse(COMMANDS[words[1]], f"gptoss {words[1]}", rest, "")
        if words[1] == "plan":
            read_preset(arguments.config, flags_of(arguments.overrides))
    else:
        source = (ROOT / words[1]).read_text(encoding="utf-8")
        shared = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").glob("*.py"))
        for flag in (word for word in words[2:] if word.startswith("--")):
            assert f'"{flag}"' in source or f'"{flag}"' in shared


def test_installed_extras_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    for path in PAGES:
        for names in re.findall(r"(?:\.|gptoss-jax)\[([\w,-]+)\]", path.read_text(encoding="utf-8")):
            assert {*names.split(",")} <= {*extras}, f"{path.name}: [{names}]"


def test_every_preset_is_documented():
    text = (ROOT / "docs" / "pretraining.md").read_text() + (ROOT / "docs" / "fine-tuning.md").read_text()
    assert [name for name in preset_names() if f"`{name}`" not in text and f" {name} " not in text] == []


def test_math_explains_every_letter_of_a_parameter():
    text = (ROOT / "docs/math.md").read_text()
    assert {letter for letter in "".join(LETTERS.values()) if f"**{letter}**" not in text} == set()


def test_first_test_command_of_contributing_selects_a_test():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    [(file, word)] = re.findall(r"pytest -n 0 (\S+) -k (\w+)", text)
    assert re.search(rf"def test_\w*{word}", (ROOT / file).read_text())


def test_links_of_markdown_files():
    broken = [
        problem for path in LINKS["markdown_files"]() for problem in LINKS["broken_markdown_links"](path)
    ]
    assert broken == []


def test_broken_links_are_found(tmp_path):
    page = ROOT / "docs" / "index.md"
    check = LINKS["broken_markdown_links"]
    good = page.read_text(encoding="utf-8")
    assert list(check(page)) == []
    copy = ROOT / "docs" / f"broken-{tmp_path.name}.md"
    try:
        copy.write_text(
            f"# A: b\n[x](nowhere.md) [y](index.md#nowhere) [z](#a-b) `[n](no.md)`\n{good}", encoding="utf-8"
        )
        assert [problem.partition(": ")[2] for problem in check(copy)] == [
            "nowhere.md: no such file",
            "index.md#nowhere: no such heading",
        ]
    finally:
        copy.unlink()
