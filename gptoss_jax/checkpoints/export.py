"""Exports models to Hugging Face folders, from any source to any dtype, slice by slice."""

import contextlib
import dataclasses
import fcntl
import functools
import math
import os
import pathlib
import shutil
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.checkpoints import readers
from gptoss_jax.checkpoints.lazy_tensors import BFLOAT16, DenseTensor, LazyTensor
from gptoss_jax.checkpoints.mappings import (
    HUGGINGFACE,
    TensorMapping,
    in_file_order,
    parameter_layers,
)
from gptoss_jax.checkpoints.readers import ExpertFormat, InMemoryReader, WeightReader, open_weights
from gptoss_jax.checkpoints.run_params import is_run
from gptoss_jax.checkpoints.safetensors_io import SHARD_BYTES, NewTensor, write_tensors
from gptoss_jax.checkpoints.sharded_io import read_slices
from gptoss_jax.config import ModelConfig, TrainConfig
from gptoss_jax.config.base import read_json, write_json
from gptoss_jax.config.paths import require_writable, user_path
from gptoss_jax.data.tokenizer import Tokenizer, load_tokenizer
from gptoss_jax.interrupts import cleanup
from gptoss_jax.model.parameters import parameter_name, shape_of
from gptoss_jax.model.transformer import Transformer, get_params
from gptoss_jax.terminal import format_si

GENERATION = "generation_config.json"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# The format requires these parameters; with these values they have no effect (exp(sink - max) is 0).
NO_SINK = float(jnp.finfo(jnp.bfloat16).min)
NO_EFFECT = {"moe.router_bias": 0, "moe.gate_up_bias": 0, "moe.down_bias": 0, "attention.sinks": NO_SINK}
# Bytes converted and written at a time, for tensors that can be converted in slices.
CHUNK_BYTES = 64 << 20


