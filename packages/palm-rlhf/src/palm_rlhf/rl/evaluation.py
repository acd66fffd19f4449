"""What training has done to a policy: rewards and texts before and after, on prompts it did not learn from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lm_core.checks import check_positive
from palm_rlhf.data.prompts import Prompt
from palm_rlhf.rl.experience import judge
from palm_rlhf.rl.roles import Role
from palm_rlhf.rl.rollouts import Rollout, SamplingSettings, draw_rollout
from palm_rlhf.rl.trainer import PolicyTrainer

SAMPLES = 4
ROLES: tuple[Role, ...] = ("reference", "actor")


@dataclass(frozen=True)
class PolicyEvaluation:
    """Reference and actor on the same prompts, drawn with the same seed.

    Attributes:
        reward_before: mean reward of the reference's responses.
        reward_after: mean reward of the actor's.
        kl: nats a response, actor from reference, on the actor's responses.
        before: some of the reference's responses; see ``Rollout.samples``.
        after: the actor's to the same prompts.
    """

    reward_before: float
    reward_after: float
    kl: float
    before: list[dict[str, Any]]
    after: list[dict[str, Any]]


def evaluate_policy(
    trainer: PolicyTrainer,
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
        sampling: how to draw; see ``RLHFTrainer.sampling``.
        seed: of the draws.
        batch_size: responses at a time.
    """
    check_positive(batch_size, "batch_size")
    policy = trainer.actor_critic
    rewards: dict[Role, list[torch.Tensor]] = {role: [] for role in ROLES}
    divergences: list[torch.Tensor] = []
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
        judged = judge(policy, rollout, scores, batch_size=batch_size)
        divergence = (judged["unfiltered"] - judged["reference"]).where(judged["response_mask"], 0)
        divergences.append(divergence.sum(dim=1).cpu())
    return PolicyEvaluation(
        reward_before=float(torch.cat(rewards["reference"]).mean()),
        reward_after=float(torch.cat(rewards["actor"]).mean()),
        kl=float(torch.cat(divergences).mean()),
        before=first["reference"][0].samples(first["reference"][1], SAMPLES),
        after=first["actor"][0].samples(first["actor"][1], SAMPLES),
    )
