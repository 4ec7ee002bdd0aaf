"""Sharding rules: the mesh axes that split a dimension, by its letter (`model/parameters.py` has the key).

Parameters are declared with one letter per dimension, and einsum equations use the same letters, so the table
covers both. The constants after it are the shardings of all other activations. Lowercase letters are
dimensions that are never split, such as a norm's scale ("d") or the router's outputs ("e").
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptoss_jax.parallel.mesh import BATCH, SEQUENCES, current_axes, divisors

# Letter -> the mesh axes that split the dimension in storage. Tensor parallelism splits heads, expert width
# and vocabulary; expert parallelism splits the experts; FSDP splits the hidden dimension.
STORAGE = {
    "V": ("tensor",),
    "N": ("tensor",),
    "K": ("tensor",),
    "F": ("tensor",),
    "E": ("expert",),
    "D": ("fsdp",),
    # Packed MXFP4 experts are split only along their rows, because 32 input values share a scale: `U` the
    # interleaved rows of gate and up, `O` those of down.
    "U": ("tensor", "fsdp"),
    "O": ("tensor", "fsdp"),
}
# Axes that split a parameter for compute; it is all-gathered over the others.
COMPUTE = ("tensor", "expert")
# In storage, parameters without experts are also split over the expert axis: along V if they have it,
# otherwise along D, if the size is divisible.
ALSO_OVER_EXPERT = "VD"
# Dimensions that are split only between pairs: a row of gate and its row of up stay together.
PAIRED = "U"

# Activations. ROWS are sequences (or their parts) or tokens, split along the first dimension of an array of
# any rank. BATCH_BT is a batch of whole sequences.
ROWS = P(BATCH)
BATCH_BT = P(SEQUENCES, None)
HIDDEN_BTD = P(BATCH, None, None)
HEADS_BTNH = P(BATCH, None, "tensor", None)
CACHE_LBKSH = P(None, BATCH, "tensor", None, None)  # stacked keys or values
# Those of whole sequences, during a prefill that the context axis splits.
SEQUENCES_LBKSH = P(None, SEQUENCES, "tensor", None, None)


def storage_spec(letters: str, shape: tuple[int, ...], axes: Mapping[str, int], name: str = "") -> P:
    """Returns the PartitionSpec in which an array with these letters is stored.

    Args:
      letters: one per dimension; leading dimensions without a letter (stacked layers) are not split.
      axes: sizes of the mesh axes.
      name: the array's name in error messages.

    Raises ValueError, with the valid sizes, if an axis does not divide its dimension.
    """
    letters = letters.rjust(len(shape), "_")
    also = "" if "E" in letters else next((letter for letter in ALSO_OVER_EXPERT if letter in letters), "")
    entries = []
    for size, letter in zip(shape, letters, strict=True):
        split = STORAGE.get(letter, ())
        parts = math.prod(axes[axis] for axis in split)
        unit = 2 if letter in PAIRED else 1
        if size // unit % parts:
            asked = " times ".join(f"mesh.{axis}" for axis in split)
            kind = "the pairs" if unit == 2 else "a size"
            valid = ", ".join(map(str, divisors(size // unit, math.prod(axes.values()))))
            raise ValueError(
                f"{asked} is {parts}: must divide {size // unit}, {kind} of {name}; valid sizes: {valid}"
            )
        # A dimension that FSDP splits is also split over the context axis, if the size is divisible.
        context = axes.get("context", 1)
        if "fsdp" in split and context > 1 and size // unit % (parts * context) == 0:
            split, parts = (*split, "context"), parts * context
        if letter == also and size % (parts * axes["expert"]) == 0:
            split += ("expert",)
        entries.append(split)
    return _spec(entries)


def compute_spec(letters: str) -> P:
    """Returns the PartitionSpec of a parameter for compute: gathered over the fsdp axis, and over the expert
    axis unless it has experts."""
    return _spec([[axis for axis in STORAGE.get(letter, ()) if axis in COMPUTE] for letter in letters])


def _spec(entries: Iterable[Sequence[str]]) -> P:
    return P(*(axes[0] if len(axes) == 1 else tuple(axes) or None for axes in entries))


def spec_axes(entry: Any) -> tuple[str, ...]:
    """Returns the mesh axes in one entry of a PartitionSpec."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def constrain(x: jax.Array, spec: P) -> jax.Array:
    """Constrains the sharding of an activation; no-op on one device."""
    return jax.lax.with_sharding_constraint(x, spec) if current_axes() else x


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch's [B, T] arrays."""
    return NamedSharding(mesh, BATCH_BT)
