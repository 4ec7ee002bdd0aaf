"""Reinforcement learning with group-relative advantages (GRPO, Shao et al. 2024) and DAPO's loss.

The answers to a prompt are a group. The advantage of an answer is its reward minus the mean of its group,
divided by the group's standard deviation; each of its tokens has it. The loss is PPO's clipped one, averaged
over all tokens of a step (Yu et al. 2025). The formulas are in docs/math.md. Letters: B rows, T positions, P
prompts, G answers of each.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.config import GrpoConfig, TrainConfig
from gptoss_jax.data.batches import ADVANTAGES, SAMPLED_LOG_PROBS
from gptoss_jax.model.moe import RouterStats
from gptoss_jax.model.transformer import Transformer
from gptoss_jax.training.objectives import LANGUAGE_MODELING, Batch, Objective, loss_weights
from gptoss_jax.training.preferences import preference_objective, token_log_probs, without_adapters

MEAN_DIFFERENCE, DIFFERENCE = "rollout_difference/mean", "rollout_difference/max"
MIN_STD = 1e-4  # added to the standard deviation of a group, as in TRL


def make_objective(config: TrainConfig) -> Objective:
    """Returns the objective that a config names."""
    makers = {"dpo": preference_objective, "grpo": grpo_objective}
    return makers[config.objective](config) if config.objective in makers else LANGUAGE_MODELING


def group_advantages(rewards_PG: np.ndarray, scale: Literal["group", "none"] = "group") -> np.ndarray:
    """Returns the advantage of each answer, float64 [P, G].

    Args:
      rewards_PG: total reward of each answer.
      scale: "group" divides by the sample standard deviation of a group (with G - 1), "none" does not.
    """
    centered_PG = rewards_PG - rewards_PG.mean(axis=1, keepdims=True)
    # Exactly 0, whatever the mean is rounded to.
    centered_PG = np.where(np.ptp(rewards_PG, axis=1, keepdims=True) == 0, 0.0, centered_PG)
    if scale == "none":
        return centered_PG
    return centered_PG / (rewards_PG.std(axis=1, ddof=1, keepdims=True) + MIN_STD)


def grpo_objective(config: TrainConfig) -> Objective:
    """Returns the objective of a run with `objective` grpo.

    Batches need the log-probability with which each target was sampled, and its advantage; `loss_weights` are
    1 for sampled tokens. The metrics are means over sampled tokens: `loss`; `entropy` (an estimate: minus the
    log-probability of the sampled token); `clip_ratio`, the fraction whose ratio was clipped; `kl`, only with
    `grpo.beta`; and `rollout_difference/mean` and `rollout_difference/max` between the log-probability of a
    token now and when it was sampled.
    """

    def sums(
        model: Transformer,
        batch: Batch,
        *,
        dropout_key: jax.Array | None = None,
        capacity_factor: float | None = None,
    ) -> tuple[dict[str, jax.Array], RouterStats]:
        found_BT, stats = token_log_probs(model, batch, dropout_key, capacity_factor)
        reference_BT = None
        if config.grpo.beta:
            reference_BT, _ = token_log_probs(without_adapters(model), batch)
            reference_BT = jax.lax.stop_gradient(reference_BT)
        sampled_BT, advantages_BT = batch[SAMPLED_LOG_PROBS], batch[ADVANTAGES]
        terms = grpo_terms(config.grpo, found_BT, sampled_BT, advantages_BT, reference_BT)
        is_sampled = loss_weights(batch) > 0
        terms = {name: jnp.where(is_sampled, x, 0) for name, x in terms.items()}
        largest = {DIFFERENCE: jnp.max(terms.pop(DIFFERENCE))}
        return {name: jnp.sum(x) for name, x in terms.items()} | largest, stats

    def weight(batch: Batch) -> jax.Array:
        return jnp.sum(loss_weights(batch))

    return Objective(sums, weight, is_per_token=True, maxima=frozenset({DIFFERENCE}))


def grpo_terms(
    config: GrpoConfig,
    log_probs: jax.Array,
    sampled: jax.Array,
    advantages: jax.Array,
    reference: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """Returns loss and metrics of each token, float32 arrays like the arguments.

    Args:
      log_probs: log p of each token now.
      sampled: log p of each token when it was sampled.
      advantages: of the answer that each token is part of.
      reference: log p of each token according to the reference model; needed if `config.beta` is not 0.
    """
    low, high = 1 - config.epsilon, 1 + config.upper_epsilon
    ratio = jnp.exp(log_probs - sampled)
    # Where an advantage is negative, clipping does not bound the loss.
    ratio = jnp.where(advantages < 0, jnp.minimum(ratio, config.max_ratio), ratio)
    gain = jnp.minimum(ratio * advantages, jnp.clip(ratio, low, high) * advantages)
    is_clipped = ((ratio < low) & (advantages < 0)) | ((ratio > high) & (advantages > 0))
    terms = {
        "loss": -gain,
        "entropy": -log_probs,
        "clip_ratio": is_clipped.astype(jnp.float32),
        MEAN_DIFFERENCE: jnp.abs(log_probs - sampled),
        DIFFERENCE: jnp.abs(log_probs - sampled),
    }
    if config.beta:
        assert reference is not None, config.beta
        # An estimate of the divergence that is never negative (Schulman 2020, "k3").
        kl = jnp.exp(reference - log_probs) - (reference - log_probs) - 1
        terms |= {"loss": terms["loss"] + config.beta * kl, "kl": kl}
    return terms
