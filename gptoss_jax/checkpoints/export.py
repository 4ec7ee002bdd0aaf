"""Models to Hugging Face folders: whatever the source and its types, piece by piece."""

import dataclasses
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.checkpoints import lazy_tensors, safetensors_io, sharded_io
from gptoss_jax.checkpoints.mappings import HUGGINGFACE, parameters_by_layer
from gptoss_jax.checkpoints.readers import (
    Format,
    InMemoryReader,
    WeightReader,
    check_choice,
    local_folder,
    open_weights,
    sidecar_files,
    warn_non_finite,
    with_experts,
)
from gptoss_jax.checkpoints.run import is_run, load_config
from gptoss_jax.config import ModelConfig
from gptoss_jax.config.base import read_json, write_json
from gptoss_jax.data.tokenizer import Tokenizer, load_tokenizer
from gptoss_jax.model.transformer import Transformer, abstract_params, get_params
from gptoss_jax.parallel.rules import path_names

GENERATION = "generation_config.json"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# exp(this - anything) is 0: how a model without learned sinks is written in a format that has them.
NO_SINK = float(jnp.finfo(jnp.bfloat16).min)
# What a writer is handed at a time, unless the tensor must be turned as a whole.
CHUNK_BYTES = 64 << 20


def save_pretrained(
    model: Transformer,
    folder: str | os.PathLike,
    experts: Format | None = None,
    tokenizer: str | os.PathLike | None = None,
    shard_bytes: int = safetensors_io.SHARD_BYTES,
) -> None:
    """Writes a model as a Hugging Face folder, which transformers and vLLM load.

    Args:
      folder: must not exist yet, or be empty. It appears when it is whole.
      experts: the type of the weights; "mxfp4" packs the experts' matrices and makes all else bfloat16. What
        was loaded packed keeps its bytes. None is mxfp4 where the model's are packed, else float32 where
        anything is, else bfloat16.
      tokenizer: a folder whose tokenizer goes with it; None is where the model was loaded from.
      shard_bytes: the size of a file before another one is begun.

    Raises ValueError for a model that the format cannot express, saying why, and for a folder that holds
    something; OSError when it cannot be written.
    """
    origin = None if model.origin is None else pathlib.Path(model.origin)
    if tokenizer is not None:
        origin = local_folder(tokenizer)
        if not {"tokenizer.json", "tokenizer_name.txt"} & {path.name for path in origin.iterdir()}:
            raise ValueError(
                f"tokenizer is {str(tokenizer)!r}: must hold tokenizer.json or tokenizer_name.txt"
            )
    elif origin is not None and not origin.is_dir():
        raise ValueError(
            f"tokenizer is None: {origin}, where the model came from, is gone; name another folder"
        )
    source = InMemoryReader(model.config, get_params(model), origin)
    write_folder(source, folder, experts, shard_bytes)


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    experts: Format | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes the model of any folder as a Hugging Face folder; see `save_pretrained` and `write_folder`.

    Published weights go piece by piece. A run's are restored first, whole and in float32.
    """
    safetensors_io.check_target(target)
    local = local_folder(source)
    if is_run(local):
        # What cannot be written is better known before.
        load_config(local).model.to_hf(experts or "float32")
    write_folder(open_weights(local), target, experts, progress=progress)


def write_folder(
    source: WeightReader,
    folder: str | os.PathLike,
    experts: str | None = None,
    shard_bytes: int = safetensors_io.SHARD_BYTES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes any source's weights as a Hugging Face folder; see `save_pretrained`.

    `progress` hears of the bytes written and of all of them.
    """
    check_choice("experts", experts, ("bfloat16", "float32", "mxfp4"))
    if jax.process_count() > 1:
        raise ValueError("a model is written by one process: load its checkpoint in one and save it there")
    if experts is None:
        keys = {".".join(names[-2:]) for names, _ in parameters_by_layer(source.config)}
        wide = any(source.dtype(key) != lazy_tensors.BFLOAT16 for key in keys)
        experts = "mxfp4" if source.packed else "float32" if wide else "bfloat16"
    safetensors_io.check_target(folder)
    tokenizer = _own_tokenizer(source.origin)
    # What a model does without is written as what has no effect.
    config = dataclasses.replace(source.config, router_bias=True, expert_bias=True, learned_sinks=True)
    values = config.to_hf(experts) | _token_ids(source.origin, tokenizer)
    non_finite: set[str] = set()
    tensors = _new_tensors(source, with_experts(config, experts == "mxfp4"), experts, non_finite)
    total, done = sum(tensor.nbytes for tensor in tensors), 0

    def wrote(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    with safetensors_io.atomic_folder(folder, total + (64 << 20)) as partial:
        safetensors_io.write_tensors(partial, tensors, shard_bytes, wrote)
        for name, path in sidecar_files(source.origin).items():
            shutil.copyfile(path, partial / name)
        if tokenizer is not None:
            tokenizer.export(partial)
        write_json(partial / "config.json", values)
        generation = _generation_ids(values, tokenizer)
        if generation and not (partial / GENERATION).exists():
            write_json(partial / GENERATION, generation)
    warn_non_finite(non_finite, source.origin)


def _new_tensors(
    source: WeightReader, config: ModelConfig, experts: str, non_finite: set[str]
) -> list[safetensors_io.NewTensor]:
    """Every tensor of the Hugging Face folder of a config, layer by layer."""
    have = {".".join(names[-2:]) for names, _ in parameters_by_layer(source.config)}
    dtype = np.dtype(np.float32) if experts == "float32" else lazy_tensors.BFLOAT16
    abstract = {
        path_names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(config))
    }
    found = []
    for names, layers in parameters_by_layer(config):
        key, leaf = ".".join(names[-2:]), abstract[names]
        shape = leaf.shape if layers == [-1] else leaf.shape[1:]
        kind = np.dtype(np.uint8) if leaf.dtype == jnp.uint8 else dtype
        absent = key not in have and kind != np.uint8
        for layer in layers:
            layout = HUGGINGFACE[key]
            name = layout.name.format(layer)
            piece = _absent(key, name, shape) if absent else None

            def chunks(piece=piece, key=key, layer=layer, shape=shape, kind=kind, layout=layout):
                piece = piece or source.piece(key, layer)
                return _chunks(piece, shape, kind, layout, non_finite)

            place = {"embedding": -1, "blocks": layer}.get(names[0], config.num_hidden_layers)
            found.append((place, safetensors_io.NewTensor(name, kind, layout.file_shape(config), chunks)))
    return [tensor for _, tensor in sorted(found, key=lambda entry: entry[0])]


