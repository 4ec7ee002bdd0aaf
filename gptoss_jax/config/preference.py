"""Settings of training on preferences."""

import dataclasses
import typing
from typing import Annotated, Literal

from gptoss_jax.config.base import Bound, ConfigBase, Positive


@dataclasses.dataclass(frozen=True)
class DpoConfig(ConfigBase):
    """Training on pairs of a chosen and a rejected answer (`objective` dpo)."""

    _section: typing.ClassVar[str] = "dpo"

    # sigmoid (DPO, Rafailov et al. 2023) and ipo (Azar et al. 2023) compare with a reference model: the model
    # without its adapters or, if all weights are trained or an adapter is continued, the initial one. orpo
    # (Hong et al. 2024) and simpo (Meng et al. 2024) need no reference.
    loss: Literal["sigmoid", "ipo", "orpo", "simpo"] = "sigmoid"
    # Strength of the preference; smaller values allow a larger distance from the reference. For orpo, the
    # weight of the odds ratio beside the loss on the chosen answer.
    beta: Positive[float] = 0.1
    # Fraction of pairs whose labels are assumed to be swapped (conservative DPO); only for sigmoid.
    label_smoothing: Annotated[float, Bound("must be at least 0 and below 0.5", lambda x: 0 <= x < 0.5)] = 0.0
    # Margin between the rewards of simpo; None is 0.5.
    gamma: Annotated[float | None, Bound("must be 0 or more, or None", lambda x: x is None or x >= 0)] = None

    def _check(self) -> None:
        allowed = "must be 0 unless dpo.loss is 'sigmoid'"
        self._require(self.loss == "sigmoid" or self.label_smoothing == 0, "label_smoothing", allowed)
        allowed = "must be None unless dpo.loss is 'simpo'"
        self._require(self.loss == "simpo" or self.gamma is None, "gamma", allowed)

    @property
    def needs_reference(self) -> bool:
        return self.loss in ("sigmoid", "ipo")
