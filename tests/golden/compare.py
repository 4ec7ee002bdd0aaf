"""The cases, and how gradients are compared, for both the writer and the readers of the golden files. Needs
neither jax nor torch."""

import dataclasses
import pathlib
import zlib

import numpy as np
from helpers.checkpoints import Form


@dataclasses.dataclass(frozen=True)
class Case:
    form: Form
    experts_per_token: int
    dialect: str


CASES = {
    "top1": Case("bfloat16", 1, "rope_scaling"),
    "top2": Case("bfloat16", 2, "rope_parameters"),
    "top4": Case("bfloat16", 4, "rope_scaling"),
    "mxfp4": Case("mxfp4", 4, "rope_scaling"),
}
# Gradients of at most this many values are stored whole.
SMALL = 200
PROJECTIONS = 16


def golden(name: str) -> dict[str, np.ndarray]:
    """Returns the arrays of a case."""
    with np.load(pathlib.Path(__file__).parent / f"{name}.npz") as arrays:
        return dict(arrays)


def prompts(arrays: dict[str, np.ndarray]) -> list[list[int]]:
    """Returns the prompts of a case, without padding."""
    return [row[row >= 0].tolist() for row in arrays["prompts"]]


def projections(name: str, gradient: np.ndarray) -> np.ndarray:
    """Returns the dot products of a gradient with random vectors of +1 and -1.

    Their mean square is, in expectation, the squared norm of the array: those of a difference estimate its
    norm in any direction.
    """
    # Bits of a generator that every NumPy has, different for every parameter.
    bits = np.random.default_rng(zlib.crc32(name.encode())).bytes(PROJECTIONS * -(-gradient.size // 8))
    rows = np.unpackbits(np.frombuffer(bits, np.uint8).reshape(PROJECTIONS, -1), axis=1)
    signs = 2.0 * rows[:, : gradient.size] - 1
    return signs @ gradient.reshape(-1).astype(np.float64)


def gradient_error(name: str, gradient: np.ndarray, arrays: dict[str, np.ndarray]) -> float:
    """Returns the distance of a gradient to that of a case, relative to its norm; an estimate if only
    projections are stored."""
    kept, norm = arrays[f"gradient/{name}"], float(arrays[f"norm/{name}"])
    if gradient.size <= SMALL:
        assert gradient.shape == kept.shape, name
        return relative(np.linalg.norm(gradient - kept), norm)
    difference = projections(name, gradient) - kept
    return relative(np.sqrt(np.mean(difference**2)), norm)


def relative(difference: float, norm: float) -> float:
    """Returns the ratio, also for a norm of zero: a router that chooses one expert has no gradient."""
    return 0.0 if difference == 0 else float(difference / norm) if norm else float("inf")
