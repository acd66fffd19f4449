"""Comparison of a policy with its reference on held-out prompts: rewards, KL and sample texts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lm_core.checks import check_positive
from palm_rlhf.data.prompts import Prompt
from palm_rlhf.rl.experience import score_rollout
from palm_rlhf.rl.policy import Role
from palm_rlhf.rl.rollouts import Rollout, SamplingSettings, draw_rollout
from palm_rlhf.rl.trainer import RLHFTrainer

SAMPLES = 4
ROLES: tuple[Role, ...] = ("reference", "actor")


@dataclass(frozen=True)
class PolicyEvaluation:
    """Reference and actor on the same prompts, drawn with the same seed.

    Attributes:
        reward_before: mean reward of the reference's responses.
        reward_after: mean reward of the actor's responses.
        kl: KL of actor and reference in nats a response, on the actor's responses.
        before: some of the reference's responses; see ``Rollout.samples``.
        after: the actor's responses to the same prompts.
    """

    reward_before: float
    reward_after: float
    kl: float
    before: list[dict[str, Any]]
    after: list[dict[str, Any]]


def evaluate_policy(
    trainer: RLHFTrainer,
    prompts: Sequence[Prompt],
    sampling: SamplingSettings,
    *,
    seed: int = 0,
    batch_size: int = 64,
) -> PolicyEvaluation:
    """Draws one response of the reference and one of the actor to each prompt, and scores them.

    Args:
        trainer: with a reward.
        prompts: see ``palm_rlhf.data.prompts.load_prompts``.
        sampling: sampling settings; see ``RLHFTrainer.sampling``.
        seed: seed of the draws.
        batch_size: responses at a time.
    """
    check_positive(batch_size, "batch_size")
    policy = trainer.actor_critic
    rewards: dict[Role, list[torch.Tensor]] = {role: [] for role in ROLES}
    kls: list[torch.Tensor] = []
    first: dict[Role, tuple[Rollout, torch.Tensor]] = {}
    for start in range(0, len(prompts), batch_size):
        for role in ROLES:
            rollout = draw_rollout(
                policy,
                prompts[start : start + batch_size],
                sampling,
                tokenizer=trainer.tokenizer,
                generator=torch.Generator(policy.device).manual_seed(seed + start),
                role=role,
            )
            scores = trainer.score(rollout)
            rewards[role].append(scores.cpu())
            first.setdefault(role, (rollout, scores))
        scored = score_rollout(policy, rollout, scores, batch_size=batch_size)
        assert scored.unfiltered is not None
        assert scored.reference is not None
        kl = (scored.unfiltered - scored.reference).where(scored.response_mask, 0)
        kls.append(kl.sum(dim=1).cpu())
    return PolicyEvaluation(
        reward_before=float(torch.cat(rewards["reference"]).mean()),
        reward_after=float(torch.cat(rewards["actor"]).mean()),
        kl=float(torch.cat(kls).mean()),
        before=first["reference"][0].samples(first["reference"][1], SAMPLES),
        after=first["actor"][0].samples(first["actor"][1], SAMPLES),
    )
