"""What a policy learns from: rollouts of all processes with their scores, log-probabilities, values and advantages.

Every process holds the whole of it and works on its share of each minibatch, so an update is the same however many
processes there are. Responses are short beside activations: this costs little.

Legend: b batch (of all processes), n sequence, m = n - 1.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lm_core.distributed import world_size
from lm_core.generation.decoding import eval_mode
from palm_rlhf.rl.advantages import (
    discounted_returns,
    generalized_advantages,
    group_advantages,
    leave_one_out_advantages,
    whiten,
)
from palm_rlhf.rl.kl import KLEstimator, kl_estimate
from palm_rlhf.rl.policy import ActorCritic
from palm_rlhf.rl.rollouts import Rollout

Experience = dict[str, Tensor]
T = TypeVar("T")
AdvantageEstimator = Literal["gae", "group", "rloo", "reinforce"]


def experience_of(rollout: Rollout, scores: Tensor) -> Experience:
    """A rollout and its scores, before anything is said of them."""
    experience = {
        "ids": rollout.ids,
        "mask": rollout.mask,
        "response_mask": rollout.response_mask,
        "finished": rollout.finished,
        "scores": scores.to(rollout.ids.device),
    }
    return experience if rollout.kept is None else {**experience, "kept": rollout.kept}


Judgements = Iterable[tuple[Tensor, Experience]]  # rows of an experience, and what was said of them


@torch.no_grad()
def judgements(policy: ActorCritic, parts: Judgements, *, temperature: float) -> list[tuple[Tensor, Experience]]:
    """What actor, critic and reference say of parts of an experience; the rows go along.

    Log-probabilities are those of a training forward, so that the ratio is 1 before the first update.
    """
    found = []
    with eval_mode(policy):
        for rows, part in parts:
            given = (part["ids"], part["mask"], part["response_mask"])
            judgement = policy(*given, temperature=temperature, kept=part.get("kept"))
            reference = policy.score(*given, role="reference", temperature=temperature)
            own = judgement.scores
            said = {"log_probs": own.log_probs, "unfiltered": own.unfiltered, "reference": reference.unfiltered}
            if judgement.values is not None:
                said["values"] = judgement.values
            found.append((rows, said))
    return found


def with_judgements(experience: Experience, found: Judgements) -> Experience:
    """The experience with what was said of its rows; 0 outside responses."""
    whole = dict(experience)
    device = experience["ids"].device
    for rows, said in found:
        for name, value in said.items():
            if name not in whole:
                whole[name] = value.new_zeros(experience["response_mask"].shape, device=device)
            whole[name][rows.to(device), : value.shape[1]] = value.to(device)
    return whole


def judge(policy: ActorCritic, rollout: Rollout, scores: Tensor, *, batch_size: int) -> Experience:
    """A rollout of this process alone with its judgements, on the policy's device."""
    experience = experience_of(rollout.to(policy.device), scores)
    parts = [
        (rows, {name: value[rows] for name, value in experience.items()})
        for rows in torch.arange(len(rollout), device=policy.device).split(batch_size)
    ]
    return with_judgements(experience, judgements(policy, parts, temperature=rollout.temperature))


def judged_by_all(
    policy: ActorCritic, experience: Experience, batches: Iterable[Tensor], *, temperature: float
) -> Experience:
    """The experience of all processes with judgements, to which each process gives those of its own ``batches``.

    Where these are the very batches of rows that are learned from first, the ratio is EXACTLY 1 before an update:
    products of another height or width would add up in another order, which float32 shows in the sixth digit.
    """
    device = experience["ids"].device
    parts = ((rows, rows_of(experience, rows)) for rows in (batch.to(device) for batch in batches))
    found = judgements(policy, parts, temperature=temperature)
    if world_size() > 1:
        on_host = [(rows.cpu(), {name: value.cpu() for name, value in said.items()}) for rows, said in found]
        found = _of_all_processes(on_host)
    return with_judgements(experience, found)


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
    parts = _of_all_processes([{name: value.cpu() for name, value in experience.items()}])
    return {name: value.to(device) for name, value in joined(parts, pad_id=pad_id).items()}


def rows_of(experience: Experience, rows: Tensor) -> Experience:
    """Some rows, no wider than they need."""
    chosen = {name: value[rows] for name, value in experience.items() if value.ndim > 0}
    width = max(int(chosen["mask"].sum(dim=1).max()), 2)
    for name, value in chosen.items():
        if value.ndim > 1:
            chosen[name] = value[:, : width if name in ("ids", "mask") else width - 1]
    return chosen


def _of_all_processes(own: list[T]) -> list[T]:
    """The lists of all processes one behind the other, in the order of ranks; every process gets them."""
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, own)
    return [one for part in parts for one in part]


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
