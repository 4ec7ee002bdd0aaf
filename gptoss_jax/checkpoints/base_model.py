"""References to the base model of a LoRA run, whose checkpoints hold only the trained parameters."""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any, Self

from gptoss_jax.checkpoints.safetensors_io import find_files

SAMPLE_BYTES = 64


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """The folder of a base model and a fingerprint of its weights."""

    folder: str  # absolute
    step: int | None  # step of the checkpoint if the folder is a run
    fingerprint: str

    @classmethod
    def of(cls, folder: pathlib.Path, step: int | None = None) -> Self:
        """Describes the weights of a folder. Raises ValueError if there are none."""
        folder = folder.resolve()
        return cls(str(folder), step, _fingerprint(folder, step))

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Self | None:
        """Parses a checkpoint's record; returns None if the checkpoint holds the whole model."""
        values = record.get("base")
        return None if values is None else cls(**values)

    def to_record(self) -> dict[str, Any]:
        return {"base": dataclasses.asdict(self)}

    def check(self, run: str | os.PathLike) -> pathlib.Path:
        """Returns the folder; raises ValueError if it is gone or its weights changed since training."""
        folder = pathlib.Path(self.folder)
        name = str(folder) if self.step is None else f"step {self.step} of {folder}"
        there = folder if self.step is None else folder / "checkpoints" / str(self.step)
        elsewhere = "continue the run with --init-from, or load its adapter on top of the base (--adapter)"
        if not there.is_dir():
            raise ValueError(f"{run}: holds an adapter, and its base model {name} is gone; {elsewhere}")
        if _fingerprint(folder, self.step) != self.fingerprint:
            raise ValueError(
                f"{run}: holds an adapter, and its base model {name} has changed since the run was trained"
            )
        return folder


def _fingerprint(folder: pathlib.Path, step: int | None) -> str:
    """Returns a digest of the weight files: names, sizes, headers, and a sample of each tensor.

    It does not depend on the folder's path or the files' modification times.
    """
    digest = hashlib.sha256()
    if step is not None:
        # The array files' names are random, so names and sizes suffice.
        params = folder / "checkpoints" / str(step) / "params"
        found = ((path.relative_to(params).as_posix(), path) for path in params.rglob("*") if path.is_file())
        for name, path in sorted(found):
            digest.update(f"{name} {path.stat().st_size}\n".encode())
        return digest.hexdigest()
    for path in find_files(folder)[0]:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        for part in _samples(path):
            digest.update(part)
    return digest.hexdigest()


def _samples(path: pathlib.Path) -> Iterator[bytes]:
    """Yields the header of a safetensors file and sampled bytes of each tensor."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        yield (header := file.read(size))
        for name, entry in json.loads(header).items():
            start, stop = entry["data_offsets"] if name != "__metadata__" else (0, 0)
            for at in (start, (start + stop) // 2, max(start, stop - SAMPLE_BYTES)):
                file.seek(8 + size + at)
                yield file.read(min(SAMPLE_BYTES, stop - at))
