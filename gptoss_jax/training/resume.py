"""Initial or restored state of a run, and the settings that a resumed run may change."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from gptoss_jax.checkpoints.base_model import BaseModel
from gptoss_jax.checkpoints.load import read_params, warn_non_finite_params
from gptoss_jax.checkpoints.readers import find_tokenizer, local_folder, open_weights
from gptoss_jax.checkpoints.run import Checkpoints, check_folder_name
from gptoss_jax.checkpoints.run_params import is_run, load_run
from gptoss_jax.config import TrainConfig, require
from gptoss_jax.config.paths import require_writable
from gptoss_jax.data.token_cache import TokenCache
from gptoss_jax.model.lora import is_adapter
from gptoss_jax.model.parameters import IsTrainable, merge_params, split_params
from gptoss_jax.model.transformer import abstract_params
from gptoss_jax.status import status
from gptoss_jax.terminal import format_rate
from gptoss_jax.training.base_weights import find_base, first_adapters, load_base
from gptoss_jax.training.optimizer import make_schedule
from gptoss_jax.training.state import (
    TrainState,
    abstract_state,
    create_params,
    create_state,
    place_on_mesh,
)

# Sections and fields that a resumed run may change: they affect its results at most by rounding.
# `init_from` is used only by a run without a checkpoint, and as the base model of adapters, which must stay
# the same; for `steps`, see `check_steps`.
FREE_FIELDS = (
    "run_dir", "data.cache_dir", "data.invalid_rows", "mesh", "model.remat", "model.kernels", "checkpoint",
    "eval", "log_every", "optim.state_memory", "profile", "steps", "init_from", "init_adapter",
    "grpo.rewards", "grpo.reward_weights",
)  # fmt: skip


@status("preparing the weights")
def init_or_restore_state(
    config: TrainConfig,
    mesh: jax.sharding.Mesh,
    checkpoints: Checkpoints,
    cache: TokenCache,
    report: Callable[[str], None],
    is_trainable: IsTrainable | None = None,
) -> tuple[TrainState, dict, dict[str, Any]]:
    """Restores the last checkpoint, or initializes from `init_from` or at random.

    Returns the state, the frozen parameters and the JSON-serializable metadata of checkpoints: `data`
    (position in the data, None for a new run), `tokens_seen`, `schedule_jumped`, `text` and `config`. Raises
    ValueError if the text or tokenizer differs from the checkpoint's, or `init_from` has a different
    tokenizer.
    """
    abstract = place_on_mesh(abstract_params(config.model), mesh)
    base = None if config.model.lora is None else find_base(config, checkpoints)
    metadata = _describe(config, base)
    state, (_, frozen) = abstract_state(config, mesh, is_trainable), split_params(abstract, is_trainable)
    found = checkpoints.restore(*checkpoint_items(state, frozen, metadata)[:2], report)
    if found is None:
        if (pathlib.Path(config.run_dir) / "config.json").exists():
            report(f"{config.run_dir} has no checkpoint yet: starting at step 1")
        if base is not None:
            _check_tokenizer(config, cache, report)
            params = merge_params(first_adapters(config, mesh), load_base(config, mesh, base))
        elif config.init_from is None:
            params = create_params(config, mesh)
        else:
            params = _load_init_weights(config, abstract, cache, report)
        trainable, frozen = split_params(params, is_trainable)
        metadata |= {"data": None, "tokens_seen": 0, "schedule_jumped": False, "text": describe_text(cache)}
        return create_state(config, mesh, trainable), frozen, metadata
    step, params, rest, metadata = found
    changed = [name for name, value in describe_text(cache).items() if metadata["text"].get(name) != value]
    if changed:
        raise ValueError(
            f"data.source is {config.data.source!r}: the data has changed since the run in {config.run_dir} "
            f"began ({', '.join(changed)}); use a new --run-dir, with --init-from {config.run_dir} to start "
            "from its weights"
        )
    report(f"Resuming from step {step}, the last checkpoint in {config.run_dir}")
    num_updates = step - int(rest["skipped"])
    metadata["schedule_jumped"] = check_steps(config, metadata, step, num_updates, report)
    report_changes(config, metadata, report)
    if base is not None:
        params = merge_params(load_base(config, mesh, base), params)
    trainable, frozen = split_params(params, is_trainable)
    return TrainState(params=trainable, **rest), frozen, metadata | _describe(config, base)


def _describe(config: TrainConfig, base: BaseModel | None) -> dict[str, Any]:
    """Returns the checkpoint metadata for the config and, with adapters, the base model."""
    return {"config": config.to_dict()} | ({} if base is None else base.to_record())


def _load_init_weights(
    config: TrainConfig, abstract: dict, cache: TokenCache, report: Callable[[str], None]
) -> dict:
    """Loads the weights of `init_from`, a run folder or a published checkpoint, onto the mesh."""
    folder = _check_tokenizer(config, cache, report)
    if not is_run(folder):
        return read_params(open_weights(folder), config.model, abstract)
    _, params, _ = load_run(folder, abstract=abstract)
    warn_non_finite_params(config.model, params, folder)
    return params


def _check_tokenizer(config: TrainConfig, cache: TokenCache, report: Callable[[str], None]) -> pathlib.Path:
    """Returns the folder of `init_from`. Raises ValueError if the text uses a different tokenizer."""
    assert config.init_from is not None
    folder = local_folder(config.init_from)
    tokenizer = find_tokenizer(folder)
    if tokenizer is None:
        report(f"{config.init_from} has no tokenizer: data.tokenizer must be the one that its weights use")
    elif not tokenizer.same_ids_as(cache.tokenizer):
        raise ValueError(
            f"data.tokenizer is {config.data.tokenizer!r}: must match init_from, which uses {tokenizer.name}"
        )
    report(f"Starting from the weights of {config.init_from}")
    return folder


def checkpoint_items(
    state: TrainState, frozen: dict, metadata: dict[str, Any]
) -> tuple[dict, dict[str, Any], dict[str, Any]]:
    """Returns the items of a checkpoint: the parameters (with a base model, only adapters and other trained
    ones), the rest of the state, and the metadata."""
    rest = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    if "base" in metadata:
        kept = {path: leaf for path, leaf in flatten_dict(frozen).items() if is_adapter(path)}
        frozen = unflatten_dict(kept)
    return merge_params(rest.pop("params"), frozen), rest, metadata


def describe_text(cache: TokenCache) -> dict[str, Any]:
    """Identifies a tokenized text by the tokenizer's digest and the counts, but not the build time."""
    counts = {name: cache.meta[name] for name in ("documents", "tokens", "held_out_bytes")}
    return counts | {"tokenizer": cache.tokenizer.digest}


