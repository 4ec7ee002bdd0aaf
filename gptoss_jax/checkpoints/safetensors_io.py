"""safetensors folders: tensors as views of memory-mapped files, and new folders written piece by piece.

The format is a length, a JSON header and the tensors' bytes (github.com/huggingface/safetensors). The library
of that name copies what it reads and wants all of a file in memory to write it; a checkpoint larger than the
memory needs neither.
"""

import contextlib
import dataclasses
import fcntl
import json
import math
import mmap
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator

import ml_dtypes
import numpy as np

from gptoss_jax.checkpoints.model_files import INDEX, SINGLE, find_files
from gptoss_jax.config.base import write_json
from gptoss_jax.config.paths import user_path

DTYPES = {
    "U8": np.dtype(np.uint8),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
NAMES_OF_DTYPES = {dtype: name for name, dtype in DTYPES.items()}
SHARD_BYTES = 5 * 10**9
LARGEST_HEADER = 100 << 20


class TensorFolder:
    """The tensors of a folder by name, each a read-only view of its memory-mapped file."""

    def __init__(self, folder: str | os.PathLike):
        """Opens the files that hold the weights; see `find_files` for which these are.

        Raises ValueError, naming the file, for one that is missing, truncated or no safetensors file, and for
        an index that does not agree with its files.
        """
        self.folder = pathlib.Path(folder)
        self.tensors: dict[str, np.ndarray] = {}
        self.files: dict[str, pathlib.Path] = {}
        self._maps: list[tuple[int, mmap.mmap]] = []
        paths, homes = find_files(self.folder)
        for path in paths:
            self._open(path)
        for name, home in (homes or {}).items():
            if name not in self.files:
                raise ValueError(
                    f"{self.folder}: its index.json places {name} in {home}, which does not hold it"
                )

    def _open(self, path: pathlib.Path) -> None:
        header, start = _read_header(path)
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        data = np.frombuffer(mapped, np.uint8)
        self._maps.append((data.ctypes.data, mapped))
        for name, (dtype, shape, begin, end) in header.items():
            if name in self.files:
                raise ValueError(f"{path}: holds {name}, which {self.files[name].name} holds too")
            self.tensors[name] = data[start + begin : start + end].view(dtype).reshape(shape)
            self.files[name] = path

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def release(self, view: np.ndarray) -> None:
        """Gives the pages under a view back to the system, which reads them again when they are asked for.

        What has been read of a mapped file counts as this process's memory until then.
        """
        low, high = np.lib.array_utils.byte_bounds(view)
        for base, mapped in self._maps:
            if base <= low < base + len(mapped):
                first = -(-(low - base) // mmap.PAGESIZE) * mmap.PAGESIZE
                last = (high - base) // mmap.PAGESIZE * mmap.PAGESIZE
                if last > first:
                    mapped.madvise(mmap.MADV_DONTNEED, first, last - first)
                return


def _read_header(path: pathlib.Path) -> tuple[dict[str, tuple[np.dtype, tuple[int, ...], int, int]], int]:
    """(dtype, shape, begin, end) of each tensor, and where in the file the bytes begin."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or 8 + length > size:
            # A file of something else gives lengths beyond reason, too.
            what = "truncated" if length <= LARGEST_HEADER else "not a safetensors file"
            raise ValueError(f"{path}: {what}: {size:,} bytes do not hold its header")
        raw = file.read(length)
    entries = _entries(path, raw)
    made, position, start = {}, 0, 8 + length
    for name, (dtype, shape, begin, end) in sorted(entries.items(), key=lambda entry: entry[1][2:]):
        if dtype not in DTYPES:
            raise ValueError(f"{path}: {name} is of type {dtype!r}: must be {', '.join(DTYPES)}")
        count = DTYPES[dtype].itemsize * math.prod(shape)
        if begin < 0 or end - begin != count:
            raise ValueError(
                f"{path}: {name} has {end - begin:,} bytes, where {list(shape)} of {dtype} is {count:,}"
            )
        if begin != position:
            raise ValueError(
                f"{path}: {name} begins at byte {begin:,}, and what is before it ends at {position:,}"
            )
        made[name], position = (DTYPES[dtype], shape, begin, end), end
    if start + position != size:
        whole = start + position
        if size < whole:
            raise ValueError(f"{path}: truncated: it has {size:,} bytes of {whole:,}")
        raise ValueError(f"{path}: not a safetensors file ({size - whole:,} bytes follow the last tensor)")
    return made, start


def _entries(path: pathlib.Path, raw: bytes) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """Type, shape and bytes of each tensor, as the header says."""

    def numbers(values: object) -> bool:
        return isinstance(values, list) and all(type(value) is int for value in values)

    try:
        header = json.loads(raw)
    except ValueError as error:
        raise ValueError(f"{path}: not a safetensors file (its header is no JSON: {error})") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path}: not a safetensors file (its header is no JSON object)")
    entries = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        entry = entry if isinstance(entry, dict) else {}
        dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
        shaped = numbers(shape) and all(size >= 0 for size in shape)
        if not (isinstance(dtype, str) and shaped and numbers(offsets) and len(offsets) == 2):
            raise ValueError(
                f"{path}: not a safetensors file ({name} lacks a dtype, a shape or two data_offsets)"
            )
        entries[name] = (dtype, tuple(shape), *offsets)
    return entries


@dataclasses.dataclass(frozen=True)
class NewTensor:
    """A tensor to be written; `chunks` gives its bytes in order, in arrays of any number."""

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
    wrote: Callable[[int], None] = lambda count: None,
) -> None:
    """Writes model.safetensors, or shards of at most `shard_bytes` (a larger tensor has one alone) and their
    index; `wrote` hears of each chunk's bytes."""
    folder = pathlib.Path(folder)
    shards: list[list[NewTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else [SINGLE]
    for name, shard in zip(names, shards, strict=True):
        _write_file(folder / name, shard, wrote)
    if len(shards) > 1:
        homes = {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard}
        total = sum(tensor.nbytes for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(homes.items()))}
        write_json(folder / INDEX, index)


def _write_file(path: pathlib.Path, tensors: list[NewTensor], wrote: Callable[[int], None]) -> None:
    # The widest types first, so that every tensor begins at a multiple of its own width.
    tensors = sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))
    # transformers refuses a file that does not say this.
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": NAMES_OF_DTYPES[tensor.dtype],
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
                wrote(chunk.nbytes)
            if file.tell() - begin != tensor.nbytes:
                raise ValueError(f"{tensor.name} came in {file.tell() - begin:,} bytes of {tensor.nbytes:,}")


@contextlib.contextmanager
def atomic_folder(target: str | os.PathLike, needed_bytes: int) -> Iterator[pathlib.Path]:
    """A folder to write in, which becomes `target` in the end, or vanishes when something goes wrong.

    What a killed process leaves is a hidden folder `.NAME.partial` beside the target, which the next try
    removes. Raises ValueError when the target holds something or another process is writing it, OSError when
    the disk has less room than `needed_bytes`.
    """
    # A link stays, and what it points to becomes the folder.
    target = user_path(target, "folder").resolve()
    check_target(target)
    if target.is_mount():
        raise ValueError(f"{target}: is a mount point; name a folder in it")
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < needed_bytes:
        raise OSError(
            f"{target}: {needed_bytes / 1e9:,.1f} GB are needed, the disk has {free / 1e9:,.1f} GB left"
        )
    partial = target.with_name(f".{target.name}.partial")
    with _locked(target.with_name(f".{target.name}.lock"), target):
        try:
            check_target(target)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            yield partial
            # The name may not outlive a power cut that the contents do not.
            for path in [*partial.iterdir(), partial]:
                _flush(path)
            os.rename(partial, target)
            _flush(target.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def check_target(target: str | os.PathLike) -> None:
    """Raises ValueError when there is something already where a folder is to be written."""
    target = user_path(target, "folder")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target}: exists already; name a folder that does not")


def _flush(path: pathlib.Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _locked(lock: pathlib.Path, target: pathlib.Path) -> Iterator[None]:
    """Holds a lock file, which is there only as long as somebody holds it."""
    while True:
        with open(lock, "w", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{target}: another process is writing it now") from None
            # Whoever held it may have removed it between the two lines above.
            if not lock.exists() or os.fstat(file.fileno()).st_ino != lock.stat().st_ino:
                continue
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return
