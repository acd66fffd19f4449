"""An iteration's optimizer and its learning rates: both anew in each iteration, as in the paper."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lm_core.training.optimization import LearningRateSchedule, optimizer_groups
from spin_trainer.training.config import SelfPlaySettings

ADAM = {"betas": (0.9, 0.99)}


def optimizer_of(
    policy: nn.Module,
    settings: SelfPlaySettings,
    *,
    iteration: int,
    updates: int,
    adam_kwargs: Mapping[str, Any] | None = None,
) -> tuple[torch.optim.Optimizer, LearningRateSchedule]:
    """AdamW and a schedule that falls along a line.

    Args:
        policy: whose trainable parameters.
        settings: rates and decay.
        iteration: which one's rate.
        updates: of the iteration, over which the rate falls unless the settings say otherwise.
        adam_kwargs: further arguments of ``torch.optim.AdamW``; they win.
    """
    groups = optimizer_groups(policy, weight_decay=settings.weight_decay)
    arguments: dict[str, Any] = {"lr": settings.learning_rate_of(iteration), **ADAM, **(adam_kwargs or {})}
    optimizer = torch.optim.AdamW(groups, **arguments)
    falling, rising = settings.learning_rate_num_decay_steps or updates, int(settings.warmup * updates)
    schedule = LearningRateSchedule(
        optimizer,
        kind="linear",
        warmup_steps=rising,
        total_steps=max(falling, rising + 1),
        final_scale=settings.end_learning_rate / settings.learning_rate,
    )
    return optimizer, schedule
