"""The self-play loss of SPIN (arXiv 2401.01335) as a function of log-probabilities.

Equation 4.7: ``l(lambda * [log p(y|x) - log p_t(y|x)] - lambda * [log p(y'|x) - log p_t(y'|x)])`` with the human answer
y, the opponent's answer y' and the opponent p_t. The paper's section 4.1 names four decreasing functions l.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

LossName = Literal["logistic", "hinge", "exponential", "correlation"]
LOSS_NAMES: tuple[str, ...] = get_args(LossName)


def self_play_margins(
    policy_real: Float[Tensor, " b"],
    policy_generated: Float[Tensor, " b"],
    reference_real: Float[Tensor, " b"],
    reference_generated: Float[Tensor, " b"],
    *,
    lambda_: float | int = 0.1,
) -> Float[Tensor, " b"]:
    """Margin inside l in equation 4.7: the policy's preference for the human answer minus the opponent's.

    Args:
        policy_real: log p(y|x), summed over the answer's tokens, in nats.
        policy_generated: log p(y'|x), likewise.
        reference_real: log p_t(y|x), likewise.
        reference_generated: log p_t(y'|x), likewise.
        lambda_: regularisation weight of section 4.2; larger values keep the policy closer to the opponent.
    """
    return lambda_ * ((policy_real - reference_real) - (policy_generated - reference_generated))


def self_play_losses(margins: Float[Tensor, " b"], loss: LossName = "logistic") -> Float[Tensor, " b"]:
    """Loss of each margin, l in equation 4.7; "logistic" is in nats, ln 2 at a margin of 0.

    Raises:
        ValueError: ``loss`` is not one of ``LOSS_NAMES``.
    """
    if loss == "logistic":
        return -F.logsigmoid(margins)
    if loss == "hinge":
        return F.relu(1 - margins)
    if loss == "exponential":
        return torch.exp(-margins)
    if loss == "correlation":
        return 1 - margins
    raise ValueError(f"loss must be one of {LOSS_NAMES}, got {loss!r}")


def win_rate(margins: Float[Tensor, " b"]) -> Float[Tensor, ""]:
    """Share of rows whose margin is positive; a margin of exactly 0 counts one half."""
    return ((margins > 0).float() + 0.5 * (margins == 0).float()).mean()
