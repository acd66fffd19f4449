"""palm_rlhf: PaLM language models and reinforcement learning from human feedback.

>>> import torch
>>> from palm_rlhf import PaLM
>>> palm = PaLM(num_tokens=256, dim=64, depth=2)
>>> ids = torch.randint(0, 256, (1, 128))
>>> loss = palm(ids, return_loss=True)
>>> loss.backward()
>>> palm.generate(160, prompt=ids).shape
torch.Size([1, 32])
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lm_core.checkpoints.weights import register_layouts
from palm_rlhf.model.cache import PaLMCache
from palm_rlhf.model.lora import LoRA, MergedScope
from palm_rlhf.model.palm import PaLM

if TYPE_CHECKING:
    from palm_rlhf.data.preferences import Preference, load_preferences
    from palm_rlhf.data.prompts import load_prompts
    from palm_rlhf.data.rollouts import Rollout, rollout_of
    from palm_rlhf.pretrain.config import TrainingSettings
    from palm_rlhf.pretrain.trainer import PretrainTrainer, TrainingResult
    from palm_rlhf.reward.model import RewardModel
    from palm_rlhf.reward.rewards import ClassifierReward
    from palm_rlhf.reward.trainer import RewardModelTrainer, RewardResult, RewardSettings
    from palm_rlhf.rl.config import RLConfig
    from palm_rlhf.rl.objectives import GRPO, PPO, REINFORCE, RLOO
    from palm_rlhf.rl.policy import ActorCritic
    from palm_rlhf.rl.rollouts import SamplingSettings
    from palm_rlhf.rl.trainer import GRPOTrainer, PolicyResult, RLHFTrainer

__all__ = [
    "GRPO",
    "PPO",
    "REINFORCE",
    "RLOO",
    "ActorCritic",
    "ClassifierReward",
    "GRPOTrainer",
    "LoRA",
    "MergedScope",
    "PaLM",
    "PaLMCache",
    "PolicyResult",
    "Preference",
    "PretrainTrainer",
    "RLConfig",
    "RLHFTrainer",
    "RewardModel",
    "RewardModelTrainer",
    "RewardResult",
    "RewardSettings",
    "Rollout",
    "SamplingSettings",
    "TrainingResult",
    "TrainingSettings",
    "load_preferences",
    "load_prompts",
    "rollout_of",
]

__version__ = "0.1.0"

# Trainers are imported on first use, so that importing a model stays fast.
_LATER = {
    "palm_rlhf.data.preferences": ("Preference", "load_preferences"),
    "palm_rlhf.data.prompts": ("load_prompts",),
    "palm_rlhf.data.rollouts": ("Rollout", "rollout_of"),
    "palm_rlhf.pretrain.config": ("TrainingSettings",),
    "palm_rlhf.pretrain.trainer": ("PretrainTrainer", "TrainingResult"),
    "palm_rlhf.reward.model": ("RewardModel",),
    "palm_rlhf.reward.rewards": ("ClassifierReward",),
    "palm_rlhf.reward.trainer": ("RewardModelTrainer", "RewardResult", "RewardSettings"),
    "palm_rlhf.rl.config": ("RLConfig",),
    "palm_rlhf.rl.objectives": ("GRPO", "PPO", "REINFORCE", "RLOO"),
    "palm_rlhf.rl.policy": ("ActorCritic",),
    "palm_rlhf.rl.rollouts": ("SamplingSettings",),
    "palm_rlhf.rl.trainer": ("GRPOTrainer", "PolicyResult", "RLHFTrainer"),
}


# the conversion is imported when a file is loaded
register_layouts(PaLM, lambda *arguments: import_module("palm_rlhf.interop.weight_files").palm_layout(*arguments))


def __getattr__(name: str) -> Any:
    for module, names in _LATER.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
