"""Weight readers for Hugging Face folders, `original/`, training runs, and parameters in memory.

A reader returns lazy tensors, each for one layer's parameter, dense or packed as requested.
"""

import abc
import dataclasses
import os
import pathlib
import warnings
from collections.abc import Iterable
from typing import Literal

import huggingface_hub
import huggingface_hub.utils
import jax
import numpy as np
from huggingface_hub.errors import LocalEntryNotFoundError

from gptoss_jax.checkpoints import mappings
from gptoss_jax.checkpoints.base_model import BaseModel
from gptoss_jax.checkpoints.lazy_tensors import (
    BFLOAT16,
    DenseTensor,
    DequantizedTensor,
    LazyTensor,
    QuantizedTensor,
    StackedExperts,
    common_dtype,
)
from gptoss_jax.checkpoints.mappings import EXPERT_MATRICES, HUGGINGFACE, parameter_layers
from gptoss_jax.checkpoints.run_arrays import StoredArray, StoredTensor
from gptoss_jax.checkpoints.run_params import is_run, open_checkpoint, open_params
from gptoss_jax.checkpoints.safetensors_io import map_folder, refuse_other_contents
from gptoss_jax.checkpoints.sharded_io import layer_on_host
from gptoss_jax.config import LoraConfig, ModelConfig, TrainConfig, require
from gptoss_jax.config.model import EXPERT_TARGETS
from gptoss_jax.config.paths import user_path
from gptoss_jax.data.tokenizer import Tokenizer, load_tokenizer
from gptoss_jax.model.lora import is_adapter
from gptoss_jax.model.parameters import parameter_name, path_names, split_params
from gptoss_jax.status import download

ExpertFormat = Literal["bfloat16", "float32", "mxfp4"]
StoredFormat = DenseTensor | StackedExperts | StoredTensor
HUB = "hf:"
# Files in a model folder besides weights and config.json; they are copied unchanged.
SIDECAR_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


class WeightReader(abc.ABC):
    """Reads the weights of a model.

    Attributes:
      config: the model's config, with dense experts.
      packed: whether the experts are stored in MXFP4.
      origin: the folder with the tokenizer, if there is one.
    """

    config: ModelConfig
    packed: bool
    origin: pathlib.Path | None

    @abc.abstractmethod
    def stored(self, key: str, layer: int) -> StoredFormat:
        """Returns a parameter in its stored format; layer -1 is for parameters outside the layers."""

    def stored_whole(self, key: str, layer: int) -> DenseTensor:
        """Same as `stored`, in memory or memory-mapped, for parameters that no layout splits into several
        tensors."""
        tensor = self.stored(key, layer)
        tensor = tensor.in_memory() if isinstance(tensor, StoredTensor) else tensor
        assert isinstance(tensor, DenseTensor), key
        return tensor

    def origin_of(self, key: str) -> pathlib.Path | None:
        """Returns the folder that a parameter is read from."""
        return self.origin

    @abc.abstractmethod
    def stored_dtypes(self, key: str) -> Iterable[np.dtype]:
        """Returns the stored dtypes of a parameter in all layers."""

    def dtype(self, key: str) -> np.dtype:
        """Returns the dtype that holds a parameter exactly in all layers; bfloat16 for packed experts."""
        return BFLOAT16 if self.packed and key in EXPERT_MATRICES else common_dtype(self.stored_dtypes(key))

    def tensor(self, key: str, layer: int) -> LazyTensor:
        """Returns a parameter, dense or packed according to its key, regardless of how it is stored."""
        matrix, _, part = key.rpartition("_")
        if self.packed and key in EXPERT_MATRICES:
            blocks, scales = (self.stored_whole(f"{key}_{part}", layer) for part in ("blocks", "scales"))
            return DequantizedTensor(scales.name, blocks.array, scales.array, key == "moe.gate_up")
        if not self.packed and matrix in EXPERT_MATRICES and part in ("blocks", "scales"):
            return QuantizedTensor(self.stored(matrix, layer), "blocks" if part == "blocks" else "scales")
        return self.stored(key, layer)


