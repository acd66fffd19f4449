"""Experience: the rollouts of all processes with scores, log-probs, values and advantages.

Every process stores all of it and computes its share of each minibatch, so an update is the same for any number of
processes. Responses are small compared with activations, so this costs little.

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
    """A rollout with the inputs of its updates. Per-token fields are 0 outside responses.

    Attributes:
        scores: reward of each response, which is the sum of its token rewards if there are any.
        token_scores: rewards of tokens, for rewards that return them.
        log_probs: log-probs under the policy that drew the tokens, with its temperature and filters; None where the
            only update is made by that same policy.
        unfiltered: log-probs under the distribution before filters.
        reference: unfiltered log-probs of the reference; None without a KL weight.
        importance: importance weights of responses that another engine sampled; None for the policy's own.
        prompt_features: mean state of the reference over each prompt; None without a network that reads it.
        values: expected return before each token; None without a critic.
        token_rewards: reward of each token: KL penalty, plus the score at the last token.
        advantages: advantage of each token.
        returns: targets of the values; None without a critic.
    """

    scores: Float[Tensor, " b"]
    token_scores: Float[Tensor, "b m"] | None = None
    log_probs: Float[Tensor, "b m"] | None = None
    unfiltered: Float[Tensor, "b m"] | None = None
    reference: Float[Tensor, "b m"] | None = None
    importance: Float[Tensor, "b m"] | None = None
    prompt_features: Float[Tensor, "b 1 d"] | None = None
    values: Float[Tensor, "b m"] | None = None
    token_rewards: Float[Tensor, "b m"] | None = None
    advantages: Float[Tensor, "b m"] | None = None
    returns: Float[Tensor, "b m"] | None = None

    @classmethod
    def from_rollout(cls, rollout: Rollout, scores: Tensor) -> "Experience":
        """Experience of a rollout and its rewards ``(b,)`` or ``(b, n)``, without log-probs and values."""
        texts: dict[str, Any] = {"texts": None, "prompt_texts": None, "messages": None, "columns": []}
        scores = scores.to(rollout.ids.device)
        tokens = None
        if scores.ndim == 2:
            tokens = scores[:, 1:].where(rollout.response_mask, 0)
            scores = rollout.totals(scores)
        return cls(**{**vars(rollout), **texts}, scores=scores, token_scores=tokens)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Experience":
        """Experience from its ``state_dict``."""
        state = dict(state)
        if "mask" in state:  # earlier checkpoints stored masks in place of lengths
            state["lengths"] = state.pop("mask").sum(dim=1)
            state["prompt_lengths"] = state.pop("response_mask").int().argmax(dim=1) + 1
        return cls(**state)

    def rows(self, rows: Int[Tensor, " r"]) -> "Experience":
        """A selection of rows, without columns that are padding in all of them."""
        chosen: dict[str, Any] = {name: value[rows] for name, value in self.tensors().items()}
        width = max(int(chosen["lengths"].max()), 2)
        for name, value in chosen.items():
            if value.ndim > 1:
                chosen[name] = value[:, : width if name == "ids" else width - 1]
        return replace(self, **chosen)

    def sampled_by(self) -> dict[str, Any]:
        """Sampling of the responses, as arguments of ``ActorCritic.score``."""
        return {"temperature": self.temperature, "kept": self.kept, "repetition_penalty": self.repetition_penalty}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and sampling settings, for a checkpoint."""
        return {**self.tensors(), "temperature": self.temperature, "repetition_penalty": self.repetition_penalty}


