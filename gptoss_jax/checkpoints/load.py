"""Models from any folder: Hugging Face (bfloat16, float32 or MXFP4), `original/`, a run of train.py."""

import dataclasses
import os
import pathlib
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.checkpoints import sharded_io
from gptoss_jax.checkpoints.mappings import HUGGINGFACE, parameters_by_layer
from gptoss_jax.checkpoints.model_files import refuse_other_contents
from gptoss_jax.checkpoints.readers import (
    MATRICES,
    Format,
    WeightReader,
    check_choice,
    find_tokenizer,
    local_folder,
    open_weights,
    warn_non_finite,
    with_experts,
)
from gptoss_jax.checkpoints.run import is_run, load_config, load_run
from gptoss_jax.config import ModelConfig
from gptoss_jax.data.tokenizer import Tokenizer
from gptoss_jax.model.transformer import Transformer, abstract_params, bind
from gptoss_jax.parallel.rules import parameter_shardings, path_names


def from_pretrained(
    folder: str | os.PathLike,
    dtype: Literal["bfloat16", "float32"] | None = None,
    experts: Format | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Transformer:
    """The model of a Hugging Face folder, of `original/`, of a run folder of train.py, or of `hf:OWNER/NAME`.

    Args:
      folder: where it is. Its weights are read one by one, each straight to its place.
      dtype: the type of the parameters and of the computation; None keeps the files' and computes in float32
        on CPU and bfloat16 elsewhere.
      experts: how the experts' matrices are held: "mxfp4" keeps the released bytes packed, 4.25 bits each,
        while they are used too; None leaves them packed if they are, else they are of `dtype`.
      mesh: where the parameters lie, as the path table says; None is the first device. Use the model under
        `jax.set_mesh(mesh)`.

    Raises ValueError for a folder that is not there or not a model's, for a damaged file, and, all together,
    for tensors that are missing, surplus or misshapen. Warns of tensors that hold something not finite.
    """
    config, params, origin = load_pretrained(folder, dtype, experts, mesh)
    model = bind(config, params)
    model.origin = None if origin is None else str(origin.resolve())
    return model


def load_pretrained(
    folder: str | os.PathLike,
    dtype: str | None = None,
    experts: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[ModelConfig, dict, pathlib.Path | None]:
    """What `from_pretrained` makes a model of: config, parameter tree, and the folder with the tokenizer."""
    check_choice("dtype", dtype, ("bfloat16", "float32"))
    check_choice("experts", experts, ("bfloat16", "float32", "mxfp4"))
    local = local_folder(folder)
    if is_run(local) and experts != "mxfp4":
        # Orbax puts each array straight to its place itself, in XLA's own order.
        config = load_config(local).model
        tree = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
            with_shardings(with_dtypes(config, dtype, experts), mesh),
        )
        _, params, _ = load_run(local, abstract=tree)
        warn_non_finite_params(config, params, local)
        return _computing_in(config, dtype), params, local
    source = open_weights(local)
    packed = experts == "mxfp4" or (experts is None and source.packed)
    config = _computing_in(with_experts(source.config, packed), dtype)
    tree = with_dtypes(config, dtype, experts, source.dtype)
    return config, read_params(source, config, with_shardings(tree, mesh)), source.origin


def _computing_in(config: ModelConfig, dtype: str | None) -> ModelConfig:
    return config if dtype is None else dataclasses.replace(config, compute_dtype=dtype)


def with_dtypes(
    config: ModelConfig,
    dtype: str | None,
    experts: str | None = None,
    held: Callable[[str], np.dtype] = lambda key: np.dtype(np.float32),
) -> dict:
    """The abstract parameters in the types that were asked for, or else those they are held in."""

    def typed(path, leaf):
        key = ".".join(path_names(path)[-2:])
        kind = experts if experts and key in MATRICES else dtype
        packed = leaf.dtype == jnp.uint8
        return leaf if packed else jax.ShapeDtypeStruct(leaf.shape, kind or held(key))

    return jax.tree_util.tree_map_with_path(typed, abstract_params(config))


def with_shardings(tree: dict, mesh: jax.sharding.Mesh | None) -> dict:
    """The tree with a place for each array: as the path table says, or the first device."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shardings = jax.tree.map(lambda leaf: here, tree) if mesh is None else parameter_shardings(tree, mesh)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf, place: sharded_io.abstract(".".join(path_names(path)[-2:]), leaf, place),
        tree,
        shardings,
    )


def load_model(folder: str | os.PathLike) -> tuple[ModelConfig, dict, Tokenizer]:
    """What it takes to run the model of any folder that `from_pretrained` reads: config, parameter tree,
    tokenizer.

    Raises ValueError as that does, and when the folder holds no tokenizer.
    """
    local = local_folder(folder)
    if not is_run(local) and not (local / "original").is_dir():
        # Before the tokenizer, so that an adapter is not refused because it has none.
        refuse_other_contents(local)
    tokenizer = find_tokenizer(local)
    if tokenizer is None:
        raise ValueError(f"{folder}: must hold tokenizer.json or tokenizer_name.txt")
    config, params, _ = load_pretrained(local)
    return config, params, tokenizer


def warn_non_finite_params(config: ModelConfig, params: dict, origin: pathlib.Path) -> None:
    """Warns of every tensor of a parameter tree that holds something not finite."""

    def sound(leaf):
        axes = tuple(range(1, leaf.ndim))
        return jnp.all(jnp.isfinite(leaf), axis=axes)

    found = jax.device_get(jax.jit(lambda tree: jax.tree.map(sound, tree))(params))
    layers, non_finite = dict(parameters_by_layer(config)), set()
    for path, rows in jax.tree_util.tree_leaves_with_path(found):
        names = path_names(path)
        layout, which = HUGGINGFACE[".".join(names[-2:])], layers[names]
        if which == [-1]:
            rows = rows.all(keepdims=True)
        non_finite |= {layout.name.format(layer) for layer, row in zip(which, rows, strict=True) if not row}
    warn_non_finite(non_finite, origin)


def read_params(source: WeightReader, config: ModelConfig, tree: dict) -> dict:
    """The parameter tree of a config; `tree` gives each array's shape, type and sharding."""
    layers = dict(parameters_by_layer(config))
    non_finite: set[str] = set()

    def one(path, leaf):
        names = path_names(path)
        found = [source.piece(".".join(names[-2:]), layer) for layer in layers[names]]
        array, not_finite = sharded_io.load(leaf, found)
        non_finite.update(not_finite)
        return array

    params = jax.tree_util.tree_map_with_path(one, tree)
    warn_non_finite(non_finite, source.origin)
    return params
