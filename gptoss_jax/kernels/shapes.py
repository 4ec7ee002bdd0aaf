"""Shape assertions that use the letters of the argument names, checked at trace time."""

from typing import Protocol

import chex


class HasShape(Protocol):
    """An array, abstract or not, or a `LayerView`."""

    @property
    def shape(self) -> tuple[int, ...]: ...


def assert_shapes(letters: str, *arrays: HasShape | None) -> chex.Dimensions:
    """Asserts the shapes of arrays, where each letter is one size throughout the call, and returns the sizes.

    Example: `dims = assert_shapes("BTNH BSKH BSKH N", q_BTNH, k_BSKH, v_BSKH, sinks_N)`, then `dims.T`.

    Args:
      letters: the axes of each array, separated by spaces. A digit is a size, as in "B1".
      arrays: anything with a shape, concrete or abstract. None, for an omitted argument, is skipped.

    Raises an AssertionError that names the letters, their sizes so far and the shape that does not match.
    """
    sizes: dict[str, int] = {}
    for axes, array in zip(letters.split(), arrays, strict=True):
        if array is None:
            continue
        known = ", ".join(f"{letter}={size}" for letter, size in sizes.items())
        message = f"the shape {tuple(array.shape)} is not {axes}" + (f" with {known}" if known else "")
        chex.assert_rank(array, len(axes), custom_message=message)
        expected = (
            int(axis) if axis.isdigit() else sizes.setdefault(axis, size)
            for axis, size in zip(axes, array.shape, strict=True)
        )
        chex.assert_shape(array, tuple(expected), custom_message=message)
    return chex.Dimensions(**sizes)
