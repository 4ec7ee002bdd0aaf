"""Reads model parameters from the checkpoints of training runs."""

import contextlib
import json
import pathlib
from collections.abc import Iterator

import jax

from gptoss_jax.checkpoints.base_model import BaseModel
from gptoss_jax.checkpoints.lazy_tensors import host_device
from gptoss_jax.checkpoints.run import Checkpoints
from gptoss_jax.config import TrainConfig
from gptoss_jax.data.tokenizer import Tokenizer, load_tokenizer
from gptoss_jax.model.parameters import split_params
from gptoss_jax.model.transformer import abstract_params


def is_run(folder: str | pathlib.Path) -> bool:
    """Returns True if a folder is a training run, whose config.json holds a `TrainConfig`."""
    try:
        values = json.loads((pathlib.Path(folder) / "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and {"model", "data", "optim"} <= values.keys()


def load_run(
    folder: str | pathlib.Path, step: int | None = None, abstract: dict | None = None
) -> tuple[TrainConfig, dict, Tokenizer]:
    """Loads config, parameters and tokenizer of a run; see `read_checkpoint`.

    Raises ValueError like `read_checkpoint`, and for a run that trained adapters.
    """
    config, base, params = read_checkpoint(folder, step, abstract)
    if base is not None:
        raise ValueError(f"{folder}: holds an adapter, not a whole model; its base model is {base.folder}")
    return config, params, load_tokenizer(folder)


def read_checkpoint(
    folder: str | pathlib.Path, step: int | None = None, abstract: dict | None = None
) -> tuple[TrainConfig, BaseModel | None, dict]:
    """Reads the parameters in a run's checkpoint.

    Args:
      step: step of the checkpoint; None: the one with the lowest validation loss, or the latest if none has
        one.
      abstract: abstract parameter tree with shardings; None loads to host memory.

    Returns the config, the base model if the run trained adapters, and the parameters: the whole model, or
    only the trained ones. Raises ValueError if the folder is not a run or has no such checkpoint.
    """
    with open_checkpoint(folder, step) as (config, checkpoints, step):
        if abstract is None:
            sharding = jax.sharding.SingleDeviceSharding(host_device())
            abstract = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                _abstract_params(config, checkpoints, step),
            )
        base = BaseModel.from_record(checkpoints.record(step))
        return config, base, checkpoints.restore_params(step, abstract)


def open_params(
    folder: str | pathlib.Path, step: int | None = None
) -> tuple[TrainConfig, BaseModel | None, dict]:
    """Same as `read_checkpoint`, but the parameters are `StoredArray`s, to be read slice by slice."""
    with open_checkpoint(folder, step) as (config, checkpoints, step):
        base = BaseModel.from_record(checkpoints.record(step))
        return config, base, checkpoints.open_params(step, _abstract_params(config, checkpoints, step))


def _abstract_params(config: TrainConfig, checkpoints: Checkpoints, step: int) -> dict:
    """Returns the abstract parameters in a checkpoint: all of the model's, or only the trained ones."""
    paths = checkpoints.parameter_paths(step)
    return split_params(abstract_params(config.model), paths.__contains__)[0]


def run_base(folder: str | pathlib.Path) -> BaseModel | None:
    """Returns the base model of a run that trained adapters; None if its checkpoints hold whole models."""
    with open_checkpoint(folder) as (_, checkpoints, step):
        return BaseModel.from_record(checkpoints.record(step))


@contextlib.contextmanager
def open_checkpoint(
    folder: str | pathlib.Path, step: int | None = None
) -> Iterator[tuple[TrainConfig, Checkpoints, int]]:
    """Opens a run's checkpoints and selects one as `read_checkpoint` does."""
    folder = pathlib.Path(folder)
    config = TrainConfig.load(folder / "config.json")
    if not (folder / "checkpoints").is_dir():
        raise ValueError(f"{folder}: contains no checkpoint yet")
    with contextlib.closing(
        Checkpoints(folder, read_only=True, eval_batches=config.eval.batches)
    ) as checkpoints:
        steps, best = checkpoints.steps, checkpoints.best_step
        if not steps:
            raise ValueError(f"{folder}: contains no checkpoint yet")
        if step is None:
            step = steps[-1] if best is None else best
        if step not in steps:
            known = ", ".join(map(str, steps))
            raise ValueError(f"{folder}: has no checkpoint for step {step}; it has {known}")
        yield config, checkpoints, step
