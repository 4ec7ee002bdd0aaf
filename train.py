"""Trains a model: python train.py [configs/x.py] [--steps 500 --model.num-hidden-layers 6 …].

The first argument may be a preset, a Python file that ends with `config = TrainConfig(...)`; without one it
is configs/quickstart.py. Every field can be set with a flag: --help lists them. Running the same line again
goes on from the run's last checkpoint.
"""

import pathlib
import runpy
import sys

from gptoss_jax import startup


def read_arguments(arguments: list[str]):
    """The `TrainConfig` of a command line."""
    import tyro

    from gptoss_jax.config import TrainConfig

    here = pathlib.Path(__file__).parent
    preset = here / "configs" / "quickstart.py"
    if arguments and not arguments[0].startswith("-"):
        preset, arguments = pathlib.Path(arguments[0]), arguments[1:]
    if not preset.is_file():
        known = ", ".join(sorted(f"configs/{path.name}" for path in (here / "configs").glob("*.py")))
        raise ValueError(f"config is {str(preset)!r}: no such file; there are {known}")
    config = runpy.run_path(str(preset)).get("config")
    if not isinstance(config, TrainConfig):
        raise ValueError(f"config is {str(preset)!r}: must end with `config = TrainConfig(...)`")
    settings = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
    return tyro.cli(TrainConfig, default=config, args=arguments, description=__doc__, config=settings)


def main() -> None:
    config = read_arguments(sys.argv[1:])
    from gptoss_jax import train
    from gptoss_jax.parallel import processes

    with processes.joined("train.py"):
        train(config)


if __name__ == "__main__":
    startup.use_huge_pages()
    sys.exit(startup.run(main, "train.py"))
