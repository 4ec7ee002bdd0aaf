"""What stands before the first step: checks of a run against its folder, text and devices, and its first
state."""

import contextlib
import dataclasses
import fcntl
import json
import pathlib
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from gptoss_jax.config import DataConfig, ModelConfig, TrainConfig, require
from gptoss_jax.data.pipeline import TokenCache, build_cache
from gptoss_jax.data.special_tokens import read_stop_ids
from gptoss_jax.data.tokenizer import Tokenizer
from gptoss_jax.parallel import processes
from gptoss_jax.parallel.mesh import batch_shards, check_model
from gptoss_jax.training.metrics import format_rate
from gptoss_jax.training.optimizer import make_schedule
from gptoss_jax.training.state import TrainState, abstract_state, create_state
from gptoss_jax.weights.checkpoint import Checkpoints, is_run, load_config, load_run
from gptoss_jax.weights.orbax_support import check_folder_name
from gptoss_jax.weights.pretrained import read_params, warn_of_params
from gptoss_jax.weights.sources import find_tokenizer, local_folder, open_weights

# Sections and fields that a resumed run may change, because they do not change what it computes; about the
# number of steps see `check_steps`.
FREE_FIELDS = (
    "run_dir", "data.cache_dir", "mesh", "model.remat", "model.kernels", "checkpoint", "eval", "log_every",
    "steps",
)  # fmt: skip
# Fields of a model that say how it is trained or computed, not what it computes.
MODEL_TRAINING_FIELDS = {
    "max_position_embeddings", "attention_dropout", "residual_dropout", "initializer_range",
    "router_aux_loss_coef", "router_z_loss_coef", "expert_capacity", "compute_dtype",
    "expert_format", "kernels", "remat",
}  # fmt: skip
# Those that the tree of parameters follows from.
MODEL_SHAPE_FIELDS = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "num_local_experts", "attention_bias", "expert_bias",
    "router_bias", "learned_sinks", "tie_word_embeddings", "scan_layers",
}  # fmt: skip


# Seconds until a file that one machine has written is seen by another over a network's file system.
UNTIL_SEEN = 15


def check_same_config(config: TrainConfig) -> None:
    """Raises ValueError when the processes of a run were started with different settings, naming them."""
    first, *others = map(_flat, processes.exchange(config.to_dict()))
    for index, other in enumerate(others, start=1):
        # Where each machine keeps its tokenised text is its own affair.
        differing = [n for n in sorted(first) if first[n] != other.get(n) and n != "data.cache_dir"]
        for name in differing:
            raise ValueError(
                f"{name} is {other.get(name)!r} in process {index} and {first[name]!r} in process 0: all "
                "processes must be started with the same settings"
            )


def check_shared(run_dir: pathlib.Path) -> None:
    """Raises ValueError when a process does not see what process 0 writes to the run folder."""
    probe = run_dir / f".seen-by-all-{secrets.token_hex(8)}"
    is_main = jax.process_index() == 0
    if is_main and jax.process_count() > 1:
        probe.touch()
    probe = run_dir / processes.exchange(probe.name)[0]
    until = time.monotonic() + UNTIL_SEEN
    while jax.process_count() > 1 and not probe.exists() and time.monotonic() < until:
        time.sleep(0.2)
    seen = processes.exchange([probe.exists(), socket.gethostname()])
    if is_main:
        probe.unlink(missing_ok=True)
    for index, (found, host) in enumerate(seen[1:], start=1):
        if not found:
            raise ValueError(
                f"run_dir is {str(run_dir)!r}: process {index} on {host} does not see what process 0 writes "
                "there; it must lie on storage that all processes share"
            )


def open_cache(config: DataConfig, report: Callable[[str], None]) -> TokenCache:
    """The tokenised text, made by process 0; where its folder is not seen, by one process of each machine."""
    hosts = processes.exchange(socket.gethostname())
    first_of_each = {hosts.index(host) for host in hosts}
    for turn in [{0}, first_of_each] if len(hosts) > 1 else []:
        if jax.process_index() in turn:
            build_cache(config, report)
        processes.exchange(None)
    return build_cache(config, report)


def check_devices(config: TrainConfig, mesh: jax.sharding.Mesh) -> None:
    """Raises ValueError when the devices cannot split the model, or share a batch or a part of it, evenly."""
    check_model(config.model, dict(mesh.shape))
    shards, parts = batch_shards(mesh.shape), config.optim.accumulate
    what = f"{shards} devices" if parts == 1 else f"{shards} devices times optim.accumulate ({parts})"
    size = config.data.batch_size
    require(size % (shards * parts) == 0, "data.batch_size", size, f"must be a multiple of {what}")


