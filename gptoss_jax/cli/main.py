"""The `gptoss` command, also `python -m gptoss_jax`."""

import dataclasses
import sys
from collections.abc import Sequence

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
from gptoss_jax.config.kernels import kernel_variable
from gptoss_jax.config.paths import set_matplotlib_folder
from gptoss_jax.config.preset import with_settings


@dataclasses.dataclass(frozen=True)
class Check:
    """Compare every kernel of this machine with plain XLA on small inputs: correctness and time.

    Exits with 1 if one is wrong. GPTOSS_JAX_KERNELS=plain runs everything without kernels, plain:NAME,NAME
    without the named ones.
    """

    # Also write the results to this file.
    json_file: JsonFile = None

    def run(self) -> None:
        from gptoss_jax.cli import check

        if not check.run(self.json_file):
            raise SystemExit(1)


# Each is a dataclass of its arguments. Their modules import jax only when they run.
COMMANDS = {
    "generate": Generate,
    "chat": Chat,
    "serve": Serve,
    "eval": Evaluate,
    "convert": Convert,
    "export-adapter": ExportAdapter,
    "merge": Merge,
    "report": Report,
    "check": Check,
    "plan": Plan,
    "inspect-data": InspectData,
}
# Worth the restart that keeps memory in huge pages.
RUN_MODELS = ("generate", "chat", "serve", "eval")


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command line, by default the process's, and returns its exit code; see `startup.run`.

    Raises SystemExit when tyro does: after `--help` and for arguments that it cannot parse.
    """
    if args is None and sys.argv[1:2] in ([name] for name in RUN_MODELS) and "--help" not in sys.argv:
        startup.keep_memory()
    startup.hide_tpu_compiler()
    set_matplotlib_folder()
    is_process, args = args is None, list(sys.argv[1:] if args is None else args)
    if args[:1] in (["plan"], ["inspect-data"]):
        args = with_settings(args)

    def run_command() -> None:
        kernel_variable()  # raises for a bad value before anything is printed
        description = "Run, serve, evaluate, convert and plan gpt-oss models in JAX."
        settings = tyro.extras.subcommand_cli_from_dict(
            COMMANDS, prog="gptoss", description=description, args=args
        )
        settings.run()

    code = startup.run(run_command, "gptoss")
    return startup.leave(code) if is_process else code
