"""calm_pytorch: compose frozen language models through learned cross-attention (CALM, arXiv 2401.02412)."""

from calm_pytorch.model.alignment import align_by_offsets
from calm_pytorch.model.augment import AugmentParams
from calm_pytorch.model.blocks import (
    freeze_all_layers_,
    hugging_face_blocks,
    set_module_requires_grad_,
    x_transformer_blocks,
)
from calm_pytorch.model.calm import CALM
from calm_pytorch.model.composed_lm import AugmentStates, ComposedLM
from calm_pytorch.model.connections import plan_connections
from calm_pytorch.model.cross_attention import CrossAttentionBlock
from calm_pytorch.model.hooks import ExtractHiddensWrapper
from calm_pytorch.training.evaluation import Evaluation, evaluate
from calm_pytorch.training.settings import FineTunerSettings
from calm_pytorch.training.trainer import FineTuner

__all__ = [
    "CALM",
    "AugmentParams",
    "AugmentStates",
    "ComposedLM",
    "CrossAttentionBlock",
    "Evaluation",
    "ExtractHiddensWrapper",
    "FineTuner",
    "FineTunerSettings",
    "align_by_offsets",
    "evaluate",
    "freeze_all_layers_",
    "hugging_face_blocks",
    "plan_connections",
    "set_module_requires_grad_",
    "x_transformer_blocks",
]

__version__ = "1.0.0"
