"""What a training run minimises, how many tokens it counts, and which settings of a run make sense."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from calm_pytorch.model.inputs import IGNORED, labels_of
from lm_core.checks import check_positive
from lm_core.training.accelerator import autocast


class SummedLoss(nn.Module):
    """The composition with its loss over one micro-batch, as DistributedDataParallel needs it: one forward."""

    def __init__(self, calm: Any, precision: Any) -> None:
        super().__init__()
        self.calm, self.precision = calm, precision

    def forward(self, batch: dict[str, Any], normalizer: Tensor) -> Tensor:
        """Summed cross-entropy over ``normalizer``."""
        seq: Tensor = batch["seq"]
        with autocast(self.precision, seq.device):
            total = self.calm(**batch, reduction="sum")
        # a batch without a label to count has no loss, not 0 / 0
        return total / normalizer.to(total.dtype).clamp(min=torch.finfo(total.dtype).tiny)

    def count(self, batch: Mapping[str, Any]) -> int:
        """Tokens that the loss of a batch counts."""
        return int((labels_of(batch["seq"], batch.get("mask"), self.calm.pad_id) != IGNORED).sum())


def check_settings(
    *,
    counts: Mapping[str, int],
    learning_rate: float,
    weight_decay: float,
    warmup_steps: int,
    max_grad_norm: float | None,
    datasets: Mapping[str, Any],
    accelerate_kwargs: Mapping[str, Any],
) -> None:
    """Raises ``ValueError`` or ``TypeError`` naming the first setting of a run that is out of range."""
    for name, value in counts.items():
        check_positive(value, name)
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps must not be negative, got {warmup_steps}")
    if not 0 < learning_rate < float("inf"):
        raise ValueError(f"learning_rate must be a finite number above 0, got {learning_rate}")
    if not 0 <= weight_decay < float("inf"):
        raise ValueError(f"weight_decay must be a finite number of at least 0, got {weight_decay}")
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm must be positive or None, got {max_grad_norm}")
    for name, data in datasets.items():
        if data is None and name == "valid_dataset":
            continue
        if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
            raise TypeError(f"{name} must have a length and items, got {type(data).__name__}")
        if len(data) == 0:
            raise ValueError(f"{name} must hold at least one example, got none")
    unknown = sorted(set(accelerate_kwargs) - {"log_with"})
    if unknown:
        raise ValueError(f"accelerate_kwargs may hold log_with, got {unknown}: other arguments are the trainer's own")


def updates_of_warmup(part: float | None, updates: int | None, max_steps: int) -> int:
    """Updates over which the learning rate rises.

    Raises:
        ValueError: both were given, or the part is not in [0, 1).
    """
    if part is None:
        return 1000 if updates is None else updates
    if updates is not None:
        raise ValueError(f"warmup and warmup_steps are one argument, got {part} and {updates}")
    if not 0 <= part < 1:
        raise ValueError(f"warmup must be a part of the updates in [0, 1), got {part}")
    return int(part * max_steps)
