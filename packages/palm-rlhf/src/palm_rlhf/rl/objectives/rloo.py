"""RLOO (arXiv 2402.14740): each response compared with the mean of the others to its prompt, without a critic."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from lm_core.checks import typed
from palm_rlhf.rl.advantages import leave_one_out_advantages, whiten
from palm_rlhf.rl.experience import Experience
from palm_rlhf.rl.objectives.base import ClippedObjective


@typed
@dataclass(frozen=True, kw_only=True)
class RLOO(ClippedObjective):
    """RLOO: clipped surrogate with leave-one-out advantages (section 4.2); the KL is part of the reward.

    Args:
        whiten_advantages: standardizes advantages over the response tokens of the global batch.
    """

    group_size: int = 4
    whiten_advantages: bool = True

    compares_responses: ClassVar[bool] = True

    def advantages(self, experience: Experience) -> tuple[Float[Tensor, "b m"], None]:
        """The response's reward minus the mean of the others, at every token."""
        assert experience.token_rewards is not None
        mask = experience.response_mask
        totals = experience.token_rewards.sum(dim=1).float()
        advantages = leave_one_out_advantages(totals, group_size=self.group_size)[:, None] * mask
        return (whiten(advantages, mask) if self.whiten_advantages else advantages), None
