"""Training on preferences: losses on pairs of a chosen and a rejected answer.

A row has whole pairs: segments 2i + 1 and 2i + 2 are the chosen and the rejected answer of its pair i, each
with the same prompt. The formulas are in docs/math.md. Letters: B rows, T positions, S = T / 2 pairs at most.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from gptoss_jax.config import DpoConfig, TrainConfig
from gptoss_jax.data.batches import REFERENCE_FIELD
from gptoss_jax.model.lora import is_adapter
from gptoss_jax.model.moe import RouterStats
from gptoss_jax.model.parameters import split_params
from gptoss_jax.model.transformer import Transformer, bind, get_params
from gptoss_jax.training.losses import log_probs
from gptoss_jax.training.objectives import Batch, Objective, head_operands, loss_weights

Scalars = dict[str, jax.Array]
SIMPO_MARGIN = 0.5  # as in TRL


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PairLogProbs:
    """Log-probabilities of the answers of pairs, float32 [B, S], and their numbers of tokens."""

    chosen: jax.Array
    rejected: jax.Array
    chosen_length: jax.Array
    rejected_length: jax.Array

    @property
    def is_pair(self) -> jax.Array:
        """bool [B, S]; False for pairs that do not exist."""
        return (self.chosen_length > 0) & (self.rejected_length > 0)

    @property
    def means(self) -> tuple[jax.Array, jax.Array]:
        """The mean log-probability per token of both answers."""
        return (
            self.chosen / jnp.maximum(self.chosen_length, 1),
            self.rejected / jnp.maximum(self.rejected_length, 1),
        )


def preference_objective(config: TrainConfig) -> Objective:
    """Returns the objective of a run with `objective` dpo.

    The reference is the model without its adapters, unless batches have its log-probabilities
    (`training/reference.py`). The metrics are means over pairs: `loss`, `rewards/chosen`, `rewards/rejected`
    (beta times the change of the answer's log-probability from the reference's; without a reference, times
    its mean per token), `rewards/margins`, `rewards/accuracies` (1 if the chosen answer has the higher
    reward), `logps/chosen` and `logps/rejected`.
    """

    def sums(
        model: Transformer,
        batch: Batch,
        *,
        dropout_key: jax.Array | None = None,
        capacity_factor: float | None = None,
    ) -> tuple[Scalars, RouterStats]:
        found_BT, stats = token_log_probs(model, batch, dropout_key, capacity_factor)
        pairs, reference = pair_log_probs(found_BT, batch), None
        if config.dpo.needs_reference:
            reference_BT = batch.get(REFERENCE_FIELD)
            if reference_BT is None:
                reference_BT, _ = token_log_probs(without_adapters(model), batch)
            reference = pair_log_probs(jax.lax.stop_gradient(reference_BT), batch)
        terms = preference_terms(config.dpo, pairs, reference)
        return {name: jnp.sum(jnp.where(pairs.is_pair, x, 0)) for name, x in terms.items()}, stats

    return Objective(sums, weight=num_pairs)


def num_pairs(batch: Batch) -> jax.Array:
    """Returns the number of pairs of a batch, a float32 scalar."""
    return jnp.sum(jnp.max(batch["segment_ids"], axis=1) // 2).astype(jnp.float32)


def token_log_probs(
    model: Transformer,
    batch: Batch,
    dropout_key: jax.Array | None = None,
    capacity_factor: float | None = None,
) -> tuple[jax.Array, RouterStats]:
    """Returns log p(target) of each target with a loss weight, float32 [B, T], and the router statistics."""
    operands, stats = head_operands(model, batch, dropout_key, capacity_factor)
    return log_probs(*operands, batch["targets"], loss_weights(batch)), stats


def without_adapters(model: Transformer) -> Transformer:
    """Returns the same model without its adapters."""
    _, base = split_params(get_params(model), is_adapter)
    return bind(dataclasses.replace(model.config, lora=None), base)


def pair_log_probs(log_probs_BT: jax.Array, batch: Batch) -> PairLogProbs:
    """Sums the log-probabilities of targets with a loss weight over the answers of each pair."""
    most_pairs = (log_probs_BT.shape[1] + 1) // 2
    weights_BT, ids_BT = (loss_weights(batch) > 0).astype(jnp.float32), batch["segment_ids"]
    # Segment 0 is padding.
    sum_segments = jax.vmap(functools.partial(jax.ops.segment_sum, num_segments=1 + 2 * most_pairs))
    sums, counts = sum_segments(log_probs_BT * weights_BT, ids_BT), sum_segments(weights_BT, ids_BT)
    return PairLogProbs(sums[:, 1::2], sums[:, 2::2], counts[:, 1::2], counts[:, 2::2])


def preference_terms(
    config: DpoConfig, pairs: PairLogProbs, reference: PairLogProbs | None
) -> dict[str, jax.Array]:
    """Returns loss and metrics of each pair, float32 [B, S] each, meaningful where `pairs.is_pair`.

    `reference` is needed for sigmoid and ipo.
    """
    mean_chosen, mean_rejected = pairs.means
    if reference is None:
        rewards = config.beta * mean_chosen, config.beta * mean_rejected
    else:
        rewards = (
            config.beta * (pairs.chosen - reference.chosen),
            config.beta * (pairs.rejected - reference.rejected),
        )
    margins = rewards[0] - rewards[1]
    if config.loss == "sigmoid":
        smoothing = config.label_smoothing
        loss = -(1 - smoothing) * jax.nn.log_sigmoid(margins) - smoothing * jax.nn.log_sigmoid(-margins)
    elif config.loss == "ipo":
        assert reference is not None, config.loss
        of_reference = reference.means
        # The means of both answers: sums would depend on their lengths.
        margin = (mean_chosen - of_reference[0]) - (mean_rejected - of_reference[1])
        loss = (margin - 1 / (2 * config.beta)) ** 2
    elif config.loss == "orpo":
        # A mean of 0, as where there is no pair, would have infinite odds.
        means = (jnp.minimum(mean, -1e-7) for mean in pairs.means)
        log_odds = [mean - jnp.log(-jnp.expm1(mean)) for mean in means]
        loss = -mean_chosen - config.beta * jax.nn.log_sigmoid(log_odds[0] - log_odds[1])
    else:
        loss = -jax.nn.log_sigmoid(margins - (SIMPO_MARGIN if config.gamma is None else config.gamma))
    return {
        "loss": loss,
        "rewards/chosen": rewards[0],
        "rewards/rejected": rewards[1],
        "rewards/margins": margins,
        "rewards/accuracies": (margins > 0).astype(jnp.float32),
        "logps/chosen": pairs.chosen,
        "logps/rejected": pairs.rejected,
    }
