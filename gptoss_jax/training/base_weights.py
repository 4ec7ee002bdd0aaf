"""Frozen base weights of a LoRA run, from `init_from`, and its initial adapters."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from gptoss_jax.checkpoints.adapters import read_adapter, warn_of_other_base
from gptoss_jax.checkpoints.base_model import BaseModel
from gptoss_jax.checkpoints.load import load_target, read_params, warn_non_finite_params
from gptoss_jax.checkpoints.readers import HUB, Adapter, describe_base, local_folder, open_weights
from gptoss_jax.checkpoints.run import Checkpoints
from gptoss_jax.checkpoints.run_params import is_run, load_run, run_base
from gptoss_jax.config import LoraConfig, ModelConfig, TrainConfig, require
from gptoss_jax.config.base import listed
from gptoss_jax.model.lora import is_adapter
from gptoss_jax.model.parameters import adapted_target, parameter_shardings, split_params
from gptoss_jax.model.transformer import abstract_params, compute_dtype, init_params
from gptoss_jax.training.state import parameter_key


def base_config(config: ModelConfig) -> ModelConfig:
    """Returns the config of the model without adapters."""
    return dataclasses.replace(config, lora=None)


def find_base(config: TrainConfig, checkpoints: Checkpoints) -> BaseModel:
    """Returns the base model of a run: the one in its checkpoints, otherwise `init_from`.

    Raises ValueError if `init_from` is a different base model than the one in the checkpoints.
    """
    records = map(checkpoints.record, reversed(checkpoints.steps))
    record: dict[str, Any] = next((record for record in records if record.get("base")), {})
    recorded = BaseModel.from_record(record)
    if recorded is None:
        return describe_base(_init_from(config))
    before = record["config"]["init_from"]
    is_fetched = (config.init_from or "").startswith(HUB)
    if config.init_from in (None, before) and (not is_fetched or pathlib.Path(recorded.folder).is_dir()):
        return recorded
    named = describe_base(_init_from(config))
    allowed = f"not the base model of the run in {config.run_dir}, which is that of {recorded.folder}"
    require(named.fingerprint == recorded.fingerprint, "init_from", config.init_from, allowed)
    return named


def load_base(config: TrainConfig, mesh: Mesh, base: BaseModel) -> dict:
    """Loads the parameters of a base model onto the mesh.

    Parameters keep their storage dtype if the model computes in bfloat16, and are float32 if it computes in
    float32; packed experts stay packed if `model.expert_format` is "mxfp4".

    Raises ValueError if the base model is missing or has changed.
    """
    folder, model = base.check(config.run_dir), base_config(config.model)
    dtype = "float32" if compute_dtype(model) == "float32" else None
    if base.step is None:
        reader = open_weights(folder)
        return read_params(reader, model, load_target(model, mesh, dtype, stored_dtype=reader.dtype))
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
        load_target(model, mesh, dtype),
    )
    _, params, _ = load_run(folder, base.step, abstract=target)
    warn_non_finite_params(model, params, folder)
    return params


def first_adapters(config: TrainConfig, mesh: Mesh) -> dict:
    """Returns the initial adapters of a run, on the mesh: from `init_adapter`, from the adapter run in
    `init_from`, or new ones."""
    adapter = find_adapter(config)
    if adapter is None:
        return create_adapters(config, mesh)
    target, _ = split_params(load_target(config.model, mesh, None), is_adapter)
    return read_params(adapter, config.model, target)


def find_adapter(config: TrainConfig) -> Adapter | None:
    """Returns the adapter that a run continues; see `first_adapters`. Raises ValueError if `model.lora` has
    different settings, or if there are two adapters."""
    field, folder = "init_adapter", config.init_adapter
    init_from = local_folder(_init_from(config))
    if is_run(init_from) and TrainConfig.load(init_from / "config.json").model.lora is not None:
        allowed = f"{config.init_from} (init_from) already has an adapter; name its base model instead"
        require(folder is None, field, folder, allowed)
        field, folder = "init_from", config.init_from
    if folder is None:
        return None
    adapter, lora = read_adapter(folder, base_config(config.model), field), config.model.lora
    assert lora is not None, "model.lora is None"
    extra = sorted({key for key, _ in adapter.tensors if adapted_target(key) is None})
    require(not extra, field, folder, f"also trained {listed(extra)}: merge it first (gptoss merge)")
    ours = _settings(lora, config.model)
    theirs = _settings(adapter.lora, dataclasses.replace(config.model, lora=adapter.lora))
    differing = [
        f"{name} is {value!r}, theirs {theirs.get(name)!r}"
        for name, value in ours.items()
        if value != theirs.get(name)
    ]
    require(not differing, field, folder, f"an adapter with other settings: {'; '.join(differing)}")
    return adapter


def _settings(lora: LoraConfig, config: ModelConfig) -> dict[str, object]:
    """Returns the settings that must match to continue an adapter, by field."""
    settings = {"targets": tuple(sorted(lora.targets)), "alpha": lora.alpha, "rslora": lora.rslora}
    ranks = {f"rank of {target}": config.lora_rank(target) for target in lora.targets}
    return {f"model.lora.{name}": value for name, value in settings.items()} | ranks


def create_adapters(config: TrainConfig, mesh: Mesh) -> dict:
    """Creates new adapters. Each device initializes only its own shards, and no base weights."""
    abstract, _ = split_params(abstract_params(config.model), is_adapter)

    def init():
        return split_params(init_params(config.model, parameter_key(config)), is_adapter)[0]

    return jax.jit(init, out_shardings=parameter_shardings(abstract, mesh))()


def check_base(config: TrainConfig, report: Callable[[str], None]) -> None:
    """Raises ValueError if `init_from` cannot be the base of the run's adapters, or `init_adapter` cannot be
    continued; does not read base weights. Reports if packed experts will be unpacked."""
    folder = local_folder(_init_from(config))
    base = run_base(folder) if is_run(folder) else None
    if base is not None:
        folder = base.check(folder)
    if is_run(folder):
        is_packed = TrainConfig.load(folder / "config.json").model.expert_format == "mxfp4"
    else:
        is_packed = open_weights(folder).packed
    allowed = (
        "its experts are not in MXFP4, as model.expert_format 'mxfp4' requires; pack them (gptoss convert "
        "SRC DST --experts mxfp4), or train with --model.expert-format plain"
    )
    is_fitting = is_packed or config.model.expert_format == "plain"
    require(is_fitting, "init_from", config.init_from, allowed)
    allowed = (
        "must be 'mxfp4' with model.expert_fake_quant, because the experts of init_from are packed, and "
        "gptoss merge keeps their scales"
    )
    is_unpacked = is_packed and config.model.expert_format == "plain"
    is_fitting = not (is_unpacked and config.model.expert_fake_quant)
    require(is_fitting, "model.expert_format", config.model.expert_format, allowed)
    if is_unpacked:
        report(
            f"The experts of {config.init_from} are packed in MXFP4 and are unpacked in this run; "
            "--model.expert-format mxfp4 keeps them packed"
        )
    find_adapter(config)
    if config.init_adapter is not None:
        warn_of_other_base(config.init_adapter, _init_from(config))


def _init_from(config: TrainConfig) -> str:
    if config.init_from is None:
        raise ValueError("init_from is None: must name the weights that model.lora adapts")
    return config.init_from
