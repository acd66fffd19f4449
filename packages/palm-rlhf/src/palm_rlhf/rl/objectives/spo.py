"""SPO, simple policy optimization (arXiv 2401.16025): a quadratic penalty of the ratio in place of clipping."""

from dataclasses import dataclass, replace

import torch

from lm_core.checks import typed
from palm_rlhf.rl.experience import Experience
from palm_rlhf.rl.log_probs import PolicyOutput
from palm_rlhf.rl.losses import probability_ratio
from palm_rlhf.rl.objectives.base import TokenLoss
from palm_rlhf.rl.objectives.ppo import PPO


@typed
@dataclass(frozen=True, kw_only=True)
class SPO(PPO):
    """SPO: ``-ratio * A + |A| / (2 eps_clip) * (ratio - 1)^2`` with PPO's advantages and critic (algorithm 1).

    The loss is least where the ratio reaches ``1 + eps_clip`` (``1 - eps_clip`` for A < 0), and has a gradient back to
    it from beyond, where a clipped loss has none.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("eps_clip_high", "dual_clip"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} must be None for SPO, got {getattr(self, name)}")

    def token_loss(self, scores: PolicyOutput, batch: Experience) -> TokenLoss:
        """The penalized surrogate and the value loss."""
        assert batch.advantages is not None
        ratio = probability_ratio(scores.log_probs, batch.log_probs)
        penalty = batch.advantages.abs() / (2 * self.eps_clip) * (ratio - 1).square()
        loss = super().token_loss(scores, batch)
        return replace(loss, policy=penalty - ratio * batch.advantages, clipped=torch.zeros_like(batch.response_mask))
