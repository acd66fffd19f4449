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
    from palm_rlhf.trainer import PretrainTrainer, TrainingResult
    from palm_rlhf.training_settings import TrainingSettings

__all__ = ["LoRA", "MergedScope", "PaLM", "PaLMCache", "PretrainTrainer", "TrainingResult", "TrainingSettings"]

__version__ = "0.1.0"

# Trainers are imported when they are asked for: a model is usable without them, and sooner.
_LATER = {
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
