"""Sharding rules: which mesh axes split a dimension, by its letter (see the key of letters in
docs/design.md).

A parameter is declared with one letter for each dimension (`model/parameters.py`), and an einsum equation
uses the same letters, so both know their sharding from this table. A lower-case letter is a dimension that
is never split: of a norm's scale ("d") or the router's outputs ("e").
"""

import math
from collections.abc import Mapping

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptoss_jax.parallel.mesh import BATCH, current_axes, divisors

# Letter -> the mesh axes that split the dimension while the parameter is stored. Tensor parallelism splits
# heads, expert width and vocabulary, expert parallelism the experts; FSDP splits the hidden dimension.
STORAGE = {
    "V": ("tensor",),
    "N": ("tensor",),
    "K": ("tensor",),
    "F": ("tensor",),
    "E": ("expert",),
    "D": ("fsdp",),
    # Packed MXFP4 experts are split along their rows only, because 32 input values share a scale: `U` the
    # rows of gate and up, which alternate, `O` those of down.
    "U": ("tensor", "fsdp"),
    "O": ("tensor", "fsdp"),
}
# Axes that split a parameter while it is used; the others are gathered first.
COMPUTE = ("tensor", "expert")
# Devices of the expert axis hold different experts; they share the storage of everything else along the first
# of these letters, where the sizes divide evenly.
SPARE = "VD"
# Dimensions that are only split between pairs: a row of gate and its row of up stay together.
PAIRED = "U"

BATCH_BT = P(BATCH, None)
HIDDEN_BTD = P(BATCH, None, None)


def storage_spec(letters: str, shape: tuple[int, ...], axes: Mapping[str, int], name: str = "") -> P:
    """Returns how an array of these letters is split in storage.

    Args:
      letters: one for each dimension; dimensions in front of them (stacked layers) are not split.
      axes: sizes of the mesh axes.
      name: what errors call the array.

    Raises ValueError, with the sizes that would do, when an axis does not divide its dimension.
    """
    letters = letters.rjust(len(shape), "_")
    spare = "" if "E" in letters else next((letter for letter in SPARE if letter in letters), "")
    entries = []
    for size, letter in zip(shape, letters, strict=True):
        split = STORAGE.get(letter, ())
        parts = math.prod(axes[axis] for axis in split)
        unit = 2 if letter in PAIRED else 1
        if size // unit % parts:
            asked = " times ".join(f"mesh.{axis}" for axis in split)
            kind = "the pairs" if unit == 2 else "a size"
            would_do = ", ".join(map(str, divisors(size // unit, math.prod(axes.values()))))
            raise ValueError(
                f"{asked} is {parts}: must divide {size // unit}, {kind} of {name}; {would_do} would do"
            )
        if letter == spare and size % (parts * axes["expert"]) == 0:
            split += ("expert",)
        entries.append(split)
    return _spec(entries)


def compute_spec(letters: str) -> P:
    """Returns how a parameter of these letters is split while it is used: gathered over FSDP, and over the
    expert axis unless it has experts."""
    return _spec([[axis for axis in STORAGE.get(letter, ()) if axis in COMPUTE] for letter in letters])


def _spec(entries) -> P:
    return P(*(axes[0] if len(axes) == 1 else tuple(axes) or None for axes in entries))


def spec_axes(entry) -> tuple[str, ...]:
    """Returns the mesh axes that one entry of a PartitionSpec names."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def constrain(x: jax.Array, spec: P) -> jax.Array:
    """Constrains an activation's sharding; a no-op on one device."""
    return jax.lax.with_sharding_constraint(x, spec) if current_axes() else x


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch's [B, T] arrays."""
    return NamedSharding(mesh, BATCH_BT)
