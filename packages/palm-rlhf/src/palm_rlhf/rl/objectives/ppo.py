"""PPO with a token-level critic (arXiv 1707.06347; for language models arXiv 1909.08593)."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lm_core.checks import check_above_zero, typed
from palm_rlhf.rl.advantages import generalized_advantages, whiten
from palm_rlhf.rl.experience import Experience
from palm_rlhf.rl.log_probs import PolicyOutput
from palm_rlhf.rl.losses import clipped_value_loss
from palm_rlhf.rl.objectives.base import ClippedObjective, TokenLoss


@typed
@dataclass(frozen=True, kw_only=True)
class PPO(ClippedObjective):
    """PPO: clipped surrogate with advantages from a critic (GAE), and a clipped value loss.

    Args:
        value_clip: bound of the change of a value from the old one; null for the plain squared error.
        value_loss_weight: weight of the value loss.
        gamma: discount per token.
        gae_lambda: lambda of GAE: 0 for least variance, 1 for no bias.
        whiten_rewards: divides token rewards by their standard deviation.
        whiten_advantages: standardizes advantages over the response tokens of the global batch.
    """

    value_clip: float | None = 0.4
    value_loss_weight: float = 0.5
    gamma: float = 1.0
    gae_lambda: float = 0.95
    whiten_rewards: bool = False
    whiten_advantages: bool = True

    needs_values: ClassVar[bool] = True
    epochs: ClassVar[int] = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_above_zero(self.value_clip, "value_clip")
        self._check_range(math.inf, "value_loss_weight")
        self._check_range(1.0, "gamma", "gae_lambda")

    def advantages(self, experience: Experience) -> tuple[Float[Tensor, "b m"], Float[Tensor, "b m"]]:
        """Generalized advantages, and the returns that values are trained on."""
        assert experience.token_rewards is not None
        assert experience.values is not None
        mask, rewards = experience.response_mask, experience.token_rewards
        if self.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)
        advantages, returns = generalized_advantages(
            rewards, experience.values, mask, gamma=self.gamma, lambda_=self.gae_lambda
        )
        return (whiten(advantages, mask) if self.whiten_advantages else advantages), returns

    def token_loss(self, scores: PolicyOutput, batch: Experience) -> TokenLoss:
        """The clipped surrogate and the value loss, by regression or over bins (HL-Gauss)."""
        assert scores.values is not None
        assert batch.values is not None
        assert batch.returns is not None
        if scores.bins is not None:
            assert scores.value_logits is not None
            value = scores.bins.loss(scores.value_logits, batch.returns)
            clipped = torch.zeros_like(batch.response_mask)
        else:
            returns = batch.returns.to(scores.values)
            value, clipped = clipped_value_loss(scores.values, batch.values, returns, value_clip=self.value_clip)
        loss = super().token_loss(scores, batch)
        return replace(loss, value=value, value_weight=self.value_loss_weight, value_clipped=clipped)
