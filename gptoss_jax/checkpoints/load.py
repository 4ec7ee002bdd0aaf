"""Loads models from Hugging Face folders (bfloat16, float32, MXFP4), `original/`, and training runs."""

import dataclasses
import os
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.checkpoints.adapters import open_adapted
from gptoss_jax.checkpoints.mappings import EXPERT_MATRICES, HUGGINGFACE, parameter_layers
from gptoss_jax.checkpoints.readers import (
    Adapter,
    ExpertFormat,
    WeightReader,
    check_formats,
    find_tokenizer,
    local_folder,
    open_weights,
    warn_non_finite,
    with_experts,
)
from gptoss_jax.checkpoints.run_params import is_run, load_run, run_base
from gptoss_jax.checkpoints.safetensors_io import refuse_other_contents
from gptoss_jax.checkpoints.sharded_io import load_sharded, with_layout
from gptoss_jax.config import ModelConfig, TrainConfig
from gptoss_jax.data.tokenizer import Tokenizer
from gptoss_jax.model.parameters import (
    adapted_target,
    parameter_name,
    parameter_shardings,
    path_names,
)
from gptoss_jax.model.transformer import Transformer, abstract_params, bind
from gptoss_jax.parallel.mesh import check_model
from gptoss_jax.status import progress


def from_pretrained(
    folder: str | os.PathLike,
    dtype: Literal["bfloat16", "float32"] | None = None,
    experts: ExpertFormat | None = None,
    mesh: jax.sharding.Mesh | None = None,
    adapter: str | os.PathLike | None = None,
) -> Transformer:
    """Loads a model from a Hugging Face folder, `original/`, a training run, or `hf:OWNER/NAME`.

    Arrays are read one at a time, directly into their shards. A run that trained adapters is loaded with its
    base model.

    Args:
      folder: path or `hf:OWNER/NAME`.
      dtype: dtype of parameters and compute. None keeps the stored dtypes and computes in float32 on CPU and
        bfloat16 elsewhere.
      experts: format of the experts' matrices. "mxfp4" keeps them packed at 4.25 bits per weight, also during
        compute. None keeps packed matrices packed, and others in `dtype`; a run with
        `model.expert_fake_quant` is loaded as it computes, with packed experts and the rest in bfloat16.
      mesh: shards the parameters as `parallel.rules` specifies; None puts them on the first device. Call the
        model under `jax.set_mesh(mesh)`.
      adapter: folder of a PEFT adapter, `hf:OWNER/NAME`, or a run that trained adapters. It stays unmerged,
        in float32; `gptoss merge` merges it.

    Raises ValueError for a missing folder, a folder without a model, a damaged file, and, in one message, for
    all tensors that are missing, unexpected or of the wrong shape. Warns about NaN and infinite values.
    """
    config, params, origin = load_pretrained(folder, dtype, experts, mesh, adapter)
    model = bind(config, params)
    model.origin = None if origin is None else str(origin.resolve())
    return model


def load_pretrained(
    folder: str | os.PathLike,
    dtype: str | None = None,
    experts: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    adapter: str | os.PathLike | None = None,
) -> tuple[ModelConfig, dict, pathlib.Path | None]:
    """Same as `from_pretrained`, but returns config, parameters, and the folder with the tokenizer."""
    check_formats(dtype, experts)
    local = local_folder(folder)
    compute: dict[str, Any] = {} if dtype is None else {"compute_dtype": dtype}
    run_config = None
    if is_run(local) and adapter is None and run_base(local) is None:
        run_config = TrainConfig.load(local / "config.json").model
        if run_config.expert_fake_quant and experts is None:
            # The weights that the run computes with (`model/fake_quant.py`), rounded once.
            return _load_rounded(local, dtype, mesh, compute)
    if run_config is not None and experts != "mxfp4":
        # Orbax reads each array directly into its shards, in XLA's default memory layout.
        config = run_config
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
            load_target(config, mesh, dtype, experts),
        )
        _, params, _ = load_run(local, abstract=target)
        warn_non_finite_params(config, params, local)
        return dataclasses.replace(config, **compute), params, local
    reader = open_adapted(local, adapter)
    packed = experts == "mxfp4" or (experts is None and reader.packed)
    config = dataclasses.replace(with_experts(reader.config, packed), **compute)
    params = read_params(reader, config, load_target(config, mesh, dtype, experts, reader.dtype))
    return config, params, reader.origin


