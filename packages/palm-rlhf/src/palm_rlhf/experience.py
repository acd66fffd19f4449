"""What a policy learns from: rollouts of all processes with their scores, log-probabilities, values and advantages.

Every process holds the whole of it and works on its share of each minibatch, so an update is the same however many
processes there are. Responses are short beside activations: this costs little.

Legend: b batch (of all processes), n sequence, m = n - 1.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lm_core.distributed import world_size
from lm_core.generation import eval_mode
from palm_rlhf.actor_critic import ActorCritic
from palm_rlhf.advantages import (
    discounted_returns,
    generalized_advantages,
    group_advantages,
    leave_one_out_advantages,
    whiten,
)
from palm_rlhf.kl import KLEstimator, kl_estimate
from palm_rlhf.rollouts import Rollout

Experience = dict[str, Tensor]
AdvantageEstimator = Literal["gae", "group", "rloo", "reinforce"]


@torch.no_grad()
def judge(policy: ActorCritic, rollout: Rollout, scores: Tensor, *, batch_size: int) -> Experience:
    """A rollout with what actor, critic and reference say of it, on the policy's device.

    The log-probabilities are those of a training forward, a batch at a time: so the ratio is 1 before the first update.
    """
    rollout = rollout.to(policy.device)
    parts: list[Experience] = []
    mask, response_mask = rollout.mask, rollout.response_mask
    with eval_mode(policy):
        for first in range(0, len(rollout), batch_size):
            rows = slice(first, first + batch_size)
            kept = None if rollout.kept is None else rollout.kept[rows]
            given = (rollout.ids[rows], mask[rows], response_mask[rows])
            judgement = policy(*given, temperature=rollout.temperature, kept=kept)
            reference = policy.score(*given, role="reference", temperature=rollout.temperature)
            own = judgement.scores
            part = {"log_probs": own.log_probs, "unfiltered": own.unfiltered, "reference": reference.unfiltered}
            if judgement.values is not None:
                part["values"] = judgement.values
            parts.append(part)
    experience = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    experience |= {
        "ids": rollout.ids,
        "mask": mask,
        "response_mask": response_mask,
        "finished": rollout.finished,
        "scores": scores.to(policy.device),
    }
    return experience if rollout.kept is None else {**experience, "kept": rollout.kept}


def joined(parts: Sequence[Experience], *, pad_id: int) -> Experience:
    """Experiences of different widths as one, in their order."""
    width = max(part["ids"].shape[1] for part in parts)
    whole = {}
    for name in parts[0]:
        padded = []
        for part in parts:
            value, missing = part[name], width - part["ids"].shape[1]
            if value.ndim == 2:
                fill = pad_id if name == "ids" else 0
                value = F.pad(value, (0, missing), value=fill)
            elif value.ndim == 3:
                value = F.pad(value, (0, 0, 0, missing), value=255)
            padded.append(value)
        whole[name] = torch.cat(padded)
    return whole


def gathered(experience: Experience, *, pad_id: int) -> Experience:
    """The experience of all processes, in the order of ranks; every process gets it."""
    if world_size() == 1:
        return experience
    device = experience["ids"].device
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, {name: value.cpu() for name, value in experience.items()})
    return {name: value.to(device) for name, value in joined(parts, pad_id=pad_id).items()}


def rows_of(experience: Experience, rows: Tensor) -> Experience:
    """Some rows, no wider than they need."""
    chosen = {name: value[rows] for name, value in experience.items() if value.ndim > 0}
    width = max(int(chosen["mask"].sum(dim=1).max()), 2)
    for name, value in chosen.items():
        if value.ndim > 1:
            chosen[name] = value[:, : width if name in ("ids", "mask") else width - 1]
    return chosen


def with_advantages(
    experience: Experience,
    *,
    estimator: AdvantageEstimator,
    group_size: int,
    gamma: float,
    gae_lambda: float,
    kl_weight: float,
    kl_estimator: KLEstimator,
    whiten_rewards: bool,
    whiten_advantages: bool,
    missing_eos_penalty: float,
    group_scale: Literal["group", "batch", "none"],
) -> Experience:
    """The experience with ``advantages`` and ``returns``, computed over the global batch.

    Args:
        experience: of all processes.
        estimator: "gae" needs values; "group" and "rloo" compare responses to one prompt, which are neighbours;
            "reinforce" takes returns minus their mean over the batch.
        group_size: responses to a prompt.
        gamma: discount a token.
        gae_lambda: see ``generalized_advantages``.
        kl_weight: nats of divergence from the reference are paid for at this rate, token by token; 0 where the
            divergence is part of the loss instead.
        kl_estimator: of those nats.
        whiten_rewards: divides token rewards by their deviation, leaving their mean.
        whiten_advantages: over all valid tokens.
        missing_eos_penalty: taken off the score of a response that did not end by itself.
        group_scale: see ``group_advantages``.
    """
    mask = experience["response_mask"]
    scores = experience["scores"] - missing_eos_penalty * (~experience["finished"]).to(experience["scores"])
    rewards = torch.zeros_like(experience["log_probs"])
    if kl_weight:
        rewards = -kl_weight * kl_estimate(experience["unfiltered"], experience["reference"], kl_estimator)
    rewards = rewards.where(mask, 0)
    last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(dim=1, keepdim=True)
    totals = scores + rewards.sum(dim=1)
    rewards = rewards.scatter_add(1, last, scores.to(rewards)[:, None])
    if whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)
    if estimator == "gae":
        advantages, returns = generalized_advantages(
            rewards, experience["values"], mask, gamma=gamma, lambda_=gae_lambda
        )
    else:
        returns = discounted_returns(rewards, mask, gamma=gamma)
        if estimator == "reinforce":
            advantages = returns - returns.sum() / mask.sum().clamp(min=1)
        else:
            function = leave_one_out_advantages if estimator == "rloo" else group_advantages
            more = {"scale": group_scale} if estimator == "group" else {}
            advantages = function(totals.float(), group_size=group_size, **more)[:, None].expand_as(rewards)
        advantages = advantages.where(mask, 0)
    if whiten_advantages:
        advantages = whiten(advantages, mask)
    return {**experience, "advantages": advantages, "returns": returns}


def experience_metrics(experience: Experience) -> dict[str, float]:
    """Means over the global batch: reward, divergence, lengths and how well the critic foresaw the returns."""
    mask = experience["response_mask"]
    lengths = mask.sum(dim=1)
    divergence = (experience["unfiltered"] - experience["reference"]).where(mask, 0).sum(dim=1)
    metrics = {
        "reward": experience["scores"].mean(),
        "reward_std": experience["scores"].std(correction=0),
        "kl": divergence.mean(),
        "kl_per_token": divergence.sum() / mask.sum(),
        "response_length": lengths.float().mean(),
        "eos_rate": experience["finished"].float().mean(),
    }
    if "values" in experience:
        residual = (experience["returns"] - experience["values"])[mask]
        spread = experience["returns"][mask].var(correction=0)
        metrics["explained_variance"] = 1 - residual.var(correction=0) / spread if spread > 0 else spread * 0
    return {name: float(value) for name, value in metrics.items()}
