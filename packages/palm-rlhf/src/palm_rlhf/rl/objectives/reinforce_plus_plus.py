"""REINFORCE++ (arXiv 2501.03262): returns with a KL penalty at each token, standardized over the batch."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from lm_core.checks import typed
from palm_rlhf.rl.advantages import discounted_returns, whiten
from palm_rlhf.rl.experience import Experience
from palm_rlhf.rl.objectives.base import ClippedObjective


@typed
@dataclass(frozen=True, kw_only=True)
class ReinforcePlusPlus(ClippedObjective):
    """REINFORCE++: clipped surrogate with standardized returns, one response per prompt.

    The return of a token is the score minus the weighted KL of this token and the later ones; advantages are
    standardized over all response tokens of the global batch.

    Args:
        gamma: discount per token.
    """

    gamma: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_range(1.0, "gamma")

    def advantages(self, experience: Experience) -> tuple[Float[Tensor, "b m"], None]:
        """Returns, standardized over the batch."""
        assert experience.token_rewards is not None
        mask = experience.response_mask
        return whiten(discounted_returns(experience.token_rewards, mask, gamma=self.gamma), mask), None
