"""Reads and writes PEFT adapters, and opens models with an unmerged adapter.

docs/weights.md describes the format, which vLLM reads too.
"""

import dataclasses
import functools
import os
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from gptoss_jax.checkpoints.export import atomic_folder
from gptoss_jax.checkpoints.mappings import ADAPTER_PREFIX, HUGGINGFACE, TensorMapping
from gptoss_jax.checkpoints.peft_reader import MODULES, PARAMETERS, WEIGHTS, PeftFolder
from gptoss_jax.checkpoints.readers import (
    HUB,
    AdaptedReader,
    Adapter,
    WeightReader,
    describe_base,
    local_folder,
    open_weights,
    read_run_adapter,
)
from gptoss_jax.checkpoints.run_params import is_run, run_base
from gptoss_jax.checkpoints.safetensors_io import ADAPTER_CONFIG, NewTensor, write_file
from gptoss_jax.config import ModelConfig, TrainConfig
from gptoss_jax.config.base import listed, read_json, require, write_json
from gptoss_jax.config.model import EXPERT_TARGETS, LORA_TARGETS
from gptoss_jax.model.lora import adapter_names
from gptoss_jax.model.parameters import adapted_target, shape_of

# The version of PEFT that the output was tested with.
PEFT_VERSION = "0.21.2"


def open_adapted(folder: str | os.PathLike, adapter: str | os.PathLike | None = None) -> WeightReader:
    """Opens the weights of a folder with an unmerged adapter; None uses the run's own, if it trained one.

    Raises ValueError like `open_weights` and `read_adapter`, and for two adapters.
    """
    reader = open_weights(folder)
    if adapter is None:
        return reader
    allowed = f"{folder} already has an adapter; name its base model instead"
    require(reader.config.lora is None, "adapter", str(adapter), allowed)
    found = read_adapter(adapter, reader.config)
    warn_of_other_base(adapter, folder)
    adapted = AdaptedReader(reader, found)
    local = local_folder(adapter)
    # The run of the adapter says how it is used, not that of the base.
    is_rounded = is_run(local) and TrainConfig.load(local / "config.json").model.expert_fake_quant
    adapted.config = dataclasses.replace(adapted.config, expert_fake_quant=is_rounded)
    return adapted


def warn_of_other_base(adapter: str | os.PathLike, folder: str | os.PathLike) -> None:
    """Warns if a run's adapter was trained on other base weights than a folder's. PEFT's files do not record
    which weights they were trained on."""
    local = local_folder(adapter)
    base = run_base(local) if is_run(local) else None
    if base is None:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # already shown when the folder was opened
        ours = describe_base(folder)
    if base.fingerprint != ours.fingerprint:
        where = base.folder if base.step is None else f"step {base.step} of {base.folder}"
        warnings.warn(
            f"{adapter}: trained on the weights of {where}, which differ from those of {folder}",
            stacklevel=3,
        )


def read_adapter(folder: str | os.PathLike, config: ModelConfig, field: str = "adapter") -> Adapter:
    """Reads an adapter for a model: a PEFT folder, `hf:OWNER/NAME`, or a run that trained adapters.

    All targets get the same rank and scaling: missing layers, experts and ranks of a PEFT adapter are filled
    with zeros, and a different scaling is multiplied into B.

    `field` is the setting that names the folder, for error messages.

    Raises ValueError for a folder without an adapter or with one that is not plain LoRA, for an ambiguous
    layout, and for tensors that do not fit the model, by name.
    """
    local = local_folder(folder)
    if not is_run(local):
        return PeftFolder(local, config).read()
    adapter, wrong = read_run_adapter(local, field), []
    config = dataclasses.replace(config, lora=adapter.lora)
    for (key, layer), tensor in adapter.tensors.items():
        if layer >= config.num_hidden_layers or tensor.shape != shape_of(config, key):
            wrong.append(f"{key} of layer {layer} has shape {list(tensor.shape)}")
    # The head counts as layer -1.
    layers = {layer for _, layer in adapter.tensors} - {-1}
    if wrong or len(layers) not in (0, config.num_hidden_layers):
        raise ValueError(
            f"{local}: the adapter is for another model: {listed(wrong) or f'{len(layers)} layers'}"
        )
    return adapter


