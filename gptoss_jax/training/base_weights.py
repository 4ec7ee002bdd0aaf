"""The frozen base weights of a LoRA run, from `init_from`, and its new adapters."""

import dataclasses

import jax
from jax.sharding import Mesh

from gptoss_jax.checkpoints.load import load_target, read_params, warn_non_finite_params
from gptoss_jax.checkpoints.readers import is_run, load_run, local_folder, open_weights
from gptoss_jax.config import ModelConfig, TrainConfig, require
from gptoss_jax.model.lora import is_adapter
from gptoss_jax.model.parameters import parameter_shardings, split_params
from gptoss_jax.model.transformer import abstract_params, compute_dtype, init_params
from gptoss_jax.training.state import parameter_key


def base_config(config: ModelConfig) -> ModelConfig:
    """Returns the config of the model without adapters."""
    return dataclasses.replace(config, lora=None)


def load_base(config: TrainConfig, mesh: Mesh) -> dict:
    """Loads the parameters of `init_from` without adapters, onto the mesh.

    They keep their stored type where the model computes in bfloat16, and are float32 where it computes in
    float32; packed experts stay packed with `model.expert_format` "mxfp4".
    """
    folder, base = local_folder(config.init_from), base_config(config.model)
    dtype = "float32" if compute_dtype(base) == "float32" else None
    if not is_run(folder):
        reader = open_weights(folder)
        return read_params(reader, base, load_target(base, mesh, dtype, stored_dtype=reader.dtype))
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
        load_target(base, mesh, dtype),
    )
    _, params, _ = load_run(folder, abstract=target)
    warn_non_finite_params(base, params, folder)
    return params


def create_adapters(config: TrainConfig, mesh: Mesh) -> dict:
    """New adapters. Every device initializes only its own shards, and none the base weights."""
    abstract, _ = split_params(abstract_params(config.model), is_adapter)

    def init():
        return split_params(init_params(config.model, parameter_key(config)), is_adapter)[0]

    return jax.jit(init, out_shardings=parameter_shardings(abstract, mesh))()


def check_base(config: TrainConfig) -> None:
    """Raises ValueError if `init_from` cannot be the base of the run's adapters; reads no weights."""
    require(config.init_from is not None, "init_from", None, "must name the weights that model.lora adapts")
    folder = local_folder(config.init_from)
    if is_run(folder):
        theirs = TrainConfig.load(folder / "config.json").model
        allowed = "a run of adapters itself: merge them into their base first"
        require(theirs.lora is None, "init_from", config.init_from, allowed)
        is_packed = theirs.expert_format == "mxfp4"
    else:
        is_packed = open_weights(folder).packed
    allowed = (
        "its experts are not packed in MXFP4, as model.expert_format 'mxfp4' asks for; gptoss convert packs "
        "them with --experts mxfp4, and 'plain' trains adapters of weights as they are"
    )
    is_fitting = is_packed or config.model.expert_format == "plain"
    require(is_fitting, "init_from", config.init_from, allowed)
