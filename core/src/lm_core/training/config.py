"""What can be chosen about every training run. A package's settings add its own fields, and its own defaults.

The names are the flags of the ``train`` commands and the keys of their YAML files.
"""

import math
from dataclasses import dataclass
from typing import Literal

from lm_core.checks import check_positive, typed


@typed
@dataclass(frozen=True, kw_only=True)
class CommonSettings:
    """Optimizer, schedule, precision, what is written when.

    Args:
        max_steps: optimizer updates of the whole run; the learning rate's schedule is laid over them.
        max_seconds: stops earlier, with a checkpoint to resume from, once training has taken so many seconds.
        learning_rate: at its peak.
        warmup: part of the updates over which it rises from zero.
        final_learning_rate: at the end of the cosine, as a fraction of the peak.
        weight_decay: of matrices; norms and embeddings do not decay.
        beta1: decay of AdamW's mean of gradients.
        beta2: decay of AdamW's mean of squared gradients.
        max_grad_norm: gradients with a greater global norm are scaled down; null only measures it.
        precision: auto is bf16 on a GPU that has it and fp32 elsewhere.
        seed: of weights, data order and dropout.
        device: auto takes CUDA, then MPS, then the CPU.
        validate_every: updates between validations; there is always one before and one after training.
        checkpoint_every: updates between checkpoints; there is always one at the end.
        keep_checkpoints: how many stay; null for all.

    Raises:
        ValueError: a value is out of range; it is named.
        TypeError: a value is of another type.
    """

    max_steps: int = 1000
    max_seconds: float | None = None
    learning_rate: float = 3e-3
    warmup: float = 0.05
    final_learning_rate: float = 0.05
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    max_grad_norm: float | None = 1.0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    seed: int = 0
    device: str = "auto"
    validate_every: int = 200
    checkpoint_every: int = 200
    keep_checkpoints: int | None = 2

    def __post_init__(self) -> None:
        self.check_counts("max_steps", "validate_every", "checkpoint_every", "keep_checkpoints")
        for name in ("max_seconds", "learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be a finite number above 0, got {value}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if not 0 <= self.final_learning_rate <= 1:
            raise ValueError(f"final_learning_rate must be in [0, 1], got {self.final_learning_rate}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be a finite number of at least 0, got {self.weight_decay}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be a part of the updates in [0, 1), got {self.warmup}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in [0, 2**32), got {self.seed}")

    def check_counts(self, *names: str) -> None:
        """Raises ``ValueError`` naming the first of these fields that is below 1; None passes."""
        for name in names:
            if getattr(self, name) is not None:
                check_positive(getattr(self, name), name)

    @property
    def warmup_steps(self) -> int:
        """Updates over which the learning rate rises."""
        return int(self.warmup * self.max_steps)
