"""GRPO (arXiv 2402.03300): responses compared with others to the same prompt, without a critic."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from lm_core.checks import typed
from palm_rlhf.rl.advantages import group_advantages
from palm_rlhf.rl.experience import Experience
from palm_rlhf.rl.kl import KLEstimator
from palm_rlhf.rl.losses import Aggregation
from palm_rlhf.rl.objectives.base import ClippedObjective


@typed
@dataclass(frozen=True, kw_only=True)
class GRPO(ClippedObjective):
    """GRPO: clipped surrogate with group-relative advantages, and the k3 estimate of the KL in the loss (equation 4).

    Length normalisation is set by ``aggregation``: "sequence" (the paper), "constant" (Dr. GRPO, arXiv 2503.20783,
    together with ``scale_rewards="none"``) or "token", a plain mean over tokens.

    Args:
        scale_rewards: divisor of advantages: "group", the standard deviation within a group (the paper); "batch", that
            of all scores; "none", 1.
    """

    group_size: int = 8
    kl_div_loss_weight: float = 0.04
    kl_in: Literal["reward", "loss"] = "loss"
    kl_estimator: KLEstimator = "k3"
    aggregation: Aggregation = "sequence"
    scale_rewards: Literal["group", "batch", "none"] = "group"

    compares_responses: ClassVar[bool] = True

    def advantages(self, experience: Experience) -> tuple[Float[Tensor, "b m"], None]:
        """The response's reward minus the mean of its group, at every token."""
        assert experience.token_rewards is not None
        totals = experience.token_rewards.sum(dim=1).float()
        advantages = group_advantages(totals, group_size=self.group_size, scale=self.scale_rewards)
        return advantages[:, None] * experience.response_mask, None