def check_folder(config: TrainConfig) -> None:
    """Raises ValueError when no checkpoint could be written to the run folder, or when it was made with a
    config that computes something else, naming the fields that differ."""
    run_dir = pathlib.Path(config.run_dir)
    check_folder_name(run_dir.absolute(), "run_dir", config.run_dir)
    path = run_dir / "config.json"
    if not path.exists() or not has_checkpoints(run_dir):
        return
    before, now = _flat(TrainConfig.load(path).to_dict()), _flat(config.to_dict())
    differing = [
        f"{name} (was {before.get(name)!r}, is {now.get(name)!r})"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and not _is_free(name)
    ]
    if differing:
        raise ValueError(
            f"run_dir is {config.run_dir!r}: made with another config; {', '.join(differing)}. "
            "Name another --run-dir, or start it with the same settings"
        )


def has_checkpoints(run_dir: pathlib.Path) -> bool:
    """Whether a run has come to a checkpoint. One that has not has left nothing to protect."""
    return any(path.name.isdigit() for path in run_dir.glob("checkpoints/*"))


def _is_free(name: str) -> bool:
    return any(name == free or name.startswith(f"{free}.") for free in FREE_FIELDS)


def check_steps(
    config: TrainConfig, steps_before: int, step: int, updates: int, report: Callable[[str], None]
) -> None:
    """Reports what a new number of steps means for a run that is resumed at `step`.

    The result is that of a run with the new number from the start if its schedule gives the `updates` that
    have been made the learning rates they had. Raises ValueError when the run is already past the new number.
    """
    if config.steps == steps_before:
        return
    require(config.steps > step, "steps", config.steps, f"must be above {step}, the last step of the run")
    before, now = (make_schedule(config.optim, steps) for steps in (steps_before, config.steps))
    made = np.arange(updates)
    changed = f"steps is {config.steps} (was {steps_before})"
    if np.allclose(before(made), now(made), rtol=1e-6, atol=0):
        report(f"{changed}: the steps so far are also those of a run of {config.steps} steps")
        return
    rates = [format_rate(float(rate)) for rate in (before(max(updates - 1, 0)), now(updates))]
    report(
        f"{changed}: the {config.optim.schedule} schedule jumps from a learning rate of {rates[0]} at step "
        f"{step} to {rates[1]} at step {step + 1}; the result differs from a run of {config.steps} steps"
    )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        k: v for name, value in tree.items() for k, v in _flat(value, f"{prefix}.{name}".strip(".")).items()
    }


def check_text(config: TrainConfig, cache: TokenCache) -> None:
    """Raises ValueError when the tokenizer has more ids than the model."""
    have, need = config.model.vocab_size, cache.tokenizer.vocab_size
    allowed = f"must be at least {need}, the size of data.tokenizer ({config.data.tokenizer})"
    require(have >= need, "model.vocab_size", have, allowed)


@contextlib.contextmanager
def only_run_in(run_dir: pathlib.Path) -> Iterator[None]:
    """Holds the folder for this process. Raises ValueError when another one is training in it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / ".lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"run_dir is {str(run_dir)!r}: another process is training there now") from None
        yield


def split_state(state: TrainState) -> tuple[dict, dict[str, Any]]:
    """The parameters, and everything else, as a checkpoint keeps them."""
    rest = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return rest.pop("params"), rest


def first_state(
    config: TrainConfig,
    mesh: jax.sharding.Mesh,
    checkpoints: Checkpoints,
    cache: TokenCache,
    report: Callable[[str], None],
) -> tuple[TrainState, dict[str, Any] | None]:
    """The state to start from: the last checkpoint's, or `init_from`'s weights, or random ones.

    Returns it with the record of the checkpoint, None where the run starts anew. Raises ValueError when the
    text or the tokenizer is not that of the checkpoint, or `init_from` has another tokenizer or another
    model.
    """
    params, rest = split_state(abstract_state(config, mesh))
    found = checkpoints.restore(params, rest, report)
    if found is not None:
        step, params, rest, record = found
        changed = [name for name, value in _text_of(cache).items() if record["text"].get(name) != value]
        if changed:
            raise ValueError(
                f"data.source is {config.data.source!r}: the text has changed since the run in "
                f"{config.run_dir} began ({', '.join(changed)}); train on it in another --run-dir"
            )
        report(f"Going on from step {step}, the last checkpoint in {config.run_dir}")
        check_steps(config, record["config"]["steps"], step, step - int(rest["skipped"]), report)
        return TrainState(params=params, **rest), record
    if config.init_from is None:
        return create_state(config, mesh), None
    loaded, tokenizer = _foreign_weights(config, params)
    if tokenizer is None:
        report(f"{config.init_from} holds no tokenizer: data.tokenizer has to be that of its weights")
    elif not tokenizer.same_ids_as(cache.tokenizer):
        raise ValueError(
            f"data.tokenizer is {config.data.tokenizer!r}: not that of init_from; {tokenizer.name} is"
        )
    report(f"Starting from the weights of {config.init_from}")
    return create_state(config, mesh, loaded), None


def _foreign_weights(config: TrainConfig, params: dict) -> tuple[dict, Tokenizer | None]:
    """The weights of `init_from`, a run folder or a published one, placed as `params` says; and its
    tokenizer."""
    folder = local_folder(config.init_from)
    tokenizer = find_tokenizer(folder)
    if is_run(folder):
        _, loaded, _ = load_run(folder, abstract=params)
        warn_of_params(config.model, loaded, folder)
        return loaded, tokenizer
    return read_params(open_weights(folder), config.model, params), tokenizer


def stop_tokens(config: TrainConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that end a sample: the tokenizer's, and those that the folder of `init_from` names."""
    if config.init_from is None:
        return tokenizer.stop_ids
    named = read_stop_ids(local_folder(config.init_from), tokenizer.vocab_size)
    return tuple(dict.fromkeys((*named, *tokenizer.stop_ids)))


