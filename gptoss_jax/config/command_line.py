"""Command-line parsing with tyro, and help pages that end with examples."""

import inspect
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from gptoss_jax.terminal import has_colors

Parsed = TypeVar("Parsed")
EXAMPLES = "\nExamples:\n"


def parse(
    command: Callable[..., Parsed], prog: str | None, args: Sequence[str], about: str, **settings: Any
) -> Parsed:
    """Parses arguments with tyro and returns the result of calling `command`, such as a dataclass, with them.

    Args:
      command: its parameters become the flags.
      prog: name of the command on the help page; None uses that of the process.
      args: command-line arguments, as in `sys.argv[1:]`.
      about: description of the command and an "Examples:" section of indented command lines, which is printed
        at the end of the help page.
      settings: keyword arguments for `tyro.cli`.

    Raises SystemExit, as tyro does, for `--help` and arguments that cannot be parsed.
    """
    import tyro

    # tyro only checks whether stdout is a terminal, and its white lines are invisible on a white background.
    tyro._experimental_options["ansi_codes"] = has_colors(sys.stdout) and has_colors(sys.stderr)
    tyro.extras.set_accent_color("cyan")
    summary, _, examples = inspect.cleandoc(about).partition(EXAMPLES)
    asks_help = not {"-h", "--help"}.isdisjoint(args)
    if asks_help:
        print(wrapped(summary.strip()), end="\n\n")
    try:
        return tyro.cli(command, prog=prog, args=args, description="", **settings)
    except SystemExit as done:
        if asks_help and examples and not done.code:
            print(f"\nExamples:\n{examples.rstrip()}")
        raise


def wrapped(text: str) -> str:
    """Wraps paragraphs of text for the terminal; indented lines are left unchanged."""
    width = max(min(shutil.get_terminal_size().columns, 100), 20)
    lines, flowing = [], []
    for line in [*text.split("\n"), ""]:
        if line[:1].strip():
            flowing.append(line)
            continue
        lines += textwrap.wrap(" ".join(flowing), width, break_on_hyphens=False, break_long_words=False)
        flowing = []
        lines.append(line)
    return "\n".join(lines[:-1])