class HFReader(WeightReader):
    """Reads a folder of safetensors files in one of the layouts in `mappings`."""

    origin: pathlib.Path

    def __init__(self, folder: pathlib.Path):
        if not (folder / "config.json").is_file():
            inner = folder / "original"
            folder = inner if (inner / "config.json").is_file() else folder
            refuse_other_contents(folder)
        self.origin, self.config = folder, ModelConfig.from_hf(folder)
        tensors = map_folder(folder)
        names = mappings.strip_wrappers(str(folder), tensors)
        self._tensors = {names[name]: tensor for name, tensor in tensors.items()}
        self._table = mappings.table_for(self._tensors)
        self.packed = any(name.endswith(("_blocks", ".blocks")) for name in self._tensors)
        if self.config.tie_word_embeddings:
            self._drop_tied_head()
        stored_config = with_experts(self.config, self.packed)
        mappings.check_tensors(str(folder), stored_config, self._table, self._tensors)

    def _drop_tied_head(self) -> None:
        """Drops the head that some programs save although it is tied to the embedding."""
        head, embedding = (self._table[key].name(-1) for key in ("head.weight", "embedding.weight"))
        if not {head, embedding} <= self._tensors.keys():
            return
        if self._tensors.pop(head).tobytes() != self._tensors[embedding].tobytes():
            raise ValueError(f"{self.origin}: tie_word_embeddings is true, but the head is not the embedding")

    def stored(self, key: str, layer: int) -> StoredFormat:
        mapping = self._table[key]
        parts = [
            DenseTensor(name, mapping.to_model(self._tensors[name], self.config))
            for name in mapping.file_shapes(self.config, layer)
        ]
        if not mapping.is_per_expert:
            return parts[0]
        each = len(mapping.names)
        experts = [parts[i : i + each] for i in range(0, len(parts), each)]
        return StackedExperts(HUGGINGFACE[key].name(layer), experts)

    def stored_dtypes(self, key: str) -> Iterable[np.dtype]:
        count = self.config.num_hidden_layers
        layers = range(count) if "{layer}" in self._table[key].names[0] else [-1]
        return (self.stored(key, layer).dtype for layer in layers)


class InMemoryReader(WeightReader):
    """Reads a model's parameters, or a subset, from memory or, if they are `StoredArray`s, from a run's
    checkpoint."""

    def __init__(self, config: ModelConfig, params: dict, origin: pathlib.Path | None):
        self.packed = config.expert_format == "mxfp4"
        self.config, self.origin = with_experts(config, False), origin
        self._arrays: dict[str, dict[int, tuple[jax.Array | StoredArray, int | None]]] = {}
        layers_of = parameter_layers(config)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            layers = layers_of[path_names(path)]
            rows = {layer: (leaf, None if layer < 0 else row) for row, layer in enumerate(layers)}
            self._arrays.setdefault(parameter_name(path), {}).update(rows)

    def adapter(self, name: str) -> "Adapter":
        """Returns the parameters as an `Adapter`, for a run that trained adapters."""
        places = [(key, layer) for key, rows in self._arrays.items() for layer in rows]
        assert self.config.lora is not None, name
        rank = self.config.lora_rank(EXPERT_TARGETS[0])
        lora = dataclasses.replace(self.config.lora, expert_rank=rank)
        return Adapter(name, lora, {place: self.stored_whole(*place) for place in places})

    def stored(self, key: str, layer: int) -> StoredFormat:
        name, (array, row) = HUGGINGFACE[key].name(layer), self._arrays[key][layer]
        if isinstance(array, StoredArray):
            return StoredTensor(name, array, row)
        return DenseTensor(name, layer_on_host(array, row))

    def stored_dtypes(self, key: str) -> Iterable[np.dtype]:
        return (array.dtype for array, _ in self._arrays[key].values())


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The trained parameters of a LoRA run or a PEFT folder: A and B of each layer, in float32."""

    name: str  # the folder
    lora: LoraConfig
    # By key and layer, with the model's axes. A run may also have trained some of the base's weights.
    tensors: dict[tuple[str, int], DenseTensor]

    @property
    def origin(self) -> pathlib.Path:
        return pathlib.Path(self.name)

    def origin_of(self, key: str) -> pathlib.Path:
        return self.origin

    def tensor(self, key: str, layer: int) -> LazyTensor:
        return self.tensors[key, layer]


class AdaptedReader(WeightReader):
    """Reads the weights of a base model with an unmerged adapter."""

    def __init__(self, base: WeightReader, adapter: Adapter):
        self._base, self._adapter = base, adapter
        self.packed, self.origin = base.packed, base.origin
        self.config = dataclasses.replace(base.config, lora=adapter.lora)
        self._adapted = {key for key, _ in adapter.tensors}

    def origin_of(self, key: str) -> pathlib.Path | None:
        return self._adapter.origin if key in self._adapted else self._base.origin

    def stored(self, key: str, layer: int) -> StoredFormat:
        found = self._adapter.tensors.get((key, layer))
        return self._base.stored(key, layer) if found is None else found

    def stored_dtypes(self, key: str) -> Iterable[np.dtype]:
        found = [tensor.dtype for place, tensor in self._adapter.tensors.items() if place[0] == key]
        return found or self._base.stored_dtypes(key)


def with_experts(config: ModelConfig, packed: bool) -> ModelConfig:
    """Returns a config with packed or dense experts; packed ones are rounded again only if adapted."""
    is_rounded = config.expert_fake_quant and (config.lora is not None or not packed)
    return dataclasses.replace(
        config, expert_format="mxfp4" if packed else "plain", expert_fake_quant=is_rounded
    )


def open_weights(folder: str | os.PathLike) -> WeightReader:
    """Opens a Hugging Face folder, `original/`, a training run, or `hf:OWNER/NAME` (downloaded from the
    Hugging Face Hub, or cached). A run that trained adapters is opened with its base model.

    Raises ValueError if the folder does not exist or is of another kind, if its tensors do not fit its
    config, or if a run's base model is gone or has changed.
    """
    folder = local_folder(folder)
    if not is_run(folder):
        return HFReader(folder)
    config, base, params = open_params(folder)
    trained = InMemoryReader(config.model, params, folder)
    if base is None:
        return trained
    reader = AdaptedReader(open_base(base, folder), trained.adapter(str(folder)))
    reader.config = trained.config
    # A published tokenizer's files are in the base model's folder.
    if reader.origin is None or is_run(reader.origin) or find_tokenizer(reader.origin) is None:
        reader.origin = folder
    return reader


def open_base(base: BaseModel, run: str | os.PathLike) -> WeightReader:
    """Opens a run's base model. Raises ValueError if it is gone or has changed."""
    folder = base.check(run)
    if base.step is None:
        return HFReader(folder)
    config, other_base, params = open_params(folder, base.step)
    assert other_base is None, folder
    return InMemoryReader(config.model, params, folder)


