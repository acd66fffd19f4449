"""Experience: the rollouts of all processes with scores, log-probs, values and advantages, ready to learn from.

Every process holds the whole of it and works on its share of each minibatch, so an update is the same for any number
of processes. Responses are small compared with activations, so this costs little.

Legend: b batch (of all processes), n sequence, m = n - 1, k bytes of a packed kept set.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lm_core.causal_lm import eval_mode
from lm_core.distributed import world_size
from palm_rlhf.data.rollouts import Rollout
from palm_rlhf.rl.policy import ActorCritic

T = TypeVar("T")
Scored = Literal["log_probs", "values", "reference"]


@dataclass(frozen=True, kw_only=True)
class Experience(Rollout):
    """A rollout and everything an update needs of it. Per-token fields are 0 outside responses.

    Attributes:
        scores: reward of each response.
        log_probs: log-probs of the policy that drew the tokens, under the distribution that was sampled; None where
            every response is learned from once, by that same policy.
        unfiltered: the same under the distribution before filters.
        reference: unfiltered log-probs of the reference; None without a KL weight.
        values: expected return before each token; None without a critic.
        token_rewards: reward of each token: KL penalty, and the score at the last one.
        advantages: advantage of each token.
        returns: targets of the values; None without a critic.
    """

    scores: Float[Tensor, " b"]
    log_probs: Float[Tensor, "b m"] | None = None
    unfiltered: Float[Tensor, "b m"] | None = None
    reference: Float[Tensor, "b m"] | None = None
    values: Float[Tensor, "b m"] | None = None
    token_rewards: Float[Tensor, "b m"] | None = None
    advantages: Float[Tensor, "b m"] | None = None
    returns: Float[Tensor, "b m"] | None = None

    @classmethod
    def from_rollout(cls, rollout: Rollout, scores: Tensor) -> "Experience":
        """A rollout with its scores, not yet scored by the policy."""
        texts: dict[str, Any] = {"texts": None, "prompt_texts": None, "columns": []}
        return cls(**{**vars(rollout), **texts}, scores=scores.to(rollout.ids.device))

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Experience":
        """The experience that ``state_dict`` stored."""
        state = dict(state)
        if "mask" in state:  # stored in place of the lengths before rollouts and experience were one
            state["lengths"] = state.pop("mask").sum(dim=1)
            state["prompt_lengths"] = state.pop("response_mask").int().argmax(dim=1) + 1
        return cls(**state)

    def rows(self, rows: Int[Tensor, " r"]) -> "Experience":
        """Some rows, without columns that are padding in all of them."""
        chosen: dict[str, Any] = {name: value[rows] for name, value in self.tensors().items()}
        width = max(int(chosen["lengths"].max()), 2)
        for name, value in chosen.items():
            if value.ndim > 1:
                chosen[name] = value[:, : width if name == "ids" else width - 1]
        return replace(self, **chosen)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and temperature, for a checkpoint."""
        return {**self.tensors(), "temperature": self.temperature}


def concatenated(parts: Sequence[Experience], *, pad_id: int) -> Experience:
    """Experiences of different widths as one, in their order."""
    width = max(part.ids.shape[1] for part in parts)
    padded: dict[str, list[Tensor]] = {}
    for part in parts:
        missing = width - part.ids.shape[1]
        for name, value in part.tensors().items():
            if value.ndim == 2:
                value = F.pad(value, (0, missing), value=pad_id if name == "ids" else 0)
            elif value.ndim == 3:
                value = F.pad(value, (0, 0, 0, missing), value=255)
            padded.setdefault(name, []).append(value)
    whole: dict[str, Any] = {name: torch.cat(values) for name, values in padded.items()}
    return replace(parts[0], **whole)


def gathered(experience: Experience, *, pad_id: int) -> Experience:
    """The experience of all processes in the order of ranks, on every process."""
    if world_size() == 1:
        return experience
    return concatenated(all_gathered([experience.to("cpu")]), pad_id=pad_id).to(experience.ids.device)


def score_experience(
    policy: ActorCritic, experience: Experience, batches: Iterable[Tensor], *, wanted: Collection[Scored]
) -> Experience:
    """The experience of all processes with log-probs, values and reference log-probs of its rows.

    Each process scores its own ``batches`` of rows. Where these are the batches that are learned from first, the ratio
    is EXACTLY 1 before an update: products of another height or width round differently, which float32 shows in the
    sixth digit.
    """
    device = experience.ids.device
    parts = [(rows, _scores(policy, experience.rows(rows), wanted)) for rows in (batch.to(device) for batch in batches)]
    if world_size() > 1:
        parts = all_gathered([(rows.cpu(), {name: t.cpu() for name, t in scores.items()}) for rows, scores in parts])
    return _with_scores(experience, parts)


