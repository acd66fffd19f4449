"""KL from the reference policy: estimates from sampled tokens, and their coefficient.

The estimators k1, k2 and k3 are Schulman's ("Approximating KL divergence", 2020): with x drawn from the policy and
r = reference(x) / policy(x), k1 = -log r, k2 = (log r)^2 / 2, k3 = r - 1 - log r. k1 and k3 are unbiased; k3 is
never negative and varies less. As a LOSS, k1 has a gradient of expectation 0 and anchors nothing: use k2 or k3.
"""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lm_core.checks import check_positive, typed

KLEstimator = Literal["k1", "k2", "k3"]


@typed
def kl_estimate(
    log_probs: Float[Tensor, "*shape"], reference_log_probs: Float[Tensor, "*shape"], estimator: KLEstimator = "k1"
) -> Float[Tensor, "*shape"]:
    """Per-token estimate of KL(policy || reference), in nats.

    Args:
        log_probs: log-probs of sampled tokens under the policy that drew them.
        reference_log_probs: log-probs of the same tokens under the reference.
        estimator: estimator of the KL; see the module.
    """
    log_ratio = log_probs - reference_log_probs
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    return torch.expm1(-log_ratio) + log_ratio


class KLCoefficient:
    """Weight of the KL: fixed, or adapted to reach a target (arXiv 1909.08593, section 2.2).

    Args:
        value: initial weight.
        target: target KL in nats per response; None keeps the weight fixed.
        horizon: responses over which a KL of twice the target raises the weight by about a fifth.

    Raises:
        ValueError: a number is out of range.
    """

    @typed
    def __init__(self, value: float, *, target: float | None = None, horizon: int = 10_000) -> None:
        if not 0 <= value < math.inf:
            raise ValueError(f"kl_div_loss_weight must be a finite number of at least 0, got {value}")
        if target is not None and not 0 < target < math.inf:
            raise ValueError(f"kl_target must be a finite number above 0, got {target}")
        check_positive(horizon, "kl_horizon")
        self.value = float(value)
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, responses: int) -> None:
        """Adapts the weight to the mean KL (nats per response) of new responses."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.value *= 1 + error * responses / self.horizon

    def state_dict(self) -> dict[str, float]:
        """The weight."""
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Resumes with the weight of ``state``."""
        self.value = float(state["value"])
