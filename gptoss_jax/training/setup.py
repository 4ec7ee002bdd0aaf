"""Setup of a run before its first step: checks against its folder, text and devices, and the first state."""

import contextlib
import dataclasses
import fcntl
import pathlib
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from gptoss_jax.checkpoints.load import read_params, warn_non_finite_params
from gptoss_jax.checkpoints.readers import (
    find_tokenizer,
    is_run,
    load_run,
    local_folder,
    open_weights,
)
from gptoss_jax.checkpoints.run import Checkpoints
from gptoss_jax.config import DataConfig, ModelConfig, TrainConfig, require
from gptoss_jax.config.base import write_json
from gptoss_jax.data.special_tokens import read_stop_ids
from gptoss_jax.data.token_cache import TokenCache, build_cache
from gptoss_jax.data.tokenizer import Tokenizer
from gptoss_jax.parallel import distributed
from gptoss_jax.parallel.mesh import batch_shards, check_model
from gptoss_jax.training.resume import check_steps, flatten, has_checkpoints, report_changes
from gptoss_jax.training.state import TrainState, abstract_state, create_state

# Fields of a model that say how it is trained or computed, not what it computes.
MODEL_TRAINING_FIELDS = {
    "max_position_embeddings", "attention_dropout", "residual_dropout", "initializer_range",
    "router_aux_loss_coef", "router_z_loss_coef", "expert_capacity_factor", "compute_dtype",
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
    first, *others = map(flatten, distributed.allgather_host(config.to_dict()))
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
    probe = run_dir / distributed.allgather_host(probe.name)[0]
    until = time.monotonic() + UNTIL_SEEN
    while jax.process_count() > 1 and not probe.exists() and time.monotonic() < until:
        time.sleep(0.2)
    seen = distributed.allgather_host([probe.exists(), socket.gethostname()])
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
    hosts = distributed.allgather_host(socket.gethostname())
    first_of_each = {hosts.index(host) for host in hosts}
    for turn in [{0}, first_of_each] if len(hosts) > 1 else []:
        if jax.process_index() in turn:
            build_cache(config, report)
        distributed.barrier()
    return build_cache(config, report)


def check_devices(config: TrainConfig, mesh: jax.sharding.Mesh) -> None:
    """Raises ValueError when the devices cannot split the model, or share a batch or a part of it, evenly."""
    check_model(config.model, dict(mesh.shape))
    shards, parts = batch_shards(mesh.shape), config.optim.grad_accum_steps
    what = f"{shards} devices" if parts == 1 else f"{shards} devices times optim.grad_accum_steps ({parts})"
    size = config.data.batch_size
    require(size % (shards * parts) == 0, "data.batch_size", size, f"must be a multiple of {what}")


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
        report(f"Resuming from step {step}, the last checkpoint in {config.run_dir}")
        updates = step - int(rest["skipped"])
        record["schedule_jumped"] = check_steps(config, record, step, updates, report)
        report_changes(config, record, report)
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
        warn_non_finite_params(config.model, loaded, folder)
        return loaded, tokenizer
    return read_params(open_weights(folder), config.model, params), tokenizer


def stop_tokens(folder: pathlib.Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Returns the tokens that end a sample: those that the files of a folder name, and the tokenizer's."""
    return tuple(dict.fromkeys((*read_stop_ids(folder, tokenizer.vocab_size), *tokenizer.stop_ids)))


def write_folder(config: TrainConfig, tokenizer: Tokenizer, is_new: bool) -> None:
    """Writes config.json to the run folder and, for a new run, the tokenizer.

    A resumed run may have other settings: see `resume.FREE_FIELDS`.
    """
    if is_new:
        save_tokenizer(config, tokenizer)
    config.save(pathlib.Path(config.run_dir) / "config.json")


def save_tokenizer(config: TrainConfig, tokenizer: Tokenizer) -> None:
    """Writes the tokenizer to the run folder, and the stop tokens of `init_from` if it names others.

    A resumed run reads them there, and `init_from` may be gone.
    """
    folder = pathlib.Path(config.run_dir)
    tokenizer.save(folder)
    stops = tokenizer.stop_ids
    if config.init_from is not None:
        stops = stop_tokens(local_folder(config.init_from), tokenizer)
    path = folder / "generation_config.json"
    # One that is there is of an earlier start, which reached no checkpoint.
    if set(stops) != set(tokenizer.stop_ids) or path.exists():
        values = {"bos_token_id": tokenizer.bos_id, "eos_token_id": stops}
        write_json(path, values)


def check_init_from(config: TrainConfig, report: Callable[[str], None]) -> None:
    """Raises ValueError when `init_from` is no folder of weights, or of another model. Reads no weights.

    A run that has a checkpoint no longer needs them.
    """
    if config.init_from is None or has_checkpoints(pathlib.Path(config.run_dir)):
        return
    folder = local_folder(config.init_from)
    if is_run(folder):
        theirs = TrainConfig.load(folder / "config.json").model
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
    if config.model.resolved_layer_types == theirs.resolved_layer_types:
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
    cache: TokenCache, config: TrainConfig, position: dict[str, Any], tokens_seen: int, schedule_jumped: bool
) -> dict[str, Any]:
    """Returns all of a checkpoint except its arrays, JSON-ready: with it the folder of a checkpoint is
    complete."""
    folder = pathlib.Path(config.run_dir)
    names = [name for name in ("tokenizer.json", "tokenizer_name.txt") if (folder / name).exists()]
    return {
        "data": position,
        "tokens_seen": tokens_seen,
        "schedule_jumped": schedule_jumped,
        "text": _text_of(cache),
        "config": config.to_dict(),
        "tokenizer": {name: (folder / name).read_text(encoding="utf-8") for name in names},
    }
