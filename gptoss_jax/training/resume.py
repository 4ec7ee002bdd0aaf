"""Which settings a resumed run may change, and what a change means for its result."""

import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from gptoss_jax.checkpoints.run import check_folder_name
from gptoss_jax.config import TrainConfig, require
from gptoss_jax.training.console import format_rate
from gptoss_jax.training.optimizer import make_schedule

# Sections and fields that a resumed run may change, because they do not change what it computes. `init_from`
# is read only by a run without a checkpoint; about the number of steps see `check_steps`.
FREE_FIELDS = (
    "run_dir", "data.cache_dir", "mesh", "model.remat", "model.kernels", "checkpoint", "eval", "log_every",
    "steps", "init_from",
)  # fmt: skip


def check_folder(config: TrainConfig) -> None:
    """Raises ValueError when no checkpoint could be written to the run folder, or when it was made with a
    config that computes something else, naming the fields that differ."""
    run_dir = pathlib.Path(config.run_dir)
    check_folder_name(run_dir.absolute(), "run_dir", config.run_dir)
    path = run_dir / "config.json"
    if not path.exists() or not has_checkpoints(run_dir):
        return
    before, now = flatten(TrainConfig.load(path).to_dict()), flatten(config.to_dict())
    differing = [
        f"{name} (was {before.get(name)!r}, is {now.get(name)!r})"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and not _is_free(name)
    ]
    if differing:
        raise ValueError(
            f"run_dir is {config.run_dir!r}: made with another config: {', '.join(differing)}. "
            "Name another --run-dir, or start it with the same settings"
        )


def has_checkpoints(run_dir: pathlib.Path) -> bool:
    """Returns True if a run has reached a checkpoint. The folder of one that has not may be overwritten."""
    return any(path.name.isdigit() for path in run_dir.glob("checkpoints/*"))


def _is_free(name: str) -> bool:
    return any(name == free or name.startswith(f"{free}.") for free in FREE_FIELDS)


def check_steps(
    config: TrainConfig, record: dict[str, Any], step: int, updates: int, report: Callable[[str], None]
) -> bool:
    """Reports how a new number of steps changes a run that is resumed at `step`.

    The result is that of a run with the new number from the start if the new schedule gives all `updates`
    made so far the learning rates that they had.

    Returns True if the schedule has jumped, now or when the run was resumed before. Raises ValueError when
    the run is already past the new number.
    """
    steps_before, jumped = record["config"]["steps"], record.get("schedule_jumped", False)
    if config.steps == steps_before:
        return jumped
    require(config.steps > step, "steps", config.steps, f"must be above {step}, the last step of the run")
    before, now = (make_schedule(config.optim, steps) for steps in (steps_before, config.steps))
    made = np.arange(updates)
    changed = f"steps is {config.steps} (was {steps_before})"
    if np.allclose(before(made), now(made), rtol=1e-6, atol=0):
        meaning = (
            "the schedule jumped at an earlier change of steps, so the result differs from"
            if jumped
            else "the steps so far are also those of"
        )
        report(f"{changed}: {meaning} a run of {config.steps} steps")
        return jumped
    rates = [format_rate(float(rate)) for rate in (before(max(updates - 1, 0)), now(updates))]
    report(
        f"{changed}: the {config.optim.schedule} schedule jumps from a learning rate of {rates[0]} at step "
        f"{step} to {rates[1]} at step {step + 1}; the result differs from a run of {config.steps} steps"
    )
    return True


def report_changes(config: TrainConfig, record: dict[str, Any], report: Callable[[str], None]) -> None:
    """Reports settings that a resumed run no longer reads, or that make earlier losses incomparable."""
    before = record["config"]
    if config.init_from not in (None, before.get("init_from")):
        report(f"init_from is {config.init_from!r}: not read, because the run resumes from its checkpoint")
    batches, batches_before = config.eval.batches, before["eval"]["batches"]
    if batches != batches_before:
        report(
            f"eval.batches is {batches} (was {batches_before}): the best checkpoint is chosen among those "
            f"evaluated on {batches} batches"
        )


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Returns nested dicts as one, with the path of each value (`optim.learning_rate`) as its name."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        k: v for name, value in tree.items() for k, v in flatten(value, f"{prefix}.{name}".strip(".")).items()
    }
