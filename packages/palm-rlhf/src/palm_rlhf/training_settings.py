"""What can be chosen about a pretraining run, with its defaults: those of the quickstart.

The same names are the flags of ``palm-rlhf train`` and the keys of its YAML file.
"""

import math
from dataclasses import dataclass
from typing import Literal

from lm_core._checks import check_positive, typed


@typed
@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Training: data, optimizer, schedule, precision, what is written when.

    Args:
        max_steps: optimizer updates of the whole run; the learning rate's schedule is laid over them.
        max_seconds: stops earlier, with a checkpoint to resume from, once training has taken so many seconds.
        sequence_length: tokens a row.
        batch_size: rows a micro-batch, on each process.
        gradient_accumulation: micro-batches an update.
        learning_rate: at its peak.
        warmup: part of the updates over which it rises from zero.
        final_learning_rate: at the end of the cosine, as a fraction of the peak.
        weight_decay: of matrices; norms and embeddings do not decay.
        beta1: decay of AdamW's mean of gradients.
        beta2: decay of AdamW's mean of squared gradients.
        max_grad_norm: gradients with a greater global norm are scaled down; null only measures it.
        precision: auto is bf16 on a GPU that has it and fp32 elsewhere.
        compile: compiles the model with its loss (torch.compile).
        fsdp: spreads weights and optimizer state over the processes.
        seed: of weights, data order and dropout.
        device: auto takes CUDA, then MPS, then the CPU.
        validate_every: updates between validations; there is always one before and one after training.
        validation_tokens: how much held-out text is scored; null for all.
        checkpoint_every: updates between checkpoints; there is always one at the end.
        keep_checkpoints: how many stay; null for all.

    Raises:
        ValueError: a value is out of range; it is named.
        TypeError: a value is of another type.
    """

    max_steps: int = 1000
    max_seconds: float | None = None
    sequence_length: int = 256
    batch_size: int = 4
    gradient_accumulation: int = 1
    learning_rate: float = 3e-3
    warmup: float = 0.05
    final_learning_rate: float = 0.05
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    max_grad_norm: float | None = 1.0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool = False
    fsdp: bool = False
    seed: int = 0
    device: str = "auto"
    validate_every: int = 250
    validation_tokens: int | None = 32_768
    checkpoint_every: int = 250
    keep_checkpoints: int | None = 2

    def __post_init__(self) -> None:
        for name in (
            "max_steps",
            "sequence_length",
            "batch_size",
            "gradient_accumulation",
            "validate_every",
            "checkpoint_every",
        ):
            check_positive(getattr(self, name), name)
        for name in ("validation_tokens", "keep_checkpoints"):
            value = getattr(self, name)
            if value is not None:
                check_positive(value, name)
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

    @property
    def warmup_steps(self) -> int:
        """Updates over which the learning rate rises."""
        return int(self.warmup * self.max_steps)
