"""Train or fine-tune a model, or resume a run.

The first argument is a preset, a Python file that ends with `config = TrainConfig(...)`; the default is
configs/quickstart.py. Every field of its config is a flag, and the defaults below are those of the preset. To
resume an interrupted run from its last checkpoint, run the same command again.

Examples:
  python train.py
  python train.py configs/tinystories.py --steps 500 --optim.learning-rate 3e-4
  python train.py --data.source 'text:books/*.txt' --run-dir runs/books
  python train.py configs/gpt_oss_20b.py --mesh.fsdp 2 --mesh.expert 8 --run-dir runs/mine
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