def concatenated(parts: Sequence[Experience], *, pad_id: int) -> Experience:
    """Experiences of different widths concatenated in their order."""
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

    Each process scores its own ``batches`` of rows. If these are the micro-batches of the first pass, the ratio is
    EXACTLY 1 before an update: products of other shapes round differently, visible in float32 in the sixth digit.
    """
    device = experience.ids.device
    parts = [(rows, _scores(policy, experience.rows(rows), wanted)) for rows in (batch.to(device) for batch in batches)]
    if world_size() > 1:
        parts = all_gathered([(rows.cpu(), {name: t.cpu() for name, t in scores.items()}) for rows, scores in parts])
    return _with_scores(experience, parts)


def score_rollout(policy: ActorCritic, rollout: Rollout, scores: Tensor, *, batch_size: int) -> Experience:
    """Experience of a rollout of this process, with log-probs, values and reference log-probs."""
    experience = Experience.from_rollout(rollout.to(policy.device), scores)
    wanted: set[Scored] = {"log_probs", "reference"} if policy.value_head is None else set(get_args(Scored))
    parts = []
    for rows in torch.arange(len(rollout), device=policy.device).split(batch_size):
        # keeps columns of padding: products of another width would round differently
        part: dict[str, Any] = {name: t[rows] for name, t in experience.tensors().items()}
        parts.append((rows, _scores(policy, replace(experience, **part), wanted)))
    return _with_scores(experience, parts)


def _with_scores(experience: Experience, parts: Iterable[tuple[Tensor, dict[str, Tensor]]]) -> Experience:
    """The experience with outputs that were computed in batches of rows."""
    device = experience.ids.device
    whole: dict[str, Any] = {}
    for rows, scores in parts:
        for name, value in scores.items():
            if name not in whole:
                whole[name] = value.new_zeros(experience.response_mask.shape, device=device)
            whole[name][rows.to(device), : value.shape[1]] = value.to(device)
    return replace(experience, **whole)


@torch.no_grad()
def prompt_features(policy: ActorCritic, experience: Experience, *, batch_size: int) -> Float[Tensor, "b 1 d"]:
    """Mean state of the reference over each prompt."""
    width = int(experience.prompt_lengths.max())
    ids, lengths = experience.ids[:, :width], experience.prompt_lengths
    with eval_mode(policy):
        parts = [
            policy.prompt_features(*part) for part in zip(ids.split(batch_size), lengths.split(batch_size), strict=True)
        ]
    return torch.cat(parts)[:, None]


@torch.no_grad()
def _scores(policy: ActorCritic, part: Experience, wanted: Collection[Scored]) -> dict[str, Tensor]:
    """Log-probs and values by the forward of training, so that the ratio is 1 before the first update."""
    inputs = (part.ids, part.mask, part.response_mask)
    outputs: dict[str, Tensor] = {}
    with eval_mode(policy):
        if "log_probs" in wanted:
            actor = policy.score(*inputs, **part.sampled_by())
            outputs |= {"log_probs": actor.log_probs, "unfiltered": actor.unfiltered}
        if "values" in wanted:
            outputs["values"] = policy.values(policy.value_logits(*inputs)).where(part.response_mask, 0)
        if "reference" in wanted:
            outputs["reference"] = policy.score(*inputs, role="reference", temperature=part.temperature).unfiltered
    return outputs


def token_rewards(
    experience: Experience, kl: Float[Tensor, "b m"] | None, *, kl_weight: float, missing_eos_penalty: float
) -> Float[Tensor, "b m"]:
    """Reward of each token: minus the weighted KL (None for no KL), plus the score at the last token of a response.

    Scores of tokens stay where they are. ``missing_eos_penalty`` is subtracted at the last token of a response without
    EOS or stop string.
    """
    mask = experience.response_mask
    scores = experience.scores if experience.token_scores is None else torch.zeros_like(experience.scores)
    scores = scores - missing_eos_penalty * (~experience.finished).to(experience.scores)
    rewards = scores.new_zeros(mask.shape) if kl is None else (-kl_weight * kl).where(mask, 0)
    if experience.token_scores is not None:
        rewards = rewards + experience.token_scores.to(rewards)
    last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(dim=1, keepdim=True)
    return rewards.scatter_add(1, last, scores.to(rewards)[:, None])


def experience_metrics(experience: Experience) -> dict[str, float]:
    """Means over the global batch: reward, KL, lengths and the critic's explained variance."""
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
