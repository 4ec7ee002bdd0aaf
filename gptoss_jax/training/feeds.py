"""Where the batches of a run come from: tokenized text, or answers that the model samples."""

from typing import TYPE_CHECKING, Any, Protocol

import jax

from gptoss_jax.config import TrainConfig
from gptoss_jax.data.batches import local_rows, make_global_batch, train_batches
from gptoss_jax.data.token_cache import TokenCache
from gptoss_jax.parallel.rules import batch_sharding
from gptoss_jax.training.objectives import Batch

if TYPE_CHECKING:
    from gptoss_jax.training.logging import RunLog


class Feed(Protocol):
    """The batches of a run, from its position on."""

    def get_state(self, step: int) -> Any:
        """Returns the position after `step` steps, JSON-serializable and not None."""

    def set_state(self, state: Any) -> None:
        """Continues from a position that `get_state` returned."""

    def next(self, step: int, params: dict, frozen: dict, log: "RunLog") -> tuple[Batch, dict[str, float]]:
        """Returns the batch of the step after `step`, and metrics of it.

        Args:
          step: steps taken so far.
          params: the trained parameters after them.
          frozen: the others.
          log: its timer measures the time for the batch.
        """

    def show(self, step: int, params: dict, log: "RunLog") -> None:
        """Prints what the model writes, after an evaluation."""


class TextFeed:
    """Batches of tokenized text; the mesh must be set."""

    def __init__(self, config: TrainConfig, cache: TokenCache, mesh: jax.sharding.Mesh) -> None:
        """Raises ValueError if the text does not fill a row."""
        self._sharding, self._batch_size = batch_sharding(mesh), config.data.batch_size
        rows = local_rows(self._sharding, self._batch_size)
        self._batches = train_batches(cache, config.data, config.seed, rows)

    def get_state(self, step: int) -> Any:
        return self._batches.get_state()

    def set_state(self, state: Any) -> None:
        self._batches.set_state(state)

    def next(self, step: int, params: dict, frozen: dict, log: "RunLog") -> tuple[Batch, dict[str, float]]:
        with log.timer.measure("data"):
            return make_global_batch(next(self._batches), self._sharding, self._batch_size), {}

    def show(self, step: int, params: dict, log: "RunLog") -> None:
        log.sample(step, params)
