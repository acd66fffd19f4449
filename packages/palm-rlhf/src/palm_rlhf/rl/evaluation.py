"""Comparison of a policy with its reference on held-out prompts: rewards, KL and sample texts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lm_core.checks import check_positive
from lm_core.data.epochs import seed_of
from palm_rlhf.data.prompts import Prompt
from palm_rlhf.rl.experience import Experience, concatenated, experience_metrics, score_rollout
from palm_rlhf.rl.policy import Role
from palm_rlhf.rl.rollouts import SamplingSettings, draw_rollout
from palm_rlhf.rl.trainer import RLHFTrainer

SAMPLES = 4
ROLES: tuple[Role, ...] = ("reference", "actor")


@dataclass(frozen=True)
class PolicyEvaluation:
    """Reference and actor on the same prompts, drawn with the same seed.

    Attributes:
        reward_before: mean reward of the reference's responses.
        reward_after: mean reward of the actor's responses.
        kl: KL of actor and reference on the actor's responses, in nats per response.
        before: sample responses of the reference; see ``Rollout.samples``.
        after: the actor's responses to the same prompts.
    """

    reward_before: float
    reward_after: float
    kl: float
    before: list[dict[str, Any]]
    after: list[dict[str, Any]]


def evaluate_policy(
    trainer: RLHFTrainer, prompts: Sequence[Prompt], sampling: SamplingSettings, *, seed: int = 0, batch_size: int = 64
) -> PolicyEvaluation:
    """Draws and scores one response of the reference and one of the actor to each prompt."""
    check_positive(batch_size, "batch_size")
    policy = trainer.actor_critic
    experiences: dict[Role, list[Experience]] = {role: [] for role in ROLES}
    samples: dict[Role, list[dict[str, Any]]] = {}
    for role in ROLES:
        trainer.update_engine(role)
        for start in range(0, len(prompts), batch_size):
            rollout = draw_rollout(
                policy,
                prompts[start : start + batch_size],
                sampling,
                tokenizer=trainer.tokenizer,
                generator=[
                    torch.Generator(policy.device).manual_seed(seed_of(seed, start + row))
                    for row in range(len(prompts[start : start + batch_size]))
                ],
                role=role,
                engine=trainer.engine,
            )
            rewards = trainer.score(rollout)
            experience = Experience.from_rollout(rollout, rewards)
            if role == "actor":
                experience = score_rollout(policy, rollout, rewards, batch_size=batch_size)
            experiences[role].append(experience.to("cpu"))
            samples.setdefault(role, rollout.samples(rewards, SAMPLES))
    before, after = (experience_metrics(concatenated(experiences[role], pad_id=sampling.pad_id)) for role in ROLES)
    return PolicyEvaluation(before["reward"], after["reward"], after["kl"], samples["reference"], samples["actor"])
