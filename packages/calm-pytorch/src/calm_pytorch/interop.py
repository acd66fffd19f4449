"""Weights of the original implementation (CALM-Pytorch up to 0.2.2) in this one.

The original saved the cross-attentions alone, as ``0.1.attn.to_q.weight`` (augment 0, connection 1). The same names,
after ``cross_attns.``, are used here. It connected other layers and took eight heads of 64 by default: compose with
``connections=original_connections(...)`` and ``attn_kwargs=ORIGINAL_ATTENTION``.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from calm_pytorch.model.calm import CALM
from lm_core.checkpoints.manifest import CheckpointError
from lm_core.checkpoints.tensor_files import load_tensors
from lm_core.checkpoints.weights import load_weights
from lm_core.checks import check_positive, typed

ORIGINAL_ATTENTION: dict[str, Any] = {"heads": 8, "dim_head": 64, "flash": True}


@typed
def original_connections(augment_depth: int, anchor_depth: int, every: int = 4) -> tuple[tuple[int, int], ...]:
    """The 1-indexed ``(augment_layer, anchor_layer)`` pairs the original chose for stacks of these depths."""
    check_positive(augment_depth, "augment_depth")
    check_positive(anchor_depth, "anchor_depth")
    check_positive(every, "every")
    augment_layers = range(1, augment_depth + 1, every)
    stride = anchor_depth // min(len(augment_layers), anchor_depth)
    return tuple(zip(augment_layers, range(1, anchor_depth + 1, stride), strict=False))


@typed
def load_original(calm: CALM, weights: str | Path | Mapping[str, Tensor]) -> None:
    """Loads what the original's ``CALM.state_dict`` or ``FineTuner.save`` wrote, strictly.

    Args:
        calm: composed with the original's wiring.
        weights: the state dict, or a file with it (or with a trainer's checkpoint); nothing in a file is executed.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is no such file, or keys or shapes do not fit; they are named.
    """
    where = "the original's weights"
    if isinstance(weights, (str, Path)):
        where = str(weights)
        loaded = load_tensors(weights)
        weights = loaded.get("model", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(weights, Mapping) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise CheckpointError(f"{where} holds no state dict of the original CALM")
    load_weights(calm.cross_attns, dict(weights), where=where)
