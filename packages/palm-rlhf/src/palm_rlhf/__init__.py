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

from typing import TYPE_CHECKING, Any

from palm_rlhf.lora import LoRA
from palm_rlhf.palm import PaLM, PaLMCache
from palm_rlhf.scopes import MergedScope

if TYPE_CHECKING:
    from palm_rlhf.actor_critic import ActorCritic
    from palm_rlhf.grpo import GRPOTrainer
    from palm_rlhf.policy_trainer import PolicyResult
    from palm_rlhf.ppo import RLHFTrainer
    from palm_rlhf.preferences import Preference, load_preferences
    from palm_rlhf.prompts import load_prompts
    from palm_rlhf.reward_model import RewardModel
    from palm_rlhf.reward_trainer import RewardModelTrainer, RewardResult
    from palm_rlhf.rewards import ClassifierReward
    from palm_rlhf.rollouts import Rollout, SamplingSettings, rollout_of
    from palm_rlhf.trainer import PretrainTrainer, TrainingResult
    from palm_rlhf.training_settings import TrainingSettings

__all__ = [
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
    "RLHFTrainer",
    "RewardModel",
    "RewardModelTrainer",
    "RewardResult",
    "Rollout",
    "SamplingSettings",
    "TrainingResult",
    "TrainingSettings",
    "load_preferences",
    "load_prompts",
    "rollout_of",
]

__version__ = "0.1.0"

# Trainers are imported when they are asked for: a model is usable without them, and sooner.
_LATER = {
    "ActorCritic": "palm_rlhf.actor_critic",
    "ClassifierReward": "palm_rlhf.rewards",
    "GRPOTrainer": "palm_rlhf.grpo",
    "PolicyResult": "palm_rlhf.policy_trainer",
    "Preference": "palm_rlhf.preferences",
    "RLHFTrainer": "palm_rlhf.ppo",
    "RewardModel": "palm_rlhf.reward_model",
    "RewardModelTrainer": "palm_rlhf.reward_trainer",
    "RewardResult": "palm_rlhf.reward_trainer",
    "Rollout": "palm_rlhf.rollouts",
    "SamplingSettings": "palm_rlhf.rollouts",
    "load_preferences": "palm_rlhf.preferences",
    "load_prompts": "palm_rlhf.prompts",
    "rollout_of": "palm_rlhf.rollouts",
    "PretrainTrainer": "palm_rlhf.trainer",
    "TrainingResult": "palm_rlhf.trainer",
    "TrainingSettings": "palm_rlhf.training_settings",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LATER[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
