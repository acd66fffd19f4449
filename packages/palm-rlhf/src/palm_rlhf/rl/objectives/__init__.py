"""Objectives by name. A new objective is a module in this folder, one line here and one row in the README."""

from palm_rlhf.rl.objectives.base import Objective, TokenLoss
from palm_rlhf.rl.objectives.cispo import CISPO
from palm_rlhf.rl.objectives.flowrl import FlowRL
from palm_rlhf.rl.objectives.grpo import GRPO
from palm_rlhf.rl.objectives.gspo import GSPO
from palm_rlhf.rl.objectives.ppo import PPO
from palm_rlhf.rl.objectives.reinforce import REINFORCE
from palm_rlhf.rl.objectives.reinforce_plus_plus import ReinforcePlusPlus
from palm_rlhf.rl.objectives.rloo import RLOO
from palm_rlhf.rl.objectives.spo import SPO
from palm_rlhf.rl.objectives.tpo import TPO

OBJECTIVES: dict[str, type[Objective]] = {
    "ppo": PPO,
    "grpo": GRPO,
    "rloo": RLOO,
    "reinforce": REINFORCE,
    "reinforce++": ReinforcePlusPlus,
    "gspo": GSPO,
    "cispo": CISPO,
    "tpo": TPO,
    "flowrl": FlowRL,
    "spo": SPO,
}

__all__ = [
    "CISPO",
    "GRPO",
    "GSPO",
    "OBJECTIVES",
    "PPO",
    "REINFORCE",
    "RLOO",
    "SPO",
    "TPO",
    "FlowRL",
    "Objective",
    "ReinforcePlusPlus",
    "TokenLoss",
]
