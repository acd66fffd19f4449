"""Advantages: returns of tokens, or rewards of responses, relative to a baseline.

All are pure functions. A response is a run of True in its row of ``mask``; values outside are ignored.

Legend: b batch, t tokens.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lm_core.checks import typed


def generalized_advantages(
    rewards: Float[Tensor, "b t"],
    values: Float[Tensor, "b t"],
    mask: Bool[Tensor, "b t"],
    *,
    gamma: float = 1.0,
    lambda_: float = 0.95,
) -> tuple[Float[Tensor, "b t"], Float[Tensor, "b t"]]:
    """GAE (arXiv 1506.02438, equations 11 to 16) over each response, whose last token ends its episode.

    Args:
        rewards: reward of each token.
        values: expected return before each token.
        mask: True at response tokens.
        gamma: discount per token.
        lambda_: 0 for one-step temporal differences, up to 1 for returns minus values.

    Returns:
        Advantages and returns (advantages plus values), 0 outside ``mask``, without gradient.

    Raises:
        ValueError: shapes differ, or ``gamma`` or ``lambda_`` is outside [0, 1].
    """
    _check_shapes(mask, rewards=rewards, values=values)
    if not (0 <= gamma <= 1 and 0 <= lambda_ <= 1):
        raise ValueError(f"gamma and lambda_ must be in [0, 1], got {gamma} and {lambda_}")
    rewards, values = (t.detach().where(mask, 0) for t in (rewards, values))
    advantages = torch.zeros_like(values)
    following = next_value = values.new_zeros(values.shape[0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = (delta + gamma * lambda_ * following).where(mask[:, t], 0)
        advantages[:, t] = following
        next_value = values[:, t]
    return advantages, advantages + values


def discounted_returns(
    rewards: Float[Tensor, "b t"], mask: Bool[Tensor, "b t"], *, gamma: float = 1.0
) -> Float[Tensor, "b t"]:
    """Discounted sum of the rewards from each token on; 0 outside ``mask``."""
    return generalized_advantages(rewards, torch.zeros_like(rewards), mask, gamma=gamma, lambda_=1.0)[0]


def whiten(
    t: Float[Tensor, "b t"], mask: Bool[Tensor, "b t"], *, shift_mean: bool = True, epsilon: float = 1e-8
) -> Float[Tensor, "b t"]:
    """Values divided by their standard deviation over ``mask`` (Bessel's correction), centred at 0 or their mean.

    Args:
        t: values of tokens.
        mask: True at response tokens.
        shift_mean: False keeps the mean.
        epsilon: added to the variance; equal values give 0, or their mean.

    Returns:
        Whitened values; 0 outside ``mask``.

    Raises:
        ValueError: shapes differ.
    """
    _check_shapes(mask, t=t)
    count = mask.sum()
    centred = masked_centred(t, mask)
    variance = centred.square().sum() / (count - 1).clamp(min=1)
    whitened = centred * (variance + epsilon).rsqrt()
    return whitened if shift_mean else (whitened + t.where(mask, 0).sum() / count.clamp(min=1)).where(mask, 0)


def masked_centred(t: Float[Tensor, "b t"], mask: Bool[Tensor, "b t"]) -> Float[Tensor, "b t"]:
    """Values minus their mean over ``mask``; 0 outside, and exactly 0 if all are equal."""
    values = t[mask]
    if values.numel() == 0:
        return torch.zeros_like(t)
    t = t - values[0]  # the mean of equal values may differ from them by rounding, that of zeros does not
    return (t - t[mask].mean()).where(mask, 0)


@typed
def leave_one_out_advantages(scores: Float[Tensor, " b"], *, group_size: int) -> Float[Tensor, " b"]:
    """RLOO (arXiv 2402.14740, section 4.2): each score minus the mean score of the OTHER responses to the prompt.

    Args:
        scores: rewards of responses, grouped by prompt.
        group_size: responses per prompt, at least 2.

    Raises:
        ValueError: ``group_size`` is below 2 or does not divide the number of scores.
    """
    groups = _groups(scores, group_size)
    groups = groups - groups[:, :1]  # as in group_advantages
    others = (groups.sum(dim=1, keepdim=True) - groups) / (group_size - 1)
    return (groups - others).reshape(-1)


@typed
def group_advantages(
    scores: Float[Tensor, " b"],
    *,
    group_size: int,
    scale: Literal["group", "batch", "mean", "none"] = "group",
    epsilon: float = 1e-4,
) -> Float[Tensor, " b"]:
    """GRPO (arXiv 2402.03300, section 4.1.2): each response's score minus the mean of its group.

    Args:
        scores: rewards of responses, grouped by prompt.
        group_size: responses per prompt, at least 2.
        scale: divides by the group's standard deviation (the paper), by that of all scores, by the group's mean score
            (MaxRL; 0 where that is 0), or not at all (Dr. GRPO, arXiv 2503.20783: the division favours prompts that are
            nearly always or nearly never solved).
        epsilon: added to the deviation, which bounds advantages where scores hardly differ; equal scores give 0.

    Raises:
        ValueError: ``group_size`` is below 2 or does not divide the number of scores, or a score is negative at scale
            "mean".
    """
    groups = _groups(scores, group_size)
    if scale == "mean":
        if bool((scores < 0).any()):
            raise ValueError(f'rewards must be at least 0 at scale_rewards "mean", got {scores.min().item()}')
        means = groups.mean(dim=1, keepdim=True)
        return ((groups - means) / means).where(means > 0, 0).reshape(-1)
    # the mean of equal scores may differ from them by rounding, that of zeros does not
    groups = groups - groups[:, :1]
    centred = groups - groups.mean(dim=1, keepdim=True)
    if scale == "group":
        centred = centred / (groups.std(dim=1, keepdim=True) + epsilon)
    elif scale == "batch":
        centred = centred / ((scores - scores[0]).std() + epsilon)
    return centred.reshape(-1)


def zero_variance_groups(scores: Float[Tensor, " b"], *, group_size: int) -> Bool[Tensor, " g"]:
    """True for groups whose responses all have one score, from which comparisons learn nothing."""
    groups = _groups(scores, group_size)
    return (groups == groups[:, :1]).all(dim=1)


def entropy_shaped(
    advantages: Float[Tensor, "b t"], entropy: Float[Tensor, "b t"], *, weight: float, bound: float
) -> Float[Tensor, "b t"]:
    """``A + min(weight * H, |A| / bound)`` without gradient through the entropy H (arXiv 2506.14758)."""
    return advantages + torch.minimum(weight * entropy.detach(), advantages.abs() / bound)


def _groups(scores: Tensor, group_size: int) -> Tensor:
    if group_size < 2:
        raise ValueError(f"group_size must be at least 2, or there is nothing to compare with, got {group_size}")
    if scores.ndim != 1 or scores.shape[0] % group_size:
        raise ValueError(f"scores must be one dimension of whole groups of {group_size}, got {tuple(scores.shape)}")
    return scores.reshape(-1, group_size)


def _check_shapes(mask: Tensor, **tensors: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be boolean, got dtype {mask.dtype}")
    for name, tensor in tensors.items():
        if tensor.shape != mask.shape or tensor.ndim != 2:
            raise ValueError(f"{name} must have the mask's shape {tuple(mask.shape)}, got {tuple(tensor.shape)}")
