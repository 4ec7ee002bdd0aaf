"""The arrays of an Orbax checkpoint, opened with TensorStore to read slices of them.

Orbax reads whole arrays. Everything that streams a run, such as `gptoss convert`, reads one layer at a time.
"""

import dataclasses
import functools
import math
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from tensorstore import open as open_store

from gptoss_jax.checkpoints.lazy_tensors import DenseTensor, Index, copy_cast, is_finite
from gptoss_jax.model.parameters import letters_of, path_names

# Maximum length of other libraries' error messages; TensorStore's have many hundreds of characters.
MAX_MESSAGE = 200


def save_args(params: Any) -> Any:
    """Returns Orbax's arguments to store each layer, and each expert of a layer, as a chunk of its own.

    A chunk is the least that can be read. By default, it is a device's whole shard of the stacked layers.
    """

    def of_leaf(path, leaf):
        letters = letters_of(path) or ""
        is_stacked = leaf.ndim > len(letters) > 0
        return ocp.SaveArgs(shard_axes=tuple(range(is_stacked + letters.startswith("E"))))

    return jax.tree_util.tree_map_with_path(of_leaf, params)


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """An array of a checkpoint, on disk.

    Args:
      store: where it is read from.
      dtype: the model's dtype of the parameter, which values are converted to when read.
      where: the checkpoint, for error messages.
    """

    store: tensorstore.TensorStore
    dtype: np.dtype
    where: str

    def read(self, layer: int | None, index: Index) -> np.ndarray:
        """Reads a slice of a layer, or of the array (None). Raises ValueError if the file is damaged."""
        try:
            if layer is None:
                return self.store[index].read().result()
            if _chunk_shape(self.store)[0] > 1:
                return self._whole[layer][index]
            return self.store[layer][index].read().result()
        except ValueError as error:
            raise ValueError(f"{self.where}: cannot be read (params: {root_message(error)})") from error

    @functools.cached_property
    def _whole(self) -> np.ndarray:
        """All layers, of an earlier checkpoint: its chunks have several, which would all be read for each."""
        return self.store.read().result()


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One layer of an array of a checkpoint, or the whole array (`layer` is None)."""

    name: str
    source: StoredArray
    layer: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.source.store.shape[0 if self.layer is None else 1 :])

    @property
    def dtype(self) -> np.dtype:
        return self.source.dtype

    def read_into(self, out: np.ndarray, index: Index) -> bool:
        """See `LazyTensor`."""
        copy_cast(out, self.source.read(self.layer, index))
        return out.dtype == np.uint8 or is_finite(out)

    def in_memory(self) -> DenseTensor:
        """Reads the whole tensor."""
        out = np.empty(self.shape, self.dtype)
        self.read_into(out, tuple(slice(0, size) for size in self.shape))
        return DenseTensor(self.name, out)


def open_arrays(folder: pathlib.Path, abstract: dict) -> dict:
    """Opens the arrays of a checkpoint's item that `abstract` names, as `StoredArray`s.

    Raises ValueError if one is missing, damaged or of another shape.
    """
    # The cache holds the chunks of the largest slice, so that those read in several slices are decoded once.
    # Of exactly their size, it would hold nothing.
    largest = max(map(_slice_bytes, jax.tree.leaves(_open(folder, abstract, tensorstore.Context()))))
    stores = _open(
        folder, abstract, tensorstore.Context({"cache_pool": {"total_bytes_limit": largest + largest // 8}})
    )
    return jax.tree.map(
        lambda leaf, store: StoredArray(store, np.dtype(leaf.dtype), str(folder.parent)), abstract, stores
    )


def _chunk_shape(store: tensorstore.TensorStore) -> list[int]:
    return [int(size) for size in np.asarray(store.chunk_layout.read_chunk.shape)]


def _slice_bytes(store: tensorstore.TensorStore) -> int:
    """Returns the size of the chunks of one slice along the first axis that has several values in a chunk."""
    chunk = _chunk_shape(store)
    axis = next((axis for axis, size in enumerate(chunk) if size > 1), len(chunk))
    return math.prod([*chunk[: axis + 1], *store.shape[axis + 1 :]]) * store.dtype.numpy_dtype.itemsize


def _open(folder: pathlib.Path, abstract: dict, context: tensorstore.Context) -> dict:
    base = {"driver": "file", "path": f"{folder}/"}

    def begin(path, leaf):
        key = ".".join(path_names(path))
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "ocdbt", "base": base, "path": f"{key}/"},
            # By default, a missing chunk is read as zeros.
            "fill_missing_data_reads": False,
            "recheck_cached_data": False,
            "recheck_cached_metadata": False,
        }
        return key, leaf, open_store(spec, read=True, open=True, context=context)

    def finish(begun):
        key, leaf, future = begun
        try:
            store = future.result()
        except ValueError as error:
            raise ValueError(f"params: {root_message(error)}") from error
        if tuple(store.shape) != leaf.shape:
            raise ValueError(f"params: {key} has shape {list(store.shape)}, not {list(leaf.shape)}")
        return store

    begun = jax.tree_util.tree_map_with_path(begin, abstract)
    return jax.tree.map(finish, begun, is_leaf=lambda node: isinstance(node, tuple))


def root_message(error: BaseException) -> str:
    """Returns the first line of the root cause of an error, or its type if it has no message."""
    while error.__cause__ is not None:
        error = error.__cause__
    # The text of a KeyError is the repr of its message.
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    lines = str(text).strip().splitlines()
    if not lines:
        return type(error).__name__
    return lines[0] if len(lines[0]) <= MAX_MESSAGE else lines[0][:MAX_MESSAGE] + "…"