def export_adapter(run: str | os.PathLike, folder: str | os.PathLike) -> Adapter:
    """Exports a run's adapter for PEFT and vLLM, and returns it; see `write_adapter`."""
    local = local_folder(run)
    if not is_run(local):
        if (local / "config.json").is_file():
            read_json(local / "config.json")  # says what is wrong with a damaged one
        raise ValueError(f"{run}: must be a run folder that trained adapters (model.lora)")
    adapter, config = read_run_adapter(local, "RUN"), TrainConfig.load(local / "config.json")
    extra = sorted({key for key, _ in adapter.tensors if adapted_target(key) is None})
    if extra:
        raise ValueError(f"{run}: also trained {listed(extra)}, not only adapters: use gptoss merge")
    if config.model.expert_fake_quant:
        warnings.warn(
            f"{run}: trained with model.expert_fake_quant; other programs add the adapter to the base "
            "without rounding the sum, which is another model. gptoss merge writes the one that was trained",
            stacklevel=2,
        )
    found = run_base(local)
    base = str(local) if found is None else found.folder
    if config.init_from is not None and config.init_from.startswith(HUB):
        base = config.init_from.removeprefix(HUB)
    write_adapter(adapter, config.model, folder, base)
    return adapter


def write_adapter(
    adapter: Adapter, config: ModelConfig, folder: str | os.PathLike, base: str | None = None
) -> None:
    """Writes an adapter as PEFT's adapter_model.safetensors and adapter_config.json.

    If only one of gate_up and down is adapted, the other is written as zeros, because vLLM expects both.

    Args:
      config: the model's config.
      folder: must not exist or be empty. It is created atomically.
      base: name or folder of the base model.
    """
    lora = adapter.lora
    targets = [
        target
        for target in LORA_TARGETS
        if target in lora.targets or (target in EXPERT_TARGETS and {*EXPERT_TARGETS} & {*lora.targets})
    ]
    config = dataclasses.replace(config, lora=dataclasses.replace(lora, targets=tuple(targets)))
    tensors = []
    for key in adapter_names(config):
        for layer in [-1] if key.startswith("head.") else range(config.num_hidden_layers):
            mapping, found = HUGGINGFACE[key], adapter.tensors.get((key, layer))
            array = np.zeros(shape_of(config, key), np.float32) if found is None else found.array
            chunks = functools.partial(_file_chunks, mapping, array)
            name, dtype = ADAPTER_PREFIX + mapping.name(layer), np.dtype(np.float32)
            tensors.append(NewTensor(name, dtype, mapping.file_shape(config), chunks))
    with atomic_folder(folder, sum(tensor.nbytes for tensor in tensors) + (1 << 20)) as partial:
        write_file(partial / WEIGHTS, tensors)
        write_json(partial / ADAPTER_CONFIG, _peft_config(config, base))


def _file_chunks(mapping: TensorMapping, array: np.ndarray) -> Iterator[np.ndarray]:
    yield mapping.to_file(array.astype(np.float32))


def _peft_config(config: ModelConfig, base: str | None) -> dict[str, Any]:
    """Returns the contents of adapter_config.json."""
    lora = config.lora
    assert lora is not None
    experts = [MODULES[target] for target in EXPERT_TARGETS if target in lora.targets]
    expert_rank = config.lora_rank(EXPERT_TARGETS[0])
    other_rank = experts if expert_rank != lora.rank else []
    alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
    modules = [MODULES[target].rpartition(".")[2] for target in lora.targets if target not in PARAMETERS]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "peft_version": PEFT_VERSION,
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": alpha,
        "rank_pattern": dict.fromkeys(other_rank, expert_rank),
        "alpha_pattern": dict.fromkeys(other_rank, alpha),
        "use_rslora": lora.rslora,
        "target_modules": modules,
        "target_parameters": [MODULES[target] for target in lora.targets if target in PARAMETERS],
        "layers_to_transform": None,
        "modules_to_save": None,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_dora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
