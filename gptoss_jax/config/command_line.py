"""Command-line parsing with tyro, and help pages that end with examples."""

import contextlib
import inspect
import io
import re
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

    Raises SystemExit after `--help`, as tyro does, and ValueError with one line for arguments that cannot be
    parsed.
    """
    import tyro

    # tyro only checks whether stdout is a terminal, and its white lines are invisible on a white background.
    tyro._experimental_options["ansi_codes"] = has_colors(sys.stdout) and has_colors(sys.stderr)
    tyro.extras.set_accent_color("cyan")
    summary, _, examples = inspect.cleandoc(about).partition(EXAMPLES)
    asks_help = not {"-h", "--help"}.isdisjoint(args)
    if asks_help:
        print(wrapped(summary.strip()), end="\n\n")
    problems: list[Any] = []
    printed = io.StringIO()
    try:
        with contextlib.ExitStack() as stack:
            # Private: a version without it prints its own message.
            if (
                on_parse_error := getattr(getattr(tyro, "_errors", None), "on_parse_error", None)
            ) is not None:
                stack.enter_context(on_parse_error(problems.append))
            stack.enter_context(contextlib.redirect_stderr(printed))
            return tyro.cli(command, prog=prog, args=args, description="", **settings)
    except SystemExit as done:
        if asks_help and examples and not done.code:
            print(f"\nExamples:\n{examples.rstrip()}")
        message = _describe(problems[-1], printed.getvalue()) if problems and done.code else None
        if message is not None:
            raise ValueError(message) from None
        sys.stderr.write(printed.getvalue())
        raise


def _describe(problem: Any, printed: str) -> str | None:
    """Returns one line for a `ParseErrorEvent` of tyro and its printed message, or None if it is unknown."""
    see = f"see {re.sub(r' [^a-z]*$', '', problem.prog)} --help"
    kind, argument = type(problem).__name__, getattr(problem, "argument", None)
    name = "" if argument is None else _names(argument)[0]
    if kind == "UnrecognizedArgs":
        flags = [token.partition("=")[0] for token in problem.tokens if token.startswith("-")]
        near = re.search(r"(?m)^\W*(--[a-z][\w.-]+)", printed.partition(":")[2].partition("\n")[2])
        hint = f"did you mean {near[1]}?" if near and len(flags) == 1 else see
        if flags:
            return f"{', '.join(flags)}: no such option{'s' * (len(flags) > 1)}; {hint}"
        return f"{' '.join(map(repr, problem.tokens))}: unexpected argument; {see}"
    if kind == "MissingArgs":
        missing = [" ".join(_names(one.arg)) for one in problem.missing_arguments]
        return f"missing {' and '.join(missing)}; {see}"
    if kind == "InvalidChoice":
        choices = list(problem.choices)
        if "None" in choices:  # tyro has them from a set, in any order
            choices = [*sorted({*choices} - {"None"}), "None"]
        *most, last = choices
        return f"{name} is {problem.value!r}: must be {', '.join(most)} or {last}"
    if kind == "BadValue":
        return f"{name}: needs a value ({' '.join(_names(argument)[1:])}); {see}"
    if kind == "InstantiationFailure" and argument is None:
        return problem.message
    if kind == "InstantiationFailure":
        value = re.search(r"\['(.*)'\]|'([^']*)'$", problem.message)
        metavar = " ".join(_names(argument)[1:])
        allowed = "an integer" if "INT" in metavar else "a number" if "FLOAT" in metavar else metavar
        allowed += " or None" if "None" in metavar else ""
        return f"{name} is {(value[1] or value[2])!r}: must be {allowed}" if value else None
    return None


def _names(argument: Any) -> list[str]:
    """Returns the flag of an argument and the placeholder of its value, or only that if it is positional."""
    lowered = argument.lowered
    return [
        *(() if argument.is_positional() else lowered.name_or_flags[-1:]),
        *filter(None, [lowered.metavar]),
    ]


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
