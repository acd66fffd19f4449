"""Importance weights of responses that another engine sampled, and the mismatch of its log-probs and the policy's.

An inference engine computes with other kernels or precisions, so its tokens come from a slightly different policy.
Truncated importance sampling multiplies the loss by ``min(exp(log-prob - engine log-prob), cap)`` per token or per
response (arXiv 2605.14220); the masked variants drop what exceeds the cap.

Legend: b batch, m positions.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lm_core.checks import typed

ImportanceCorrection = Literal["token", "sequence", "token_mask", "sequence_mask", "none"]


@typed
def importance_weights(
    log_probs: Float[Tensor, "b m"],
    engine_log_probs: Float[Tensor, "b m"],
    mask: Bool[Tensor, "b m"],
    *,
    correction: ImportanceCorrection = "token",
    cap: float = 2.0,
) -> Float[Tensor, "b m"]:
    """Weights of the losses of tokens, 0 outside ``mask``.

    Args:
        log_probs: log-probs under the policy before its first update on these responses.
        engine_log_probs: log-probs as the engine sampled them.
        mask: True at response tokens.
        correction: "token" weighs each token by its own ratio, "sequence" by that of its whole response, both at most
            ``cap``; with "_mask" a ratio above ``cap`` becomes 0; "none" gives 1.
        cap: largest weight.
    """
    if correction == "none":
        return mask.to(log_probs)
    log_ratio = (log_probs - engine_log_probs).detach().where(mask, 0)
    if correction.startswith("sequence"):
        log_ratio = log_ratio.sum(dim=1, keepdim=True).expand_as(log_ratio)
    ratio = log_ratio.exp()
    bounded = ratio.where(ratio <= cap, 0) if correction.endswith("_mask") else ratio.clamp(max=cap)
    return bounded.where(mask, 0)


def mismatch_metrics(
    log_probs: Float[Tensor, "b m"], engine_log_probs: Float[Tensor, "b m"], mask: Bool[Tensor, "b m"]
) -> dict[str, float]:
    """Over response tokens: ``|log-prob difference|`` (mean, maximum) and KL(engine || policy) per token."""
    difference = (log_probs - engine_log_probs)[mask].double()
    kl = torch.expm1(difference) - difference  # k3, of tokens that the engine sampled
    return {
        "engine_mismatch_mean": float(difference.abs().mean()),
        "engine_mismatch_max": float(difference.abs().max()),
        "engine_kl": float(kl.mean()),
    }
