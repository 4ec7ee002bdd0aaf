"""Folders of safetensors files: finds the weight files, maps their tensors as views, and writes new files.

The safetensors library is only used to validate headers: it copies what it reads, does not support bfloat16
in NumPy, and can only write tensors that are all in memory.
"""

import dataclasses
import json
import math
import mmap
import os
import pathlib
import posixpath
import warnings
from collections.abc import Callable, Iterable

import ml_dtypes
import numpy as np
import safetensors

from gptoss_jax.config.base import listed, read_json, write_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
# Adapter weights of PEFT and MLX.
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors")
# Unsupported weight formats.
OTHER_FORMATS = {
    "pytorch_model*.bin": "PyTorch's pickle format",
    "consolidated*.pth": "PyTorch's pickle format",
    "*.ckpt": "PyTorch's pickle format",
    "*.distcp": "PyTorch's distributed checkpoint format",
    "*.gguf": "llama.cpp's GGUF format",
    "flax_model*.msgpack": "Flax's msgpack format",
    "tf_model*.h5": "TensorFlow's format",
}
DTYPES: dict[str, np.dtype] = {
    "U8": np.dtype(np.uint8),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
SHARD_BYTES = 5 * 10**9


def map_folder(folder: str | os.PathLike) -> dict[str, np.ndarray]:
    """Returns a folder's tensors by name, as read-only views of memory-mapped files.

    Raises ValueError with the file's name if it is missing, truncated or not a safetensors file, and for an
    index that does not match its files. See `find_files`.
    """
    folder = pathlib.Path(folder)
    tensors: dict[str, np.ndarray] = {}
    files: dict[str, str] = {}
    paths, index = find_files(folder)
    for path in paths:
        for name, tensor in map_file(path).items():
            if name in files:
                raise ValueError(f"{path}: holds {name}, which {files[name]} holds too")
            tensors[name], files[name] = tensor, path.name
    for name, file in (index or {}).items():
        if name not in files:
            raise ValueError(f"{folder}: its index.json places {name} in {file}, which does not hold it")
    return tensors


def map_file(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns a file's tensors as read-only views. Raises ValueError for a damaged file."""
    tensors, offset = {}, 0
    try:
        with safetensors.safe_open(path, "np") as file, open(path, "rb") as raw:
            mapped = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ)
            data = np.frombuffer(mapped, np.uint8)[8 + int.from_bytes(mapped[:8], "little") :]
            # The header is validated: tensors are contiguous and fill the file.
            for name in file.offset_keys():
                dtype, shape = file.get_slice(name).get_dtype(), file.get_slice(name).get_shape()
                if dtype not in DTYPES:
                    raise ValueError(f"{path}: {name} has dtype {dtype!r}: must be {', '.join(DTYPES)}")
                end = offset + DTYPES[dtype].itemsize * math.prod(shape)
                tensors[name], offset = data[offset:end].view(DTYPES[dtype]).reshape(shape), end
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: truncated or not a safetensors file: {_sizes(path)} ({error})") from None
    return tensors


def _sizes(path: pathlib.Path) -> str:
    """Describes a damaged file's size and, if its header is readable, the expected size."""
    size = f"{path.stat().st_size:,} bytes"
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, 100 << 20)))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        return f"{size}, {8 + length + max(ends):,} according to its header"
    except (ValueError, TypeError, LookupError, AttributeError):
        return size


def find_files(folder: pathlib.Path) -> tuple[list[pathlib.Path], dict[str, str] | None]:
    """Returns a folder's weight files, and the index (tensor name -> file name) if there is one.

    Searches in transformers' order: the file or index named by `transformers_weights` in config.json,
    model.safetensors, model.safetensors.index.json. Without these, uses all .safetensors files. Warns about
    weight files that are not used.

    Raises ValueError with the file's name for a missing file or a damaged index, and for a folder that does
    not contain a model's weights as .safetensors files.
    """
    names = sorted({path.name for path in folder.glob("*.safetensors")} - {*ADAPTERS})
    start = _named_in_config(folder) or (SINGLE if (folder / SINGLE).is_file() else INDEX)
    index = None
    if start.endswith(".index.json") and (folder / start).is_file():
        index = _read_index(folder / start)
        names = sorted(set(index.values()))
    elif start != INDEX:
        names = [start]
    if not names:
        refuse_other_contents(folder)
        raise ValueError(f"{folder}: contains no .safetensors file{_subfolder_hint(folder)}")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing and index is not None:
        raise ValueError(f"{folder / start}: names {listed(missing)}, which {folder} does not hold")
    if missing:
        is_link = (folder / missing[0]).is_symlink()
        problem = "links to a file that is not there" if is_link else "is not there"
        raise ValueError(f"{folder}: {listed(missing)} {problem}")
    _warn_of_unread_files(folder, names, start)
    return [folder / name for name in names], index


