"""Losses of preference optimisation as functions of log-probabilities: DPO and its successors.

Every loss is the mean of a loss of each pair, a function of the log-probabilities of the chosen answer w and the
rejected answer l under the policy and, except for the last two, the reference. With ``r(y) = log p(y|x) - log
p_ref(y|x)``, ``h = r(w) - r(l)``, answer lengths |w| and |l|, beta b and label smoothing e:

| name | loss of a pair | source |
|---|---|---|
| ``sigmoid`` | ``-(1 - e) log sigmoid(b h) - e log sigmoid(-b h)`` | DPO, arXiv 2305.18290 eq. 7; smoothed: cDPO |
| ``robust`` | ``(-(1 - e) log sigmoid(b h) + e log sigmoid(-b h)) / (1 - 2 e)`` | arXiv 2403.00409 eq. 12 |
| ``hinge`` | ``max(0, 1 - b h)`` | SLiC, arXiv 2305.10425 |
| ``ipo`` | ``(r(w) / |w| - r(l) / |l| - 1 / (2 b))^2`` | arXiv 2310.12036 eq. 17 |
| ``simpo`` | ``-log sigmoid(b (log p(w) / |w| - log p(l) / |l|) - margin)`` | arXiv 2405.14734 eq. 6 |
| ``orpo`` | ``-log P(w) - b log sigmoid(logit P(w) - logit P(l))`` with ``P(y) = p(y)^(1/|y|)`` | arXiv 2403.07691 |

The log-ratios of ``ipo`` are means over an answer's tokens, as its authors do it; eq. 17 has no lengths. The likelihood
in ``orpo`` is that of the chosen answer alone; some implementations add the prompt's.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from lm_core.checks import check_above_zero, typed
from spin_trainer.model.spin import Comparison

PreferenceLossName = Literal["sigmoid", "robust", "hinge", "ipo", "simpo", "orpo"]
PREFERENCE_LOSSES: tuple[str, ...] = get_args(PreferenceLossName)
REFERENCE_FREE = ("simpo", "orpo")
SMOOTHED = ("sigmoid", "robust")
# The papers' values: SimPO's rewards are means over tokens, hence larger ones.
DEFAULT_BETA = {"simpo": 2.0}
DEFAULT_MARGIN = 1.0


@typed
@dataclass(frozen=True, kw_only=True)
class PreferenceLoss:
    """A preference loss with its hyper-parameters; see the table of the module.

    Args:
        loss: name of the loss.
        beta: weight of the log-ratios (``sigmoid``, ``robust``, ``hinge``, ``ipo``, ``simpo``) or of the odds ratio
            (``orpo``); null is 2 for ``simpo`` and 0.1 for the others.
        label_smoothing: probability that the labels of a pair are swapped, for ``sigmoid`` and ``robust``.
        simpo_margin: reward margin of ``simpo``, gamma in its paper; null is 1, the half of its default beta.

    Raises:
        ValueError: a value is out of range, or does not belong to the loss.
    """

    loss: PreferenceLossName = "sigmoid"
    beta: float | None = None
    label_smoothing: float = 0.0
    simpo_margin: float | None = None

    def __post_init__(self) -> None:
        check_above_zero(self.beta, "beta")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be in [0, 0.5), got {self.label_smoothing}")
        if self.label_smoothing > 0 and self.loss not in SMOOTHED:
            raise ValueError(
                f"label_smoothing goes with loss {' or '.join(SMOOTHED)}, got {self.label_smoothing} and {self.loss!r}"
            )
        if self.simpo_margin is not None and self.loss != "simpo":
            raise ValueError(f"simpo_margin goes with loss 'simpo', got {self.simpo_margin} and {self.loss!r}")
        if self.simpo_margin is not None and not 0 <= self.simpo_margin < float("inf"):
            raise ValueError(f"simpo_margin must be a finite number of at least 0, got {self.simpo_margin}")

    @property
    def needs_reference(self) -> bool:
        """False for a loss without a reference."""
        return self.loss not in REFERENCE_FREE

    def comparison(
        self,
        policy: Float[Tensor, " two_b"],
        reference: Float[Tensor, " two_b"],
        answer: Bool[Tensor, "two_b n"],
    ) -> Comparison:
        """Compares summed log-probabilities of b chosen answers, followed by those of b rejected ones.

        The margins are differences of the rewards that a loss implies, positive where the policy prefers the chosen
        answer.

        Args:
            policy: log-probabilities under the policy, in nats.
            reference: log-probabilities under the reference; ignored by a loss without one.
            answer: True at answer tokens.
        """
        lengths = answer.sum(dim=-1).clamp(min=1).to(policy.dtype)
        # differences of chosen and rejected answers: of log-ratios, and of means of log-probabilities over tokens
        ratios = policy - reference if self.needs_reference else policy
        ratio = _difference(ratios)
        mean_ratio = _difference(ratios / lengths)
        beta = DEFAULT_BETA.get(self.loss, 0.1) if self.beta is None else self.beta
        epsilon = self.label_smoothing
        margins = beta * (ratio if self.loss in ("sigmoid", "robust", "hinge") else mean_ratio)
        if self.loss == "sigmoid":
            losses = -(1 - epsilon) * F.logsigmoid(margins) - epsilon * F.logsigmoid(-margins)
        elif self.loss == "robust":
            losses = -(1 - epsilon) * F.logsigmoid(margins) + epsilon * F.logsigmoid(-margins)
            losses = losses / (1 - 2 * epsilon)
        elif self.loss == "hinge":
            losses = F.relu(1 - margins)
        elif self.loss == "ipo":
            losses = (mean_ratio - 1 / (2 * beta)) ** 2
        elif self.loss == "simpo":
            margin = DEFAULT_MARGIN if self.simpo_margin is None else self.simpo_margin
            losses = -F.logsigmoid(margins - margin)
        else:
            mean = policy / lengths
            log_odds = _difference(mean - log1mexp(mean))
            losses = -mean.chunk(2)[0] - beta * F.logsigmoid(log_odds)
        policy_chosen, policy_rejected = policy.chunk(2)
        reference_chosen, reference_rejected = reference.chunk(2)
        return Comparison(losses, margins, policy_chosen, policy_rejected, reference_chosen, reference_rejected)


def _difference(values: Float[Tensor, " two_b"]) -> Float[Tensor, " b"]:
    chosen, rejected = values.chunk(2)
    return chosen - rejected


def log1mexp(log_p: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """log(1 - p) of a log-probability, exact near p = 1 and near p = 0; p = 1 counts as the largest p below it."""
    log_p = log_p.clamp(max=-torch.finfo(log_p.dtype).tiny)
    near_one = log_p > -0.6931471805599453
    # each branch gets values that are safe for it, so that the gradient of the other is no NaN
    of_near = torch.log(-torch.expm1(torch.where(near_one, log_p, -0.5)))
    return torch.where(near_one, of_near, torch.log1p(-torch.exp(torch.where(near_one, -1.0, log_p))))
