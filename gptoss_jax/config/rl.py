"""Settings of reinforcement learning with reward functions."""

import dataclasses
import typing
from typing import Annotated, Literal

from gptoss_jax.config.base import BelowOne, Bound, ConfigBase, NonNegative, Positive


@dataclasses.dataclass(frozen=True)
class GrpoConfig(ConfigBase):
    """Reinforcement learning with reward functions (`objective` grpo)."""

    _section: typing.ClassVar[str] = "grpo"

    # Reward functions, which are added up: exact (1 if the answer equals the row's), format (1 for one
    # complete final answer), regex:PATTERN (1 if the answer matches), or FILE.py:FUNCTION, a function
    # (prompt, answer, row) -> number; FILE.py alone has a function named reward.
    rewards: tuple[str, ...] = ()
    # Weights of the reward functions. Empty means 1 for each.
    reward_weights: tuple[float, ...] = ()
    # Answers sampled for each prompt, whose rewards are compared. Must divide data.batch_size, which is the
    # number of answers that are sampled together.
    group_size: Annotated[int, Bound("must be 2 or more", lambda x: x >= 2)] = 8
    max_new_tokens: Positive[int] = 256  # Maximum tokens of an answer, including reasoning
    # Optimizer steps on the same answers. With one, the policy has not changed since they were sampled.
    iterations: Positive[int] = 1
    # A token of an answer that is worse than the average of its group no longer changes the policy once its
    # probability is below 1 - epsilon times that with which it was sampled.
    epsilon: BelowOne = 0.2
    # The same for a better answer, above 1 + epsilon_high times; None is the same as epsilon.
    epsilon_high: Annotated[
        float | None, Bound("must be 0 or more, or None", lambda x: x is None or x >= 0)
    ] = None
    # Limit of that ratio for the tokens of worse answers, which nothing else bounds. In bfloat16, rounding
    # may change which experts a token uses, and so its probability.
    max_ratio: Annotated[float, Bound("must be above 1", lambda x: x > 1)] = 3.0
    # Weight of the KL divergence from the model without its adapters; 0 computes none.
    beta: NonNegative[float] = 0.0
    # Divides the rewards of a group, minus their mean, by their standard deviation; none does not divide.
    scale_rewards: Literal["group", "none"] = "group"

    def _check(self) -> None:
        count = len(self.rewards)
        self._require(any(self.weights) or not count, "reward_weights", "must not all be 0")
        allowed = f"must have one weight for each of grpo.rewards ({count}), or be empty"
        self._require(len(self.reward_weights) in (0, count), "reward_weights", allowed)
        repeated = next((one for one in self.rewards if self.rewards.count(one) > 1), None)
        self._require(repeated is None, "rewards", f"must not have {repeated!r} twice")

    @property
    def upper_epsilon(self) -> float:
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def weights(self) -> tuple[float, ...]:
        return self.reward_weights or (1.0,) * len(self.rewards)
