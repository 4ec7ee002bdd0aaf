"""Command lines: tyro's parser, with help pages that show examples."""

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
    """Parses arguments with tyro and returns what `command`, such as a dataclass, makes of them.

    Args:
      command: its arguments are the flags.
      prog: name of the command on the help page; None means that of the process.
      args: as in `sys.argv`, without the program.
      about: what the command does, and a section "Examples:" of indented command lines, which the help page
        ends with.
      settings: for `tyro.cli`.

    Raises SystemExit, as tyro does, for `--help` and arguments that cannot be parsed.
    """
    import tyro

    # tyro itself asks only whether stdout is a terminal, and its white lines are invisible on white.
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
    """Returns paragraphs of text, wrapped for the terminal; indented lines are kept as they are."""
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
