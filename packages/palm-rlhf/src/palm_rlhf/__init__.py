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

from torch import Tensor

from lm_core.checkpoints.weights import register_layouts
from palm_rlhf.model.cache import PaLMCache
from palm_rlhf.model.lora import LoRA, MergedScope
from palm_rlhf.model.palm import PaLM

if TYPE_CHECKING:
    from palm_rlhf.data.preferences import Preference, load_preferences
    from palm_rlhf.data.prompts import load_prompts
    from palm_rlhf.pretrain.config import TrainingSettings
    from palm_rlhf.pretrain.trainer import PretrainTrainer, TrainingResult
    from palm_rlhf.reward.model import RewardModel
    from palm_rlhf.reward.rewards import ClassifierReward
    from palm_rlhf.reward.trainer import RewardModelTrainer, RewardResult
    from palm_rlhf.rl.config import RLConfig
    from palm_rlhf.rl.objectives import GRPO, PPO, REINFORCE, RLOO
    from palm_rlhf.rl.policy import ActorCritic
    from palm_rlhf.rl.rollouts import Rollout, SamplingSettings, rollout_of
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
    "ActorCritic": "palm_rlhf.rl.policy",
    "ClassifierReward": "palm_rlhf.reward.rewards",
    "GRPO": "palm_rlhf.rl.objectives",
    "GRPOTrainer": "palm_rlhf.rl.trainer",
    "PolicyResult": "palm_rlhf.rl.trainer",
    "PPO": "palm_rlhf.rl.objectives",
    "Preference": "palm_rlhf.data.preferences",
    "REINFORCE": "palm_rlhf.rl.objectives",
    "RLConfig": "palm_rlhf.rl.config",
    "RLOO": "palm_rlhf.rl.objectives",
    "RLHFTrainer": "palm_rlhf.rl.trainer",
    "RewardModel": "palm_rlhf.reward.model",
    "RewardModelTrainer": "palm_rlhf.reward.trainer",
    "RewardResult": "palm_rlhf.reward.trainer",
    "Rollout": "palm_rlhf.rl.rollouts",
    "SamplingSettings": "palm_rlhf.rl.rollouts",
    "load_preferences": "palm_rlhf.data.preferences",
    "load_prompts": "palm_rlhf.data.prompts",
    "rollout_of": "palm_rlhf.rl.rollouts",
    "PretrainTrainer": "palm_rlhf.pretrain.trainer",
    "TrainingResult": "palm_rlhf.pretrain.trainer",
    "TrainingSettings": "palm_rlhf.pretrain.config",
}


def _palm_layout(palm: PaLM, state: "dict[str, Tensor]") -> "dict[str, Tensor]":
    from palm_rlhf.interop.weight_files import palm_layout

    return palm_layout(palm, state)


register_layouts(PaLM, _palm_layout)


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LATER[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
