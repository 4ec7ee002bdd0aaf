"""Where weights come from: published folders, run folders, parameters in memory.

A source gives pieces, one parameter of one layer each, whichever way it holds them.
"""

import abc
import dataclasses
import os
import pathlib
import warnings
from collections.abc import Callable
from typing import Literal

import huggingface_hub
import jax
import numpy as np

from gptoss_jax.checkpoints import lazy_tensors, safetensors_io, sharded_io
from gptoss_jax.checkpoints.mappings import (
    HUGGINGFACE,
    ExpertLayout,
    Layout,
    check_tensors,
    parameters_by_layer,
    table_of,
)
from gptoss_jax.checkpoints.model_files import refuse_other_contents
from gptoss_jax.checkpoints.run import is_run, load_run
from gptoss_jax.checkpoints.tensor_names import unwrapped
from gptoss_jax.config import ModelConfig, require
from gptoss_jax.config.paths import user_path
from gptoss_jax.data.tokenizer import Tokenizer, load_tokenizer

Format = Literal["bfloat16", "float32", "mxfp4"]
HUB = "hf:"
MATRICES = ("moe.gate_up", "moe.down")
# What a model folder holds besides weights and config.json, copied as it is.
SIDECAR_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


class WeightReader(abc.ABC):
    """Weights, wherever they are: `config` is their model's, with plain experts; `packed` says whether the
    experts are in MXFP4; `origin` is the folder with their tokenizer, if there is one."""

    config: ModelConfig
    packed: bool
    origin: pathlib.Path | None
    release: Callable[[np.ndarray], None] | None = None

    @abc.abstractmethod
    def array(self, key: str, layer: int) -> tuple[str, np.ndarray | sharded_io.DeviceRows]:
        """The published name and the array, with our axes, of what is held; layer -1 is that of no layer."""

    def dtype(self, key: str) -> np.dtype:
        """The type that holds a parameter of every layer; packed experts count as bfloat16."""
        if self.packed and key in MATRICES:
            return lazy_tensors.BFLOAT16
        outside = key.split(".")[0] in ("embedding", "head", "final_norm")
        layers = [-1] if outside else range(self.config.num_hidden_layers)
        kinds = {self.piece(key, layer).dtype for layer in layers}
        return kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)

    def piece(self, key: str, layer: int) -> lazy_tensors.LazyTensor:
        """A parameter, by the last two names of its path, whichever way the experts are held and wanted."""
        matrix, _, part = key.rpartition("_")
        if self.packed and key in MATRICES:
            (_, blocks), (name, scales) = (
                self.array(f"{key}_{part}", layer) for part in ("blocks", "scales")
            )
            return lazy_tensors.DequantizedTensor(name, blocks, scales, key == "moe.gate_up", self.release)
        if not self.packed and matrix in MATRICES and part in ("blocks", "scales"):
            return lazy_tensors.QuantizedTensor(self.piece(matrix, layer), part)
        return lazy_tensors.DenseTensor(*self.array(key, layer), self.release)


class HFReader(WeightReader):
    """A folder of safetensors files in one of the published layouts, or with its experts one by one."""

    def __init__(self, folder: pathlib.Path):
        if not (folder / "config.json").is_file():
            inner = folder / "original"
            folder = inner if (inner / "config.json").is_file() else folder
            refuse_other_contents(folder)
        self.config = ModelConfig.from_hf(folder)
        self._files = safetensors_io.TensorFolder(folder)
        names = unwrapped(str(folder), self._files.tensors)
        self._tensors = {names[name]: tensor for name, tensor in self._files.tensors.items()}
        self._table = table_of(self._tensors)
        self.packed = any(name.endswith(("_blocks", ".blocks")) for name in self._tensors)
        self._held = with_experts(self.config, self.packed)
        self.origin, self.release = folder, self._files.release
        if self.config.tie_word_embeddings:
            self._drop_tied_head()
        check_tensors(str(folder), self._held, self._table, self._tensors)

    def _drop_tied_head(self) -> None:
        """Some programs write the head although it is the embedding."""
        names = (self._table[key].name for key in ("head.weight", "embedding.weight"))
        head, embedding = (self._tensors.get(name) for name in names)
        if head is not None and embedding is not None:
            if head.tobytes() != embedding.tobytes():
                raise ValueError(
                    f"{self.origin}: tie_word_embeddings is true, but the head is not the embedding"
                )
            del self._tensors[self._table["head.weight"].name]

    def array(self, key: str, layer: int) -> tuple[str, np.ndarray]:
        return self._array(self._table[key], layer)

    def _array(self, layout: Layout, layer: int) -> tuple[str, np.ndarray]:
        name = layout.name.format(layer)
        return name, layout.to_ours(self._tensors[name], self._held)

    def piece(self, key: str, layer: int) -> lazy_tensors.LazyTensor:
        layout = self._table.get(key)
        if not isinstance(layout, ExpertLayout):
            return super().piece(key, layer)
        experts = [layout.parts(layer, expert) for expert in range(self.config.num_local_experts)]
        parts = [
            [lazy_tensors.DenseTensor(*self._array(p, layer), self.release) for p in each] for each in experts
        ]
        return lazy_tensors.StackedExperts(HUGGINGFACE[key].name.format(layer), parts)