def _load_rounded(
    run: pathlib.Path, dtype: str | None, mesh: jax.sharding.Mesh | None, compute: dict[str, Any]
) -> tuple[ModelConfig, dict, pathlib.Path | None]:
    """Loads a run with `model.expert_fake_quant`: packed experts, and the rest rounded to bfloat16."""
    reader = open_weights(run)
    config = dataclasses.replace(with_experts(reader.config, packed=True), **compute)
    # The dtype that is asked for holds the rounded values.
    params = read_params(reader, config, load_target(config, mesh, "bfloat16", "mxfp4"))
    if dtype == "float32":
        params = jax.tree.map(lambda x: x if x.dtype == jnp.uint8 else x.astype(dtype), params)
    return config, params, reader.origin


def load_target(
    config: ModelConfig,
    mesh: jax.sharding.Mesh | None,
    dtype: str | None,
    experts: str | None = None,
    stored_dtype: Callable[[str], np.dtype] = lambda key: np.dtype(np.float32),
) -> dict:
    """Returns abstract parameters with dtypes, shardings and memory layouts; see `from_pretrained`.

    `stored_dtype` returns the dtype of a parameter if none is requested. Adapters are float32.
    """

    def typed(path, leaf):
        key = parameter_name(path)
        asked = experts if experts and key in EXPERT_MATRICES else dtype
        is_fixed = leaf.dtype == jnp.uint8 or adapted_target(key) is not None
        return leaf if is_fixed else jax.ShapeDtypeStruct(leaf.shape, asked or stored_dtype(key))

    tree = jax.tree_util.tree_map_with_path(typed, abstract_params(config))
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if mesh is not None:
        check_model(config, dict(mesh.shape))
    shardings = jax.tree.map(lambda leaf: first, tree) if mesh is None else parameter_shardings(tree, mesh)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf, sharding: with_layout(parameter_name(path), leaf, sharding),
        tree,
        shardings,
    )


def read_params(reader: WeightReader | Adapter, config: ModelConfig, target: dict) -> dict:
    """Reads all parameters; `target` specifies the shape, dtype and sharding of each array."""
    layers_of = parameter_layers(config)
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(target)]
    done, total = 0, sum(sizes)
    non_finite: dict[pathlib.Path | None, set[str]] = {}

    def read(path, leaf):
        nonlocal done
        progress(done, total)
        done += leaf.size * leaf.dtype.itemsize
        path = path_names(path)
        key = parameter_name(path)
        array, names = load_sharded(leaf, [reader.tensor(key, layer) for layer in layers_of[path]])
        non_finite.setdefault(reader.origin_of(key), set()).update(names)
        return array

    params = jax.tree_util.tree_map_with_path(read, target)
    for origin, names in non_finite.items():
        warn_non_finite(names, origin)
    return params


def warn_non_finite_params(config: ModelConfig, params: dict, origin: pathlib.Path) -> None:
    """Warns about all tensors with NaN or infinite values in dense parameters on devices."""

    def is_finite(leaf):
        return jnp.all(jnp.isfinite(leaf), axis=tuple(range(1, leaf.ndim)))

    finite = jax.device_get(jax.jit(lambda tree: jax.tree.map(is_finite, tree))(params))
    non_finite = set()
    for (path, layers), rows in zip(parameter_layers(config).items(), jax.tree.leaves(finite), strict=True):
        rows = rows.all(keepdims=True) if layers == [-1] else rows
        name = HUGGINGFACE[parameter_name(path)].name
        non_finite |= {name(layer) for layer, row in zip(layers, rows, strict=True) if not row}
    warn_non_finite(non_finite, origin)


def load_model(
    folder: str | os.PathLike,
    adapter: str | os.PathLike | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[Transformer, Tokenizer]:
    """Loads a model, as `from_pretrained` does, and its tokenizer.

    Raises ValueError like `from_pretrained`, and if the folder has no tokenizer.
    """
    local = local_folder(folder)
    if not is_run(local) and not (local / "original").is_dir():
        # Check before the tokenizer: an adapter should not be rejected for lacking one.
        refuse_other_contents(local)
    tokenizer = find_tokenizer(local)
    if tokenizer is None:
        if (local / "config.json").is_file():
            raise ValueError(f"{folder} has no tokenizer: add its tokenizer.json, or complete the download")
        text = "is not a model or a run: it has no config.json and no tokenizer.json"
        raise ValueError(f"{folder} {text}")
    return from_pretrained(local, adapter=adapter, mesh=mesh), tokenizer