def check_run_dir(config: TrainConfig) -> None:
    """Raises ValueError if no checkpoint can be written to the run folder, or if its run was started with an
    incompatible config, naming the fields that differ."""
    run_dir = pathlib.Path(config.run_dir)
    check_folder_name(run_dir.absolute(), "run_dir", config.run_dir)
    require_writable(run_dir, "run_dir", config.run_dir)
    path = run_dir / "config.json"
    if not path.exists() or not has_checkpoints(run_dir):
        return
    before, now = (flatten_dict(c.to_dict(), sep=".") for c in (TrainConfig.load(path), config))
    differing = [
        f"{name} (was {before.get(name)!r}, is {now.get(name)!r})"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
        and not any(name == free or name.startswith(f"{free}.") for free in FREE_FIELDS)
    ]
    if differing:
        raise ValueError(
            f"run_dir is {config.run_dir!r}: made with another config: {', '.join(differing)}. "
            "Name another --run-dir, or start it with the same settings"
        )


def has_checkpoints(run_dir: pathlib.Path) -> bool:
    """Returns True if a run has a checkpoint. The folder of a run without one may be overwritten."""
    return any(path.name.isdigit() for path in run_dir.glob("checkpoints/*"))


def check_steps(
    config: TrainConfig, metadata: dict[str, Any], step: int, num_updates: int, report: Callable[[str], None]
) -> bool:
    """Reports how a new number of steps affects a run that is resumed at `step`.

    The result equals that of a run with the new number from the start if the learning rates of all updates so
    far are the same in the new schedule.

    Returns True if the schedule has jumped, now or in an earlier resume. Raises ValueError if the run is
    already past the new number.
    """
    steps_before, jumped = metadata["config"]["steps"], metadata.get("schedule_jumped", False)
    if config.steps == steps_before:
        return jumped
    require(config.steps > step, "steps", config.steps, f"must be above {step}, the last step of the run")
    before, now = (make_schedule(config.optim, steps) for steps in (steps_before, config.steps))
    updates = np.arange(num_updates)
    change = f"steps is {config.steps} (was {steps_before})"
    if np.allclose(before(updates), now(updates), rtol=1e-6, atol=0):
        result = (
            "the schedule jumped at an earlier change of steps, so the result differs from"
            if jumped
            else "the steps so far equal those of"
        )
        report(f"{change}: {result} a run of {config.steps} steps")
        return jumped
    rates = [
        format_rate(float(np.asarray(rate))) for rate in (before(max(num_updates - 1, 0)), now(num_updates))
    ]
    report(
        f"{change}: the {config.optim.schedule} schedule jumps from a learning rate of {rates[0]} at step "
        f"{step} to {rates[1]} at step {step + 1}; the result differs from a run of {config.steps} steps"
    )
    return True


def report_changes(config: TrainConfig, metadata: dict[str, Any], report: Callable[[str], None]) -> None:
    """Reports settings that a resumed run ignores, or that make losses incomparable with earlier ones."""
    before = metadata["config"]
    names = ["init_from", "init_adapter"] if config.model.lora is None else ["init_adapter"]
    for name in names:
        value = getattr(config, name)
        if value not in (None, before.get(name)):
            report(f"{name} is {value!r}: not read, because the run resumes from its checkpoint")
    batches, batches_before = config.eval.batches, before["eval"]["batches"]
    if batches != batches_before:
        report(
            f"eval.batches is {batches} (was {batches_before}): the best checkpoint is chosen among those "
            f"evaluated on {batches} batches"
        )
