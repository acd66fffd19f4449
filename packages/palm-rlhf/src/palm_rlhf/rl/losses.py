"""Losses of policies and critics per token, and the weights of their sum.

Losses are per token and not masked: multiplied by ``token_weights`` and summed they are the loss of the GLOBAL
minibatch, to which the shares of several processes add up exactly.

Legend: b batch, t tokens.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lm_core.checks import typed

Aggregation = Literal["token", "sequence", "constant"]


class Surrogate(NamedTuple):
    """Per token: loss, probability ratio new / old, and True where clipping removes the gradient."""

    loss: Float[Tensor, "*shape"]
    ratio: Float[Tensor, "*shape"]
    clipped: Bool[Tensor, "*shape"]


@typed
def clipped_surrogate(
    log_probs: Float[Tensor, "*shape"],
    old_log_probs: Float[Tensor, "*shape"] | None,
    advantages: Float[Tensor, "*shape"],
    *,
    eps_clip: float = 0.2,
    eps_clip_high: float | None = None,
    dual_clip: float | None = None,
) -> Surrogate:
    """``-min(ratio * A, clip(ratio, 1 - eps_clip, 1 + eps_clip_high) * A)`` (arXiv 1707.06347, equation 7).

    With ``dual_clip``, at least ``dual_clip * A`` where A < 0 (arXiv 1912.09729, equation 5).

    Args:
        log_probs: log-probs under the current policy.
        old_log_probs: log-probs under the policy that drew the tokens; None where that is the current one (ratio 1).
        advantages: advantages of the tokens.
        eps_clip: bound of the ratio below 1, at ``1 - eps_clip``.
        eps_clip_high: bound of the ratio above 1, at ``1 + eps_clip_high``; ``eps_clip`` by default.
        dual_clip: largest ratio that multiplies a negative advantage; None for no limit.
    """
    high = eps_clip if eps_clip_high is None else eps_clip_high
    ratio = probability_ratio(log_probs, old_log_probs)
    plain = ratio * advantages
    bounded = ratio.clamp(1 - eps_clip, 1 + high) * advantages
    least, clipped = torch.minimum(plain, bounded), bounded < plain
    if dual_clip is not None:
        floor = dual_clip * advantages
        too_low = (advantages < 0) & (least < floor)
        least, clipped = floor.where(too_low, least), clipped | too_low
    return Surrogate(-least, ratio, clipped)


def probability_ratio(
    log_probs: Float[Tensor, "*shape"], old_log_probs: Float[Tensor, "*shape"] | None
) -> Float[Tensor, "*shape"]:
    """Ratio of the current probability and the one when tokens were drawn; 1 with its gradient for None."""
    return (log_probs - (log_probs if old_log_probs is None else old_log_probs).detach()).exp()


@typed
def clipped_value_loss(
    values: Float[Tensor, "*shape"],
    old_values: Float[Tensor, "*shape"],
    returns: Float[Tensor, "*shape"],
    *,
    value_clip: float | None = 0.4,
) -> tuple[Float[Tensor, "*shape"], Bool[Tensor, "*shape"]]:
    """``max((V - R)^2, (V_old + clip(V - V_old, +-value_clip) - R)^2) / 2`` per token, and where clipping is active.

    Args:
        values: values of the current critic.
        old_values: values when the tokens were drawn.
        returns: targets of the values.
        value_clip: bound of the change from the old values; None for the plain squared error.
    """
    plain = (values - returns).square()
    if value_clip is None:
        return 0.5 * plain, torch.zeros_like(plain, dtype=torch.bool)
    near = values.clamp(old_values - value_clip, old_values + value_clip)
    bounded = (near - returns).square()
    return 0.5 * torch.maximum(plain, bounded), bounded > plain


@typed
def token_weights(
    mask: Bool[Tensor, "b t"], aggregation: Aggregation = "token", *, max_new_tokens: int | None = None
) -> Float[Tensor, "b t"]:
    """Weights of a batch's tokens, 0 outside ``mask``.

    Args:
        mask: True at response tokens of the global minibatch.
        aggregation: "token" weighs all tokens alike; "sequence" all responses alike and the tokens within each (arXiv
            2402.03300, equation 3); "constant" divides by ``b * max_new_tokens`` (Dr. GRPO, arXiv 2503.20783).
        max_new_tokens: maximum length of a response, for "constant".

    Raises:
        ValueError: "constant" without ``max_new_tokens``.
    """
    counted = mask.to(torch.float64)
    if aggregation == "token":
        return counted / counted.sum().clamp(min=1)
    if aggregation == "sequence":
        return counted / counted.sum(dim=1, keepdim=True).clamp(min=1) / max(mask.shape[0], 1)
    if max_new_tokens is None or max_new_tokens < 1:
        raise ValueError(f'aggregation "constant" needs max_new_tokens of at least 1, got {max_new_tokens}')
    return counted / (max(mask.shape[0], 1) * max_new_tokens)