def score_rollout(policy: ActorCritic, rollout: Rollout, scores: Tensor, *, batch_size: int) -> Experience:
    """A rollout of this process alone, scored by actor, critic and reference."""
    experience = Experience.from_rollout(rollout.to(policy.device), scores)
    wanted: set[Scored] = {"log_probs", "reference"} if policy.value_head is None else set(get_args(Scored))
    parts = []
    for rows in torch.arange(len(rollout), device=policy.device).split(batch_size):
        # columns of padding stay: a product of another width would round differently
        part: dict[str, Any] = {name: t[rows] for name, t in experience.tensors().items()}
        parts.append((rows, _scores(policy, replace(experience, **part), wanted)))
    return _with_scores(experience, parts)


def _with_scores(experience: Experience, parts: Iterable[tuple[Tensor, dict[str, Tensor]]]) -> Experience:
    """The experience with scores that were computed for some rows at a time."""
    device = experience.ids.device
    whole: dict[str, Any] = {}
    for rows, scores in parts:
        for name, value in scores.items():
            if name not in whole:
                whole[name] = value.new_zeros(experience.response_mask.shape, device=device)
            whole[name][rows.to(device), : value.shape[1]] = value.to(device)
    return replace(experience, **whole)


@torch.no_grad()
def _scores(policy: ActorCritic, part: Experience, wanted: Collection[Scored]) -> dict[str, Tensor]:
    """Log-probs and values by training forwards, so that the ratio is 1 before the first update."""
    inputs = (part.ids, part.mask, part.response_mask)
    found: dict[str, Tensor] = {}
    with eval_mode(policy):
        if "log_probs" in wanted:
            actor = policy.score(*inputs, temperature=part.temperature, kept=part.kept)
            found |= {"log_probs": actor.log_probs, "unfiltered": actor.unfiltered}
        if "values" in wanted:
            found["values"] = policy.values(policy.value_logits(*inputs)).where(part.response_mask, 0)
        if "reference" in wanted:
            found["reference"] = policy.score(*inputs, role="reference", temperature=part.temperature).unfiltered
    return found


def token_rewards(
    experience: Experience, kl: Float[Tensor, "b m"] | None, *, kl_weight: float, missing_eos_penalty: float
) -> Float[Tensor, "b m"]:
    """Rewards of each token: minus the weighted KL (None where it is no part of them), and the score at the last one.

    ``missing_eos_penalty`` is taken off the score of a response that did not end by itself.
    """
    mask = experience.response_mask
    scores = experience.scores - missing_eos_penalty * (~experience.finished).to(experience.scores)
    rewards = scores.new_zeros(mask.shape) if kl is None else (-kl_weight * kl).where(mask, 0)
    last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(dim=1, keepdim=True)
    return rewards.scatter_add(1, last, scores.to(rewards)[:, None])


def experience_metrics(experience: Experience) -> dict[str, float]:
    """Means over the global batch: reward, KL, lengths and how much of the returns the critic explains."""
    mask = experience.response_mask
    metrics = {
        "reward": experience.scores.mean(),
        "reward_std": experience.scores.std(correction=0),
        "response_length": mask.sum(dim=1).float().mean(),
        "eos_rate": experience.finished.float().mean(),
    }
    if experience.unfiltered is not None and experience.reference is not None:
        kl = (experience.unfiltered - experience.reference).where(mask, 0).sum(dim=1)
        metrics |= {"kl": kl.mean(), "kl_per_token": kl.sum() / mask.sum()}
    if experience.values is not None and experience.returns is not None:
        residual = (experience.returns - experience.values)[mask]
        spread = experience.returns[mask].var(correction=0)
        metrics["explained_variance"] = 1 - residual.var(correction=0) / spread if spread > 0 else spread * 0
    return {name: float(value) for name, value in metrics.items()}


def all_gathered(local: list[T]) -> list[T]:
    """The lists of all processes, concatenated in the order of ranks, on every process."""
    if world_size() == 1:
        return local
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, local)
    return [entry for part in parts for entry in part]
