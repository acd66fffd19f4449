"""REINFORCE (Williams 1992) with the mean return of the batch as baseline."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from lm_core.checks import typed
from palm_rlhf.rl.advantages import discounted_returns, masked_centred, whiten
from palm_rlhf.rl.experience import Experience
from palm_rlhf.rl.log_probs import PolicyOutput
from palm_rlhf.rl.objectives.base import Objective, TokenLoss


@typed
@dataclass(frozen=True, kw_only=True)
class REINFORCE(Objective):
    """REINFORCE: the plain policy gradient, one pass over each batch, since no ratio corrects for a changed policy.

    Args:
        gamma: discount per token.
        whiten_advantages: standardizes advantages over the response tokens of the global batch.
    """

    gamma: float = 1.0
    whiten_advantages: bool = True

    uses_ratio: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_range(1.0, "gamma")

    def advantages(self, experience: Experience) -> tuple[Float[Tensor, "b m"], None]:
        """Discounted returns minus their mean."""
        assert experience.token_rewards is not None
        mask = experience.response_mask
        returns = discounted_returns(experience.token_rewards, mask, gamma=self.gamma)
        advantages = masked_centred(returns, mask)
        return (whiten(advantages, mask) if self.whiten_advantages else advantages), None

    def token_loss(self, scores: PolicyOutput, batch: Experience) -> TokenLoss:
        """Minus the advantage times the log-prob of each token."""
        assert batch.advantages is not None
        return TokenLoss(-batch.advantages * scores.log_probs)
