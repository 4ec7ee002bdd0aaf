"""The `gptoss` command, also `python -m gptoss_jax`."""

import dataclasses
import importlib.metadata
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from gptoss_jax import startup
from gptoss_jax.cli.arguments import JsonFile
from gptoss_jax.cli.chat import Chat
from gptoss_jax.cli.convert import Convert
from gptoss_jax.cli.evaluate import Evaluate
from gptoss_jax.cli.export_adapter import ExportAdapter
from gptoss_jax.cli.generate import Generate
from gptoss_jax.cli.inspect_data import InspectData
from gptoss_jax.cli.merge import Merge
from gptoss_jax.cli.plan import Plan
from gptoss_jax.cli.report import Report
from gptoss_jax.cli.serve import Serve
from gptoss_jax.cli.train import Train
from gptoss_jax.cli.train import run as run_train
from gptoss_jax.config.base import nearest
from gptoss_jax.config.command_line import parse
from gptoss_jax.config.kernels import kernel_variable
from gptoss_jax.config.paths import set_matplotlib_folder
from gptoss_jax.config.preset import with_settings
from gptoss_jax.status import enable, status
from gptoss_jax.version import __version__


@dataclasses.dataclass(frozen=True)
class Check:
    """Check this machine's kernels against plain XLA.

    Compares results and speed of every kernel on small inputs. Exits with status 1 if a result is wrong. To
    disable kernels, set GPTOSS_JAX_KERNELS to plain (all of them) or plain:NAME,NAME (some).

    Examples:
      gptoss check
      gptoss check --json kernels.json
    """

    # Also write the results to this JSON file.
    json_file: JsonFile = None

    def run(self) -> None:
        with status("starting"):
            from gptoss_jax.cli import check

            check.start()
        if not check.run(self.json_file):
            raise SystemExit(1)


# Dataclasses of arguments; the docstring is the help page. Their modules import jax only when they run.
COMMANDS: dict[str, Callable[..., Any]] = {
    "train": Train,
    "inspect-data": InspectData,
    "plan": Plan,
    "report": Report,
    "generate": Generate,
    "chat": Chat,
    "serve": Serve,
    "eval": Evaluate,
    "convert": Convert,
    "merge": Merge,
    "export-adapter": ExportAdapter,
    "check": Check,
}
# The order of `gptoss --help`: the first command of each group, and the group's heading.
HEADINGS = {
    "train": "Train",
    "generate": "Use a model",
    "convert": "Convert weights",
    "check": "This machine",
}
ABOUT = "gpt-oss in JAX: train, fine-tune, run, serve and convert mixture-of-experts models."
# Worth the restart that keeps memory in huge pages.
RUN_MODELS = ("train", "generate", "chat", "serve", "eval")
COMPLETION = ("--tyro-print-completion", "--tyro-write-completion")


def overview() -> str:
    """Returns the page of `gptoss --help`: one line for each command."""
    lines = ["usage: gptoss COMMAND [OPTIONS]", "", ABOUT]
    for name, command in COMMANDS.items():
        if name in HEADINGS:
            lines += ["", f"{HEADINGS[name]}:"]
        lines.append(f"  {name:<16}{inspect.cleandoc(command.__doc__ or '').splitlines()[0].rstrip('.')}")
    lines += [
        "",
        "Options:",
        "  -h, --help      Show this page",
        "  --version       Show the versions in use",
    ]
    return "\n".join([*lines, "", "gptoss COMMAND --help shows the options of a command, with examples."])


def versions() -> str:
    """Returns this package's version, with those of Python and JAX."""
    others = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax")]
    return f"gptoss-jax {__version__}, {', '.join(others)}, Python {sys.version.split()[0]}"


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command line, by default the process's, and returns its exit code; see `startup.run`.

    Raises SystemExit when tyro does: after a command's `--help` and for arguments that it cannot parse.
    """
    is_process, args = args is None, list(sys.argv[1:] if args is None else args)
    if is_process:
        enable(lambda: sys.stderr)
    code = startup.run(lambda: _run(args, is_process), "gptoss")
    return startup.leave(code) if is_process else code


def _run(args: list[str], is_process: bool) -> None:
    name, rest = (args[0], args[1:]) if args else ("", [])
    if name in ("", "-h", "--help"):
        print(overview(), file=sys.stdout if name else sys.stderr)
        if not name:
            raise SystemExit(2)
        return
    if name == "--version":
        print(versions())
        return
    if name in COMPLETION:
        tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="gptoss", args=args)
    if name not in COMMANDS:
        near = nearest(name, COMMANDS)
        hint = f"did you mean {near}?" if near else "gptoss --help lists the commands"
        raise ValueError(f"{name!r} is not a command; {hint}")
    if is_process and name in RUN_MODELS and not {"-h", "--help"} & set(rest):
        startup.keep_memory()
    startup.hide_tpu_compiler()
    set_matplotlib_folder()
    kernel_variable()  # raises for a bad value before anything is printed
    if name == "train":  # its flags depend on the preset
        run_train(rest, "gptoss train", "gptoss")
        return
    command = COMMANDS[name]
    rest = with_settings(rest) if name in ("plan", "inspect-data") else rest
    parse(command, f"gptoss {name}", rest, command.__doc__ or "").run()
