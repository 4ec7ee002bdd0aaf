"""Training objectives: the loss to minimize, and the metrics of training and evaluation."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from gptoss_jax.model.moe import RouterStats
from gptoss_jax.model.transformer import Transformer
from gptoss_jax.training.losses import cross_entropy

# int32 [B, T]: tokens, targets, segment_ids (0 is padding), positions; float32 [B, T]: loss_weights. An
# objective may require more. Axis 0 is split into microbatches and over the mesh.
Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Objective:
    """Sums over a batch, and the weight by which they are divided to get means.

    Sums and weights are added up over microbatches, and over the batches of an evaluation.
    """

    # (model, batch, *, dropout_key, capacity_factor) -> (float32 scalars by name, statistics of all routers).
    # "loss" is the one that is minimized; the others are logged with it. The two keywords are passed
    # to `Transformer.hidden_states`, None in an evaluation.
    sums: Callable[..., tuple[dict[str, jax.Array], RouterStats]]
    # batch -> float32 scalar.
    weight: Callable[[Batch], jax.Array]
    # True if `sums` treats each target by itself. Only then can it be used on a mesh with a context axis,
    # where its batch has parts of sequences as rows (`parallel/context.py`).
    is_per_token: bool = False
    # Names of scalars that are maxima, 0 or more, instead of sums.
    maxima: frozenset[str] = frozenset()

    def means(self, totals: dict[str, jax.Array], weight: jax.Array) -> dict[str, jax.Array]:
        """Divides sums by a weight; maxima stay as they are."""
        return {name: x if name in self.maxima else x / weight for name, x in totals.items()}


def loss_weights(batch: Batch) -> jax.Array:
    """Returns the loss weight of each target, float32 [B, T]; by default 1, and 0 for padding."""
    return batch.get("loss_weights", (batch["segment_ids"] > 0).astype(jnp.float32))


def head_operands(
    model: Transformer,
    batch: Batch,
    dropout_key: jax.Array | None = None,
    capacity_factor: float | None = None,
) -> tuple[tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]], RouterStats]:
    """Runs the model on a batch. Returns `Transformer.head_operands` and the statistics of all routers."""
    hidden_BTD, _, router_stats = model.hidden_states(
        batch["tokens"],
        batch["segment_ids"],
        batch["positions"],
        dropout_key=dropout_key,
        capacity_factor=capacity_factor,
    )
    return model.head_operands(hidden_BTD), router_stats


def _next_token_sums(
    model: Transformer,
    batch: Batch,
    *,
    dropout_key: jax.Array | None = None,
    capacity_factor: float | None = None,
) -> tuple[dict[str, jax.Array], RouterStats]:
    """The weighted sum of -log p(target) in nats."""
    operands, router_stats = head_operands(model, batch, dropout_key, capacity_factor)
    nats = cross_entropy(*operands, batch["targets"], loss_weights(batch))
    return {"loss": nats}, router_stats


# Mean -log p of the next token, for pretraining and, with zero weights for prompts, supervised fine-tuning.
LANGUAGE_MODELING = Objective(
    _next_token_sums, weight=lambda batch: jnp.sum(loss_weights(batch)), is_per_token=True
)