def save_pretrained(
    model: Transformer,
    folder: str | os.PathLike,
    experts: ExpertFormat | None = None,
    tokenizer: str | os.PathLike | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Saves a model as a Hugging Face folder, which transformers and vLLM can load.

    Args:
      folder: must not exist or be empty. It is created atomically.
      experts: the dtype of the weights; "mxfp4" quantizes the experts' matrices and stores the rest in
        bfloat16. Packed matrices keep their bytes. None is mxfp4 for a model with packed experts, else
        float32 if any parameter is wider than bfloat16, else bfloat16.
      tokenizer: folder to copy the tokenizer from; None: the folder that the model was loaded from.
      shard_bytes: maximum size of a file with more than one tensor.

    Raises ValueError for a model that the format cannot represent, and for a folder that is not empty;
    OSError if it cannot be written.
    """
    origin = None if model.origin is None else pathlib.Path(model.origin)
    if tokenizer is not None:
        origin = readers.local_folder(tokenizer)
        if not {"tokenizer.json", "tokenizer_name.txt"} & {path.name for path in origin.iterdir()}:
            raise ValueError(
                f"tokenizer is {str(tokenizer)!r}: must hold tokenizer.json or tokenizer_name.txt"
            )
    elif origin is not None and not origin.is_dir():
        raise ValueError(
            f"tokenizer is None: {origin}, which the model was loaded from, is gone; name another folder"
        )
    write_folder(InMemoryReader(model.config, get_params(model), origin), folder, experts, shard_bytes)


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    experts: ExpertFormat | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Converts any model folder to a Hugging Face folder; see `save_pretrained` and `write_folder`.

    For a run with `model.expert_fake_quant`, None is mxfp4.

    Weights are read, converted and written in slices.
    """
    check_target(target)
    local = readers.local_folder(source)
    if is_run(local):
        # Fail before opening the checkpoint.
        config = TrainConfig.load(local / "config.json").model
        _refuse_adapter(config, source)
        config.to_hf(experts or ("mxfp4" if config.expert_fake_quant else "float32"))
    write_folder(open_weights(local), target, experts, on_progress=on_progress)


def write_folder(
    reader: WeightReader,
    folder: str | os.PathLike,
    experts: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes the weights of a reader as a Hugging Face folder; see `save_pretrained`.

    Calls `on_progress` with the bytes written so far and in total.
    """
    readers.check_formats(experts=experts)
    _refuse_adapter(reader.config, reader.origin or "the model")
    if jax.process_count() > 1:
        raise ValueError("save_pretrained must run in a single process, with the checkpoint loaded there")
    if experts is None:
        keys = {parameter_name(path) for path in parameter_layers(reader.config)}
        is_wide = any(reader.dtype(key) != BFLOAT16 for key in keys)
        is_packed = reader.packed or reader.config.expert_fake_quant
        experts = "mxfp4" if is_packed else "float32" if is_wide else "bfloat16"
    elif experts != "mxfp4" and reader.config.expert_fake_quant:
        warnings.warn(
            f"{reader.origin}: trained with model.expert_fake_quant, for experts in MXFP4; in {experts}, the "
            "model differs from the one that was trained",
            stacklevel=2,
        )
    check_target(folder)
    origin = reader.origin
    # Run folders lack tokenizer files that other programs need; the tokenizer exports them.
    tokenizer = None
    if origin is not None and (is_run(origin) or (origin / "tokenizer_name.txt").is_file()):
        tokenizer = load_tokenizer(origin)
    config = dataclasses.replace(reader.config, router_bias=True, expert_bias=True, learned_sinks=True)
    values = config.to_hf(experts) | _token_ids(origin, tokenizer)
    non_finite: set[str] = set()
    tensors = _new_tensors(reader, readers.with_experts(config, experts == "mxfp4"), experts, non_finite)
    total, done = sum(tensor.nbytes for tensor in tensors), 0

    def on_write(count: int) -> None:
        nonlocal done
        done += count
        on_progress(done, total)

    with atomic_folder(folder, total + (64 << 20)) as partial:
        write_tensors(partial, tensors, shard_bytes, on_write)
        for name, path in readers.sidecar_files(origin).items():
            shutil.copyfile(path, partial / name)
        if tokenizer is not None:
            tokenizer.export(partial)
        write_json(partial / "config.json", values)
        generation = _generation_ids(values, tokenizer)
        if generation and not (partial / GENERATION).exists():
            write_json(partial / GENERATION, generation)
    readers.warn_non_finite(non_finite, origin)


def _refuse_adapter(config: ModelConfig, what: str | os.PathLike) -> None:
    if config.lora is not None:
        raise ValueError(
            f"{what}: has an unmerged adapter: use gptoss merge to write a model with merged weights, or "
            "gptoss export-adapter to write only the adapter"
        )


def _new_tensors(
    reader: WeightReader, config: ModelConfig, experts: str, non_finite: set[str]
) -> list[NewTensor]:
    """Returns all tensors of a config's Hugging Face folder, layer by layer.

    While they are written, the names of tensors with NaN or infinite values are added to `non_finite`.
    """
    present = {parameter_name(path) for path in parameter_layers(reader.config)}
    dense = np.dtype(np.float32) if experts == "float32" else BFLOAT16
    tensors = []
    for path, layer in in_file_order(config):
        key = parameter_name(path)
        mapping = HUGGINGFACE[key]
        dtype = np.dtype(np.uint8) if key.endswith(("_blocks", "_scales")) else dense
        if key in NO_EFFECT and key not in present:
            values = np.broadcast_to(np.float32(NO_EFFECT[key]), shape_of(config, key))
            read: Callable[[], LazyTensor] = functools.partial(DenseTensor, mapping.name(layer), values)
        else:
            read = functools.partial(reader.tensor, key, layer)
        chunks = functools.partial(_chunks, read, dtype, mapping, non_finite)
        tensors.append(NewTensor(mapping.name(layer), dtype, mapping.file_shape(config), chunks))
    return tensors


def _chunks(
    read: Callable[[], LazyTensor], dtype: np.dtype, mapping: TensorMapping, non_finite: set[str]
) -> Iterator[np.ndarray]:
    """Yields a tensor's values in the file's layout."""
    tensor = read()
    count, *rest = tensor.shape
    row_bytes = math.prod(rest) * dtype.itemsize
    step = max(1, CHUNK_BYTES // row_bytes) if mapping.keeps_first_axis else count
    for start in range(0, count, step):
        rows = slice(start, min(start + step, count))
        out = np.empty((rows.stop - start, *rest), dtype)
        non_finite |= read_slices([(out, tensor, (rows, *(slice(0, size) for size in rest)))])
        yield mapping.to_file(out)


def _token_ids(origin: pathlib.Path | None, tokenizer: Tokenizer | None) -> dict[str, int | list[int]]:
    """Returns the bos, eos and pad token ids for config.json."""
    if tokenizer is not None:
        return {f"{role}_id": tokenizer.special_tokens[name] for role, name in tokenizer.token_roles.items()}
    if origin is None:
        return {}
    # generation_config.json is only used if config.json has no token ids.
    for path in (origin / "config.json", readers.sidecar_files(origin).get(GENERATION)):
        values = read_json(path) if path is not None and path.is_file() else {}
        found = {name: values[name] for name in TOKEN_IDS if values.get(name) is not None}
        if found:
            return found
    return {}


def _generation_ids(config: dict[str, Any], tokenizer: Tokenizer | None) -> dict[str, int | list[int]]:
    """Returns the token ids for generation_config.json: config.json's, with all stop tokens as eos."""
    ids = {name: config[name] for name in TOKEN_IDS if name in config}
    if tokenizer is not None:
        stops = list(tokenizer.stop_ids)
        ids["eos_token_id"] = stops if len(stops) > 1 else stops[0]
    return ids


@contextlib.contextmanager
def atomic_folder(target: str | os.PathLike, needed_bytes: int) -> Iterator[pathlib.Path]:
    """Yields a temporary folder that is renamed to `target` at the end, or removed after an error.

    A killed process leaves a hidden folder `.NAME.partial` next to the target, which the next call removes.
    Raises ValueError if the target is not empty or another process is writing to it, OSError if the disk has
    less than `needed_bytes` of free space.
    """
    # Follow a symbolic link and keep it.
    target = user_path(target, "folder").resolve()
    check_target(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < needed_bytes:
        raise OSError(
            f"{target}: needs {format_si(needed_bytes, 'B')}, but the disk has {format_si(free, 'B')} left"
        )
    partial, lock = (target.with_name(f".{target.name}.{end}") for end in ("partial", "lock"))
    with cleanup(partial), open(lock, "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_locked = os.fstat(file.fileno()).st_nlink > 0  # otherwise its holder has just removed it
        except BlockingIOError:
            is_locked = False
        if not is_locked:
            raise ValueError(f"{target}: another process is writing to it")
        try:
            check_target(target)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            yield partial
            # Flush before renaming, so that a power failure cannot leave the name without the contents.
            for path in [*partial.iterdir(), partial]:
                _flush(path)
            os.rename(partial, target)
            _flush(target.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            lock.unlink(missing_ok=True)


def check_target(target: str | os.PathLike) -> None:
    """Raises ValueError if a target folder is not empty, is a file or a mount point, or cannot be created."""
    target, name = user_path(target, "folder"), os.fspath(target)
    if target.is_mount():
        raise ValueError(f"{target}: is a mount point; name a folder in it")
    require_writable(target.parent, "folder", name)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target}: already exists; choose a new folder")


def _flush(path: pathlib.Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
