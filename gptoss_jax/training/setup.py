"""Run setup: validates run folder, text, devices and initial weights before the first step."""

import contextlib
import dataclasses
import fcntl
import pathlib
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator

import jax
from flax.traverse_util import flatten_dict

from gptoss_jax.checkpoints.readers import find_tokenizer, local_folder, open_weights
from gptoss_jax.checkpoints.run_params import is_run
from gptoss_jax.config import DataConfig, ModelConfig, TrainConfig, require
from gptoss_jax.config.base import write_json
from gptoss_jax.data.chat_cache import SKIPPED_FILE
from gptoss_jax.data.chat_statistics import summary
from gptoss_jax.data.harmony import is_harmony
from gptoss_jax.data.special_tokens import read_stop_ids
from gptoss_jax.data.token_cache import TokenCache, build_cache
from gptoss_jax.data.tokenizer import Tokenizer
from gptoss_jax.model.transformer import abstract_params
from gptoss_jax.parallel import distributed
from gptoss_jax.parallel.context import check_length
from gptoss_jax.parallel.mesh import check_model, sequence_shards
from gptoss_jax.status import status
from gptoss_jax.training.base_weights import check_base
from gptoss_jax.training.resume import check_run_dir, has_checkpoints
from gptoss_jax.training.state import check_state_memory

# Fields that affect training or implementation, but not the function that the model computes.
TRAINING_ONLY_FIELDS = {
    "max_position_embeddings", "attention_dropout", "residual_dropout", "initializer_range",
    "router_aux_loss_coef", "router_z_loss_coef", "expert_capacity_factor", "compute_dtype",
    "expert_format", "kernels", "remat", "lora",
}  # fmt: skip

SHARED_FOLDER_TIMEOUT = 15  # seconds until all machines must see a new file on a network file system


@status("starting")
def check_settings(config: TrainConfig, mesh: jax.sharding.Mesh, report: Callable[[str], None]) -> None:
    """Raises ValueError if the run cannot start, before any text is tokenized."""
    check_same_config(config)
    check_devices(config, mesh)
    distributed.agree_on_kernels(config.model.kernels)
    check_run_dir(config)
    check_init_from(config, report)


def check_same_config(config: TrainConfig) -> None:
    """Raises ValueError if the processes of a run have different settings, naming the first difference."""
    first, *others = (
        flatten_dict(values, sep=".") for values in distributed.allgather_host(config.to_dict())
    )
    for index, other in enumerate(others, start=1):
        for name in sorted(first):
            # Each machine may keep tokenized text in a different folder.
            if first[name] != other.get(name) and name != "data.cache_dir":
                raise ValueError(
                    f"{name} is {other.get(name)!r} in process {index} and {first[name]!r} in process 0: all "
                    "processes must be started with the same settings"
                )


def check_devices(config: TrainConfig, mesh: jax.sharding.Mesh) -> None:
    """Raises ValueError if the devices cannot split the model, or every microbatch, evenly."""
    check_model(config.model, dict(mesh.shape))
    check_state_memory(config, mesh.local_devices[0])
    shards, microbatches = sequence_shards(mesh.shape), config.optim.grad_accum_steps
    size, divisor = config.data.batch_size, shards * microbatches
    why = "the number of devices that split the batch"
    why += f" ({shards}) times optim.grad_accum_steps ({microbatches})" if microbatches > 1 else ""
    require(size % divisor == 0, "data.batch_size", size, f"must be a multiple of {divisor}, {why}")
    check_length(config.data.seq_len, mesh.shape["context"])
    context = mesh.shape["context"]
    is_fitting = context == 1 or config.objective != "dpo"
    require(
        is_fitting, "mesh.context", context, "must be 1 if objective is 'dpo', which needs whole sequences"
    )


def check_init_from(config: TrainConfig, report: Callable[[str], None]) -> None:
    """Raises ValueError if `init_from` does not contain weights for this model, without reading them.

    A run with a checkpoint no longer needs them, or checks them against the checkpoint
    (`base_weights.find_base`).
    """
    if has_checkpoints(pathlib.Path(config.run_dir)):
        return
    if config.model.lora is not None:
        check_base(config, report)
    if config.init_from is None:
        return
    folder = local_folder(config.init_from)
    if is_run(folder):
        theirs = TrainConfig.load(folder / "config.json").model
        if theirs.lora is not None and config.model.lora is None:
            rank = theirs.lora.rank
            allowed = (
                f"holds an adapter of rank {rank}; add --model.lora.rank {rank} to continue it, or merge it "
                "(gptoss merge)"
            )
            require(False, "init_from", config.init_from, allowed)
    else:
        # Published files store each layer separately and can be loaded stacked or not.
        theirs = dataclasses.replace(open_weights(folder).config, scan_layers=config.model.scan_layers)
    _check_same_model(config, theirs, report)


