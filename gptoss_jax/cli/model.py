"""The model that a command runs: loaded, and split over devices if asked to be."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from gptoss_jax.status import status

if TYPE_CHECKING:
    from gptoss_jax.data.tokenizer import Tokenizer
    from gptoss_jax.model.transformer import Transformer


@contextlib.contextmanager
def open_model(
    folder: str, adapter: str | None, mesh: str | None
) -> Iterator[tuple["Transformer", "Tokenizer"]]:
    """Loads a model and its tokenizer; the mesh is current in the `with` block.

    Raises ValueError as `load_model` and `use_mesh` do.
    """
    with contextlib.ExitStack() as stack:
        with status(f"loading {folder}"):
            from gptoss_jax.checkpoints.load import load_model
            from gptoss_jax.parallel.mesh import use_mesh

            loaded = load_model(folder, adapter, stack.enter_context(use_mesh(mesh)))
        yield loaded
