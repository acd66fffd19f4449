"""CISPO (arXiv 2506.13585): the policy gradient weighted by clipped probability ratios, for every token."""

from dataclasses import dataclass

import torch

from lm_core.checks import check_above_zero, typed
from palm_rlhf.rl.experience import Experience
from palm_rlhf.rl.log_probs import PolicyOutput
from palm_rlhf.rl.losses import Aggregation, probability_ratio
from palm_rlhf.rl.objectives.base import TokenLoss
from palm_rlhf.rl.objectives.group import GroupObjective


@typed
@dataclass(frozen=True, kw_only=True)
class CISPO(GroupObjective):
    """CISPO: ``-sg(clip(ratio, 1 - eps_clip, 1 + eps_clip_high)) * A * log-prob`` (equations 4 and 5).

    Clipping bounds the weight of a token and never removes its gradient.

    Args:
        eps_clip: distance below 1 at which the weight is clipped; null for no lower bound (the paper).
        eps_clip_high: distance above 1 at which the weight is clipped.
    """

    aggregation: Aggregation = "token"
    eps_clip: float | None = None
    eps_clip_high: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eps_clip is not None and not 0 < self.eps_clip < 1:
            raise ValueError(f"eps_clip must be in (0, 1), got {self.eps_clip}")
        check_above_zero(self.eps_clip_high, "eps_clip_high")

    def token_loss(self, scores: PolicyOutput, batch: Experience) -> TokenLoss:
        """Minus weight, advantage and log-prob of each token."""
        assert batch.advantages is not None
        ratio = probability_ratio(scores.log_probs, batch.log_probs)
        low = 0.0 if self.eps_clip is None else 1 - self.eps_clip
        weight = ratio.detach().clamp(low, 1 + self.eps_clip_high)
        loss = -weight * batch.advantages * scores.log_probs
        return TokenLoss(loss, ratio, torch.ne(weight, ratio.detach()))
