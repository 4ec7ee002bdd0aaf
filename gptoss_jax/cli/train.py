"""`gptoss train`, also `python train.py`."""

import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from gptoss_jax import interrupts, startup, status
from gptoss_jax.config import TrainConfig
from gptoss_jax.config.paths import set_matplotlib_folder
from gptoss_jax.config.preset import preset_folder, preset_names, read_preset
from gptoss_jax.terminal import is_terminal


@dataclasses.dataclass(frozen=True)
class Train:
    """Train or fine-tune a model, or resume a run.

    The first argument is a preset: its name, or a Python file that ends with `config = TrainConfig(...)`.
    The presets are {presets}; the default is quickstart. Every field of its config is a flag, and the
    defaults below are those of the preset. To resume an interrupted run from its last checkpoint, run the
    same command again.

    Examples:
      gptoss train
      gptoss train tinystories --steps 500 --optim.learning-rate 3e-4
      gptoss train --data.source 'text:books/*.txt' --run-dir runs/books
      gptoss train gpt_oss_20b --init-from hf:openai/gpt-oss-20b --mesh.expert 8 --run-dir runs/mine
    """


def read_arguments(arguments: Sequence[str], command: str) -> TrainConfig:
    """Returns the config of a command line.

    Args:
      arguments: a preset, if the first is not a flag, and flags.
      command: what the user types before them, for `--help`: `gptoss train`.
    """
    preset, flags = preset_folder() / "quickstart.py", list(arguments)
    if flags and not flags[0].startswith("-"):
        preset = pathlib.Path(flags.pop(0))
    about = (Train.__doc__ or "").format(presets=", ".join(preset_names())).replace("gptoss train", command)
    return read_preset(preset, flags, prog=f"{command} [PRESET]", description=about)


def run(arguments: Sequence[str], command: str, name: str) -> None:
    """Trains what a command line asks for, as one of the processes of a job; `name` prefixes its messages."""
    config = read_arguments(arguments, command)
    if status.is_enabled():
        status.enable(lambda: sys.stdout)  # in the run's log
    set_matplotlib_folder()
    with interrupts.explain("no training was lost; to continue, run the same command again"):
        # In a log file, no process may print before it knows whether it is the first.
        with status.status("starting") if is_terminal(sys.stdout) else contextlib.nullcontext():
            import jax

            from gptoss_jax.parallel import distributed
            from gptoss_jax.training.loop import train

        with distributed.distributed_session(name):
            if jax.process_index() != 0:
                status.enable(None)
            train(config)


def main() -> NoReturn:
    """Runs the command line of `train.py` and ends the process."""
    status.enable(lambda: sys.stdout)
    startup.keep_memory()
    startup.hide_tpu_compiler()
    startup.leave(startup.run(lambda: run(sys.argv[1:], "python train.py", "train.py"), "train.py"))
