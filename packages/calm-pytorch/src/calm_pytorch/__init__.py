"""calm_pytorch: compose frozen language models through learned cross-attention (CALM, arXiv 2401.02412)."""

from calm_pytorch.alignment import align_by_offsets
from calm_pytorch.augment import AugmentParams
from calm_pytorch.blocks import (
    freeze_all_layers_,
    hugging_face_blocks,
    set_module_requires_grad_,
    x_transformer_blocks,
)
from calm_pytorch.calm import CALM
from calm_pytorch.composed_lm import AugmentStates, ComposedLM
from calm_pytorch.cross_attention import CrossAttentionBlock
from calm_pytorch.finetuner import FineTuner
from calm_pytorch.hidden_states import ExtractHiddensWrapper
from calm_pytorch.planner import plan_connections

__all__ = [
    "CALM",
    "AugmentParams",
    "AugmentStates",
    "ComposedLM",
    "CrossAttentionBlock",
    "ExtractHiddensWrapper",
    "FineTuner",
    "align_by_offsets",
    "freeze_all_layers_",
    "hugging_face_blocks",
    "plan_connections",
    "set_module_requires_grad_",
    "x_transformer_blocks",
]

__version__ = "1.0.0"