def _absent(key: str, name: str, shape: tuple[int, ...]) -> lazy_tensors.ConstantTensor:
    return lazy_tensors.ConstantTensor(name, shape, NO_SINK if key == "attention.sinks" else 0.0)


def _chunks(piece, shape, kind, layout, non_finite) -> Iterator[np.ndarray]:
    row = int(np.prod(shape[1:], dtype=np.int64)) * kind.itemsize
    step = max(1, CHUNK_BYTES // row) if layout.keeps_first_axis else shape[0]
    for start in range(0, shape[0], step):
        part = slice(start, min(start + step, shape[0]))
        out = np.empty((part.stop - part.start, *shape[1:]), kind)
        non_finite.update(sharded_io.fill([(out, piece, (part, *(slice(0, size) for size in shape[1:])))]))
        yield layout.to_file(out)


def _own_tokenizer(origin: pathlib.Path | None) -> Tokenizer | None:
    """The tokenizer of a folder that keeps it as ours do: less than others want, or only its name."""
    if origin is None or not (is_run(origin) or (origin / "tokenizer_name.txt").is_file()):
        return None
    return load_tokenizer(origin)


def _token_ids(origin: pathlib.Path | None, tokenizer: Tokenizer | None) -> dict[str, int | list[int]]:
    """The ids of bos, eos and padding that config.json names."""
    if tokenizer is not None:
        return {f"{role}_id": tokenizer.special_tokens[name] for role, name in tokenizer.token_roles.items()}
    if origin is None:
        return {}
    # The released config.json names the turn's end alone; only where it says nothing is the other file asked.
    for path in (origin / "config.json", sidecar_files(origin).get(GENERATION)):
        values = read_json(path) if path is not None and path.is_file() else {}
        found = {name: values[name] for name in TOKEN_IDS if values.get(name) is not None}
        if found:
            return found
    return {}


def _generation_ids(config: dict[str, Any], tokenizer: Tokenizer | None) -> dict[str, int | list[int]]:
    """The ids that generation_config.json names: those of config.json, and all that end an answer as eos."""
    ids = {name: config[name] for name in TOKEN_IDS if name in config}
    if tokenizer is not None:
        stops = list(tokenizer.stop_ids)
        ids["eos_token_id"] = stops if len(stops) > 1 else stops[0]
    return ids
