"""TPO, target policy optimization (arXiv 2604.06159): cross-entropy to a target distribution over each group."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange

from lm_core.checks import typed
from palm_rlhf.rl.experience import Experience
from palm_rlhf.rl.log_probs import PolicyOutput
from palm_rlhf.rl.losses import probability_ratio
from palm_rlhf.rl.objectives.base import TokenLoss
from palm_rlhf.rl.objectives.group import GroupObjective


@typed
@dataclass(frozen=True, kw_only=True)
class TPO(GroupObjective):
    """TPO: the softmax p over a group's sequence log-probs is fitted to ``q ~ p_old * exp(u / eta)`` by cross-entropy.

    u is the group-relative reward (standardized at ``scale_rewards="group"``). The gradient of a response's log-prob is
    p - q, which vanishes at the target. A minibatch holds whole groups.

    Args:
        eta: temperature of the target; lower values move it further from the old policy.
    """

    eta: float = 1.0

    couples_responses: ClassVar[bool] = True
    weighs_by_advantage: ClassVar[bool] = False
    per_response: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.eta < math.inf:
            raise ValueError(f"eta must be a finite number above 0, got {self.eta}")

    def token_loss(self, scores: PolicyOutput, batch: Experience) -> TokenLoss:
        """Cross-entropy of the response's group, whose mean over groups is that of the terms over responses."""
        assert batch.advantages is not None
        mask, size = batch.response_mask, self.group_size
        old = (scores.log_probs if batch.log_probs is None else batch.log_probs).detach()
        utility = batch.advantages.sum(dim=1) / mask.sum(dim=1)
        # logits of the policy and of the target over the responses to one prompt
        now, before, utility = (
            rearrange(t, "(g r) -> g r", r=size)
            for t in (scores.log_probs.where(mask, 0).sum(dim=1), old.where(mask, 0).sum(dim=1), utility)
        )
        target = (before + utility / self.eta).softmax(dim=1)
        loss = -size * target * now.log_softmax(dim=1)
        ratio = probability_ratio(scores.log_probs, old)
        per_token = rearrange(loss, "g r -> (g r) 1").expand_as(old)
        return TokenLoss(per_token, ratio, torch.zeros_like(mask))
