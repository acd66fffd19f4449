"""Objectives that compare the responses to one prompt: rewards relative to their group, without a critic."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from lm_core.checks import typed
from palm_rlhf.rl.advantages import group_advantages
from palm_rlhf.rl.experience import Experience
from palm_rlhf.rl.kl import KLEstimator
from palm_rlhf.rl.losses import Aggregation
from palm_rlhf.rl.objectives.base import Objective


@typed
@dataclass(frozen=True, kw_only=True)
class GroupObjective(Objective):
    """An objective with group-relative advantages (arXiv 2402.03300, section 4.1.2) and the KL in the loss.

    Args:
        scale_rewards: divisor of advantages: "group", the standard deviation within a group; "batch", that of all
            scores; "mean", the mean reward of the group (MaxRL, for rewards of at least 0); "none", 1.
    """

    group_size: int = 8
    kl_div_loss_weight: float = 0.0
    kl_in: Literal["reward", "loss"] = "loss"
    kl_estimator: KLEstimator = "k3"
    aggregation: Aggregation = "sequence"
    scale_rewards: Literal["group", "batch", "mean", "none"] = "group"

    compares_responses: ClassVar[bool] = True

    def advantages(self, experience: Experience) -> tuple[Float[Tensor, "b m"], None]:
        """The response's reward minus the mean of its group, at every token."""
        assert experience.token_rewards is not None
        totals = experience.token_rewards.sum(dim=1).float()
        advantages = group_advantages(totals, group_size=self.group_size, scale=self.scale_rewards)
        return advantages[:, None] * experience.response_mask, None