def _named_in_config(folder: pathlib.Path) -> str | None:
    path = folder / "config.json"
    try:
        name = json.loads(path.read_bytes()).get("transformers_weights")
    except (OSError, ValueError, AttributeError):
        return None
    return None if name is None else _inside(path, name)


def _inside(where: pathlib.Path, name: object) -> str:
    """Normalizes a relative file name. Raises ValueError for a path outside the folder."""
    if not isinstance(name, str) or not name or name.startswith("/") or ".." in name.split("/"):
        raise ValueError(f"{where}: names {name!r} as a file of weights, which must be in the same folder")
    return posixpath.normpath(name)


def _read_index(path: pathlib.Path) -> dict[str, str]:
    try:
        files = json.loads(path.read_bytes())["weight_map"]
        if files and all(isinstance(name, str) and isinstance(file, str) for name, file in files.items()):
            return {name: _inside(path, file) for name, file in files.items()}
        problem = "weight_map must give a file for each tensor"
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
    raise ValueError(f"{path}: not an index of safetensors files ({problem})")


def _warn_of_unread_files(folder: pathlib.Path, names: list[str], start: str) -> None:
    patterns = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")
    found = {path.name for pattern in patterns for path in folder.glob(pattern)}
    unread = sorted(found - {*names, start, *ADAPTERS})
    if unread:
        read = start if (folder / start).is_file() else listed(names)
        warnings.warn(
            f"{folder}: the weights are read from {read}, as transformers does; not read: {listed(unread)}",
            stacklevel=2,
        )
    adapters = [name for name in (ADAPTER_CONFIG, *ADAPTERS) if (folder / name).is_file()]
    if adapters:
        warnings.warn(
            f"{folder}: also holds an adapter, which is not applied: {listed(adapters)}", stacklevel=2
        )


def refuse_other_contents(folder: str | os.PathLike) -> None:
    """Raises ValueError for a folder that has an adapter or other weight formats instead of .safetensors."""
    folder = pathlib.Path(folder)
    if {path.name for path in folder.glob("*.safetensors")} - {*ADAPTERS} or (folder / INDEX).is_file():
        return
    path = folder / ADAPTER_CONFIG
    if any(file.is_file() for file in (path, *(folder / name for name in ADAPTERS))):
        values = read_json(path) if path.is_file() else {}
        base = values.get("base_model_name_or_path") or values.get("model")
        kind = values.get("peft_type") or values.get("fine_tune_type")
        raise ValueError(
            f"{folder}: holds an adapter{f' ({kind})' if kind else ''}, not a whole model; its base model is "
            f"{base or 'not named'}: load that with this adapter (--adapter), or merge it (gptoss merge)"
        )
    for pattern, what in OTHER_FORMATS.items():
        if found := sorted(path.name for path in folder.glob(pattern)):
            raise ValueError(
                f"{folder}: holds weights in {what} ({listed(found)}): must be .safetensors files, as "
                f"save_pretrained of transformers writes them{_subfolder_hint(folder)}"
            )


def _subfolder_hint(folder: pathlib.Path) -> str:
    inner = sorted({path.parent.name for path in folder.glob("*/*.safetensors")})
    return f"; there are some in {listed(inner)}" if inner else ""


@dataclasses.dataclass(frozen=True)
class NewTensor:
    """A tensor to write; `chunks` yields its contents in order, as any number of arrays."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


def write_tensors(
    folder: str | os.PathLike,
    tensors: list[NewTensor],
    shard_bytes: int = SHARD_BYTES,
    on_write: Callable[[int], None] = lambda count: None,
) -> None:
    """Writes model.safetensors, or an index and shards of at most `shard_bytes` (more for a single tensor).

    Calls `on_write` with the size of each chunk in bytes.
    """
    folder = pathlib.Path(folder)
    shards: list[list[NewTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else [SINGLE]
    for name, shard in zip(names, shards, strict=True):
        write_file(folder / name, shard, on_write)
    if len(shards) > 1:
        files = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(tensor.nbytes for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
        write_json(folder / INDEX, index)


def write_file(
    path: pathlib.Path, tensors: list[NewTensor], on_write: Callable[[int], None] = lambda count: None
) -> None:
    """Writes one file. Raises ValueError if a tensor's chunks do not add up to its size."""
    # Widest dtypes first, so that every tensor is aligned.
    tensors = sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))
    # transformers rejects files without this.
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with open(path, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for tensor in tensors:
            begin = file.tell()
            for chunk in tensor.chunks():
                if chunk.dtype != tensor.dtype:
                    raise TypeError(f"{tensor.name} is given as {chunk.dtype}, not {tensor.dtype}")
                file.write(np.ascontiguousarray(chunk).view(np.uint8).data)
                on_write(chunk.nbytes)
            if file.tell() - begin != tensor.nbytes:
                raise ValueError(f"{tensor.name} has {file.tell() - begin:,} bytes, not {tensor.nbytes:,}")