def _check_same_model(config: TrainConfig, theirs: ModelConfig, report: Callable[[str], None]) -> None:
    """Raises ValueError if the weights do not fit the model; reports differences in other settings."""

    def fields(model: ModelConfig) -> dict:
        values = {name: getattr(model, name) for name in model.to_dict() if name not in TRAINING_ONLY_FIELDS}
        return values | {"layer_types": model.resolved_layer_types}

    ours, others = fields(config.model), fields(theirs)
    differing = [
        f"model.{name} is {ours[name]!r}, theirs {others[name]!r}"
        for name in ours
        if ours[name] != others[name]
    ]
    other_layout = config.model.scan_layers != theirs.scan_layers
    if other_layout or (differing and _plain_params(config.model) != _plain_params(theirs)):
        if other_layout:
            differing.append("gptoss convert writes a run in a form that fits either")
        raise ValueError(
            f"init_from is {config.init_from!r}: its weights do not fit the model: {'; '.join(differing)}"
        )
    for difference in differing:
        report(f"The weights of {config.init_from} were trained with a different setting: {difference}")


def _plain_params(config: ModelConfig) -> dict:
    """Returns the abstract parameters of a model without adapters and with unpacked experts."""
    return abstract_params(dataclasses.replace(config, lora=None, expert_format="plain"))


@status("opening the dataset")
def open_cache(config: TrainConfig, report: Callable[[str], None]) -> TokenCache:
    """Returns the tokenized text, built by process 0 and then, if its folder is not shared, once per machine.

    Raises ValueError if the tokenizer's vocabulary is larger than the model's.
    """
    data = _data_of_run(config)
    hosts = distributed.allgather_host(socket.gethostname())
    first_per_host = {hosts.index(host) for host in hosts}
    for builders in [{0}, first_per_host] if len(hosts) > 1 else []:
        if jax.process_index() in builders:
            build_cache(data, report)
        distributed.barrier()
    cache = build_cache(data, report)
    size, least = config.model.vocab_size, cache.tokenizer.vocab_size
    allowed = f"must be at least {least}, the size of data.tokenizer ({config.data.tokenizer})"
    require(size >= least, "model.vocab_size", size, allowed)
    for line in summary(cache, data) if "chat" in cache.meta else ():
        report(f"  {line}")
    return cache


def _data_of_run(config: TrainConfig) -> DataConfig:
    """Returns the data settings, with the saved tokenizer if the run predates Harmony tokens in bpe:SIZE."""
    run_dir = pathlib.Path(config.run_dir)
    if not config.data.tokenizer.startswith("bpe:") or not has_checkpoints(run_dir):
        return config.data
    tokenizer = find_tokenizer(run_dir)
    is_current = tokenizer is None or is_harmony(tokenizer)
    saved = f"file:{run_dir.absolute() / 'tokenizer.json'}"
    return config.data if is_current else dataclasses.replace(config.data, tokenizer=saved)


@contextlib.contextmanager
def lock_run_dir(run_dir: pathlib.Path) -> Iterator[None]:
    """Creates the run folder and locks it. Raises ValueError if another process is training in it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / ".lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"run_dir is {str(run_dir)!r}: another process is training there now") from None
        yield


def check_shared(run_dir: pathlib.Path) -> None:
    """Raises ValueError if a process does not see files that process 0 writes to the run folder."""
    if jax.process_count() == 1:
        return
    probe = run_dir / distributed.allgather_host(f".shared-{secrets.token_hex(8)}")[0]
    is_main = jax.process_index() == 0
    if is_main:
        probe.touch()
    deadline = time.monotonic() + SHARED_FOLDER_TIMEOUT
    while not probe.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    seen = distributed.allgather_host([probe.exists(), socket.gethostname()])
    if is_main:
        probe.unlink(missing_ok=True)
    for index, (found, host) in enumerate(seen):
        if not found:
            raise ValueError(
                f"run_dir is {str(run_dir)!r}: process {index} on {host} does not see files that process 0 "
                "writes there; it must be on storage that all processes share"
            )


def write_run_dir(config: TrainConfig, cache: TokenCache, is_new: bool) -> None:
    """Writes config.json to the run folder and, for a new run, the tokenizer and the list of rows that were
    left out; in process 0.

    A resumed run may have other settings: see `resume.FREE_FIELDS`.
    """
    if jax.process_index() != 0:
        return
    run_dir = pathlib.Path(config.run_dir)
    if is_new:
        save_tokenizer(config, cache.tokenizer)
        (run_dir / SKIPPED_FILE).unlink(missing_ok=True)
        if (cache.folder / SKIPPED_FILE).exists():
            shutil.copyfile(cache.folder / SKIPPED_FILE, run_dir / SKIPPED_FILE)
    config.save(run_dir / "config.json")


def save_tokenizer(config: TrainConfig, tokenizer: Tokenizer) -> None:
    """Writes the tokenizer to the run folder, and the stop tokens of `init_from` if they differ, because its
    folder may be gone when the run is resumed."""
    folder = pathlib.Path(config.run_dir)
    tokenizer.save(folder)
    stops = tokenizer.stop_ids
    if config.init_from is not None:
        stops = stop_tokens(local_folder(config.init_from), tokenizer)
    path = folder / "generation_config.json"
    # An existing file is from an earlier start without a checkpoint.
    if set(stops) != set(tokenizer.stop_ids) or path.exists():
        write_json(path, {"bos_token_id": tokenizer.bos_id, "eos_token_id": stops})


def stop_tokens(folder: pathlib.Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Returns the tokens that end a sample: those named in a folder's files, and the tokenizer's."""
    return tuple(dict.fromkeys((*read_stop_ids(folder, tokenizer.vocab_size), *tokenizer.stop_ids)))