class InMemoryReader(WeightReader):
    """The parameters of a model in memory."""

    def __init__(self, config: ModelConfig, params: dict, origin: pathlib.Path | None):
        self.packed = config.expert_format == "mxfp4"
        self.config, self.origin = with_experts(config, False), origin
        self._arrays = {}
        for names, layers in parameters_by_layer(config):
            leaf = params
            for name in names:
                leaf = leaf[name]
            for row, layer in enumerate(layers):
                self._arrays[".".join(names[-2:]), layer] = (leaf, None if layer < 0 else row)

    def array(self, key: str, layer: int) -> tuple[str, np.ndarray | sharded_io.DeviceRows]:
        return HUGGINGFACE[key].name.format(layer), sharded_io.layer_of(*self._arrays[key, layer])


def with_experts(config: ModelConfig, packed: bool) -> ModelConfig:
    return dataclasses.replace(config, expert_format="mxfp4" if packed else "plain")


def open_weights(folder: str | os.PathLike) -> WeightReader:
    """The weights of a Hugging Face folder, of `original/`, of a run folder, or of `hf:OWNER/NAME`, which is
    fetched from the Hugging Face hub or taken from its cache.

    Raises ValueError when there is no such folder, it is none of these, or its tensors do not fit its config.
    """
    folder = local_folder(folder)
    if is_run(folder):
        try:
            here = jax.local_devices(backend="cpu")[0]
        except RuntimeError:  # jax was told to know of no processor
            here = jax.local_devices()[0]
        config, params, _ = load_run(folder, device=here)
        return InMemoryReader(config.model, params, folder)
    return HFReader(folder)


def local_folder(folder: str | os.PathLike) -> pathlib.Path:
    """Where a folder of weights is, after `hf:OWNER/NAME` has been fetched."""
    name = str(folder)
    if name.startswith(HUB):
        wanted = ["*.json", "*.safetensors", "*.jinja"]
        try:
            # The hub's repository holds other copies of the weights besides.
            found = huggingface_hub.snapshot_download(
                name[len(HUB) :], allow_patterns=wanted, ignore_patterns=["original/*", "metal/*"]
            )
        except Exception as error:  # what breaks on the way has the classes of whichever client is in use
            raise ValueError(f"{name}: cannot be fetched from the Hugging Face hub ({error})") from error
        return pathlib.Path(found)
    path = user_path(folder, "folder")
    if not path.is_dir():
        is_repository = name.count("/") == 1 and not name.startswith(("/", ".", "~"))
        hint = f"; {HUB}{name} would be that of the Hugging Face hub" if is_repository else ""
        raise ValueError(f"{folder}: no such folder{hint}")
    return path


def sidecar_files(origin: pathlib.Path | None) -> dict[str, pathlib.Path]:
    """The files of a published folder that go with its weights; those of `original/` lie one folder up."""
    if origin is None:
        return {}
    folders = [origin.parent, origin] if origin.name == "original" else [origin]
    return {name: folder / name for folder in folders for name in SIDECAR_FILES if (folder / name).is_file()}


def find_tokenizer(origin: pathlib.Path) -> Tokenizer | None:
    """The tokenizer that goes with a model's folder; None where it holds none."""
    path = sidecar_files(origin).get("tokenizer.json")
    if path is None and not (origin / "tokenizer_name.txt").is_file():
        return None
    return load_tokenizer(origin if path is None else path.parent)


def warn_non_finite(names: set[str], origin: pathlib.Path | None) -> None:
    if names:
        warnings.warn(
            f"{origin or 'the model'}: contains NaN or infinite values in {', '.join(sorted(names))}",
            stacklevel=3,
        )


def check_choice(name: str, value: str | None, allowed: tuple[str, ...]) -> None:
    if value is not None:
        require(value in allowed, name, value, f"must be {', '.join(allowed)} or None")
