"""Trains a model: python train.py [configs/x.py] [--steps 500 --model.num-hidden-layers 6 …].

The first argument may be a preset, a Python file that ends with `config = TrainConfig(...)`; the default is
configs/quickstart.py. Every field is a flag: --help lists them. Running the same command again resumes from
the last checkpoint of the run.
"""

import pathlib
import sys

from gptoss_jax import startup
from gptoss_jax.config.paths import set_matplotlib_folder


def read_arguments(arguments: list[str]):
    """Returns the `TrainConfig` of a command line."""
    from gptoss_jax.config.preset import read_preset

    preset = pathlib.Path(__file__).parent / "configs" / "quickstart.py"
    if arguments and not arguments[0].startswith("-"):
        preset, arguments = arguments[0], arguments[1:]
    return read_preset(preset, arguments, description=__doc__)


def main() -> None:
    startup.hide_tpu_compiler()
    config = read_arguments(sys.argv[1:])
    set_matplotlib_folder()
    from gptoss_jax import train
    from gptoss_jax.parallel import distributed

    with distributed.distributed_session("train.py"):
        train(config)


if __name__ == "__main__":
    startup.keep_memory()
    startup.leave(startup.run(main, "train.py"))
