"""FlowRL (arXiv 2509.15207): matches the distribution of rewards instead of maximizing their mean."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lm_core.checks import check_above_zero, check_positive, typed
from lm_core.nn.masking import masked_mean
from palm_rlhf.rl.experience import Experience
from palm_rlhf.rl.log_probs import PolicyOutput
from palm_rlhf.rl.losses import probability_ratio
from palm_rlhf.rl.objectives.base import TokenLoss
from palm_rlhf.rl.objectives.group import GroupObjective


class LogPartition(nn.Module):
    """``log Z(x)`` from the mean feature of a prompt, by a small network that starts at 0."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.hidden = nn.Linear(features, hidden)
        self.out = nn.Linear(hidden, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, features: Float[Tensor, "b d"]) -> Float[Tensor, " b"]:
        """``log Z`` of each prompt."""
        return self.out(nn.functional.gelu(self.hidden(self.norm(features))))[:, 0]


@typed
@dataclass(frozen=True, kw_only=True)
class FlowRL(GroupObjective):
    """FlowRL: ``w * (log Z(x) + l - beta * r - l_ref)^2`` of each response (equation 6).

    l and l_ref are mean log-probs per token of policy and reference, r the group-relative reward, and w the probability
    ratio of the whole response, clipped and without gradient. Responses then have probabilities proportional to those
    of the reference times ``exp(length * beta * r)``.

    Args:
        beta: inverse temperature of the rewards.
        eps_clip: distance from 1 at which the weight w is clipped.
        network_lr: learning rate of the network of log Z.
        network_size: hidden features of that network.
    """

    beta: float = 15.0
    eps_clip: float = 0.2
    network_lr: float = 1e-3
    network_size: int = 64

    needs_reference: ClassVar[bool] = True
    weighs_by_advantage: ClassVar[bool] = False
    per_response: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta must be a finite number above 0, got {self.beta}")
        if not 0 < self.eps_clip < 1:
            raise ValueError(f"eps_clip must be in (0, 1), got {self.eps_clip}")
        check_above_zero(self.network_lr, "network_lr")
        check_positive(self.network_size, "network_size")

    def network(self, features: int) -> tuple[nn.Module, float]:
        """The network of log Z, and its learning rate."""
        return LogPartition(features, self.network_size), self.network_lr

    def token_loss(self, scores: PolicyOutput, batch: Experience) -> TokenLoss:
        """The weighted square of the flow's imbalance, at each token of the response."""
        assert batch.advantages is not None
        assert batch.reference is not None
        assert scores.network is not None
        mask = batch.response_mask
        log_ratio = masked_mean(scores.unfiltered - batch.reference, mask, dim=1)
        reward = masked_mean(batch.advantages.to(log_ratio), mask, dim=1)
        imbalance = scores.network.to(log_ratio) + log_ratio - self.beta * reward
        ratio = probability_ratio(scores.log_probs, batch.log_probs)
        whole = ratio.detach().log().where(mask, 0).sum(dim=1).exp()
        weight = whole.clamp(1 - self.eps_clip, 1 + self.eps_clip)
        clipped = torch.ne(weight, whole)[:, None].expand_as(mask)
        return TokenLoss((weight * imbalance.square())[:, None].expand_as(ratio), ratio, clipped)