def describe_base(folder: str | os.PathLike) -> BaseModel:
    """Describes the base model for a run that starts from a folder (`TrainConfig.init_from`)."""
    folder = local_folder(folder)
    if not is_run(folder):
        return BaseModel.of(HFReader(folder).origin)
    with open_checkpoint(folder) as (_, checkpoints, step):
        return BaseModel.from_record(checkpoints.record(step)) or BaseModel.of(folder, step)


def read_run_adapter(folder: str | pathlib.Path, field: str = "adapter") -> Adapter:
    """Reads a run's adapter without its base model, from the checkpoint that `read_checkpoint` selects."""
    folder = pathlib.Path(folder)
    config = TrainConfig.load(folder / "config.json").model
    allowed = "must be a run that trained an adapter (model.lora); gptoss convert writes any other run"
    require(config.lora is not None, field, str(folder), allowed)
    _, base, params = open_params(folder)
    if base is None:
        params, _ = split_params(params, is_adapter)
    return InMemoryReader(config, params, folder).adapter(str(folder))


def local_folder(folder: str | os.PathLike) -> pathlib.Path:
    """Returns the path of a weight folder; downloads `hf:OWNER/NAME`. Raises ValueError if it is missing."""
    name = str(folder)
    if name.startswith(HUB):
        patterns = ["*.json", "*.safetensors", "*.jinja"]
        hint = "or download it elsewhere and name the folder"
        try:
            # The repository also contains other copies of the weights.
            with download(f"downloading {name[len(HUB) :]}", huggingface_hub.utils.disable_progress_bars):
                found = huggingface_hub.snapshot_download(
                    name[len(HUB) :], allow_patterns=patterns, ignore_patterns=["original/*", "metal/*"]
                )
        except LocalEntryNotFoundError as error:
            raise ValueError(
                f"{name}: cannot be downloaded: not in the cache, no connection to the Hub; connect, {hint}"
            ) from error
        except Exception as error:  # each HTTP client has its own exception classes
            text = f"cannot be downloaded from the Hugging Face Hub ({error}); check the name and the network"
            raise ValueError(f"{name}: {text}, {hint}") from error
        return pathlib.Path(found)
    path = user_path(folder, "folder")
    if not path.is_dir():
        is_repository = name.count("/") == 1 and not name.startswith(("/", ".", "~"))
        hint = (
            f"did you mean {HUB}{name}?"
            if is_repository
            else f"name a run, a model folder or {HUB}OWNER/NAME"
        )
        raise ValueError(f"{folder}: no such folder; {hint}")
    return path


def sidecar_files(origin: pathlib.Path | None) -> dict[str, pathlib.Path]:
    """Returns a folder's sidecar files by name; for `original/`, also those of the parent folder."""
    if origin is None:
        return {}
    folders = [origin.parent, origin] if origin.name == "original" else [origin]
    return {name: folder / name for folder in folders for name in SIDECAR_FILES if (folder / name).is_file()}


def find_tokenizer(origin: pathlib.Path) -> Tokenizer | None:
    """Loads the tokenizer from a model's folder; None if it has none."""
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


def check_formats(dtype: str | None = None, experts: str | None = None) -> None:
    dtypes = ("bfloat16", "float32")
    require(dtype in (*dtypes, None), "dtype", dtype, "must be bfloat16, float32 or None")
    require(
        experts in (*dtypes, "mxfp4", None), "experts", experts, "must be bfloat16, float32, mxfp4 or None"
    )