def save_tokenizer(config: TrainConfig, tokenizer: Tokenizer) -> None:
    """Writes the tokenizer to the run folder, and the stop tokens of `init_from` if it names others."""
    folder = pathlib.Path(config.run_dir)
    tokenizer.save(folder)
    stops = stop_tokens(config, tokenizer)
    if set(stops) != set(tokenizer.stop_ids):
        values = {"bos_token_id": tokenizer.bos_id, "eos_token_id": stops}
        (folder / "generation_config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def check_init_from(config: TrainConfig, report: Callable[[str], None]) -> None:
    """Raises ValueError when `init_from` is no folder of weights, or of another model. Reads no weights.

    A run that has a checkpoint no longer needs them.
    """
    if config.init_from is None or has_checkpoints(pathlib.Path(config.run_dir)):
        return
    folder = local_folder(config.init_from)
    if is_run(folder):
        theirs = load_config(folder).model
    else:
        # Published files hold layer by layer, and are read into either form.
        theirs = dataclasses.replace(open_weights(folder).config, scan_layers=config.model.scan_layers)
    _check_same_model(config, theirs, report)


def _check_same_model(config: TrainConfig, theirs: ModelConfig, report: Callable[[str], None]) -> None:
    """Raises ValueError where the weights cannot be this model's; says where they were trained as another."""
    differing = {
        field.name: (getattr(config.model, field.name), getattr(theirs, field.name))
        for field in dataclasses.fields(ModelConfig)
        if field.name not in MODEL_TRAINING_FIELDS
        and getattr(config.model, field.name) != getattr(theirs, field.name)
    }
    # What None stands for may be spelled out.
    if config.model.types_of_layers == theirs.types_of_layers:
        differing.pop("layer_types", None)
    other_tree = len(config.model.period) != len(theirs.period)
    named = [f"model.{name} is {ours!r}, theirs {other!r}" for name, (ours, other) in differing.items()]
    if "scan_layers" in differing:
        named.append("gptoss convert writes a run in a form that fits either")
    if differing.keys() & MODEL_SHAPE_FIELDS or other_tree:
        raise ValueError(
            f"init_from is {config.init_from!r}: its weights do not fit the model: {'; '.join(named)}"
        )
    for difference in named:
        report(f"The weights of {config.init_from} were trained otherwise: {difference}")


def _text_of(cache: TokenCache) -> dict[str, Any]:
    """What tells a tokenised text from another: the tokenizer's file and the counts, not when it was made."""
    counts = {name: cache.meta[name] for name in ("documents", "tokens", "held_out_bytes")}
    return counts | {"tokenizer": cache.tokenizer.digest}


def checkpoint_record(
    cache: TokenCache, config: TrainConfig, position: dict[str, Any], tokens_seen: int
) -> dict[str, Any]:
    """What a checkpoint carries besides arrays, JSON-ready: with it the folder of a checkpoint is complete
    alone."""
    folder = pathlib.Path(config.run_dir)
    names = [name for name in ("tokenizer.json", "tokenizer_name.txt") if (folder / name).exists()]
    return {
        "data": position,
        "tokens_seen": tokens_seen,
        "text": _text_of(cache),
        "config": config.to_dict(),
        "tokenizer": {name: (folder / name).read_text(encoding="utf-8") for name in names},
    }
