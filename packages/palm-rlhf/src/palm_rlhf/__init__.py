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

from palm_rlhf.lora import LoRA
from palm_rlhf.palm import PaLM, PaLMCache
from palm_rlhf.scopes import MergedScope

__all__ = ["LoRA", "MergedScope", "PaLM", "PaLMCache"]

__version__ = "0.1.0"
