"""A preset, a Python file that ends with `config = TrainConfig(...)`, with flags for its fields."""

import pathlib
import runpy
from collections.abc import Sequence

from gptoss_jax.config.paths import user_path
from gptoss_jax.config.train import TrainConfig


def read_preset(
    path: str | pathlib.Path,
    flags: Sequence[str] = (),
    prog: str | None = None,
    description: str | None = None,
) -> TrainConfig:
    """The config of a preset, changed by such flags as `--model.remat block`; `prog` and `description` are
    for help.

    Raises ValueError for a file that is missing or is no preset, and SystemExit where tyro does: for `--help`
    and for flags that it cannot parse.
    """
    import tyro

    path = user_path(path, "config")
    if not path.is_file():
        folder = pathlib.Path(__file__).parents[2]
        known = ", ".join(sorted(f"configs/{preset.name}" for preset in (folder / "configs").glob("*.py")))
        raise ValueError(f"config is {str(path)!r}: no such file" + (f"; there are {known}" if known else ""))
    config = runpy.run_path(str(path)).get("config") if path.suffix == ".py" else None
    if not isinstance(config, TrainConfig):
        raise ValueError(
            f"config is {str(path)!r}: must be a Python file that ends with `config = TrainConfig(...)`"
        )
    settings = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
    return tyro.cli(
        TrainConfig, default=config, args=list(flags), prog=prog, description=description, config=settings
    )
