"""Objectives by name. A new objective is a module in this folder, one line here and one row in the README."""

from palm_rlhf.rl.objectives.base import Objective, TokenLoss
from palm_rlhf.rl.objectives.grpo import GRPO
from palm_rlhf.rl.objectives.ppo import PPO
from palm_rlhf.rl.objectives.reinforce import REINFORCE
from palm_rlhf.rl.objectives.rloo import RLOO

OBJECTIVES: dict[str, type[Objective]] = {
    "ppo": PPO,
    "grpo": GRPO,
    "rloo": RLOO,
    "reinforce": REINFORCE,
}

__all__ = ["GRPO", "OBJECTIVES", "PPO", "REINFORCE", "RLOO", "Objective", "TokenLoss"]
