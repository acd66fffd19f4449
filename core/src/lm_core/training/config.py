"""Settings of a training run, extended by each package with further fields and other defaults.

The field names are the flags of the ``train`` commands and the keys of their YAML files.
"""

import math
from dataclasses import dataclass
from typing import Literal

from lm_core.checks import check_above_zero, check_positive, check_probability, typed


@typed
@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Run settings common to all objectives.

    Args:
        max_seconds: time limit in seconds, after which the run saves a checkpoint to resume from and stops.
        max_grad_norm: bound of the gradients' global norm; null only measures it.
        precision: auto is bf16 on a GPU that has it and fp32 elsewhere.
        compile: compiles (torch.compile) the model's blocks in training, the step of a token in generation.
        fsdp: shards weights, gradients and optimizer state over the processes (FSDP).
        seed: random seed.
        device: auto takes CUDA, then MPS, then the CPU.
        checkpoint_every: updates between checkpoints; the last update always has one.
        keep_checkpoints: newest checkpoints that are kept; null for all.

    Raises:
        ValueError: a value is out of range; the message names it.
        TypeError: a value has the wrong type.
    """

    max_seconds: float | None = None
    max_grad_norm: float | None = 1.0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool = False
    fsdp: bool = False
    seed: int = 0
    device: str = "auto"
    checkpoint_every: int | None = 200
    keep_checkpoints: int | None = 2

    def __post_init__(self) -> None:
        self.check_counts("checkpoint_every", "keep_checkpoints")
        self.check_above_zero("max_seconds", "max_grad_norm")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in [0, 2**32), got {self.seed}")

    def check_counts(self, *names: str) -> None:
        """Raises ``ValueError`` naming the first of these fields that is below 1; None passes."""
        for name in names:
            if getattr(self, name) is not None:
                check_positive(getattr(self, name), name)

    def check_above_zero(self, *names: str) -> None:
        """Raises ``ValueError`` naming the first of these fields that is not finite and above 0; None passes."""
        for name in names:
            check_above_zero(getattr(self, name), name)


@typed
@dataclass(frozen=True, kw_only=True)
class CommonSettings(RunSettings):
    """Optimizer and schedule: AdamW with warmup and a cosine.

    Args:
        max_steps: optimizer updates of the run.
        learning_rate: peak learning rate.
        warmup: fraction of the updates over which the learning rate rises from zero to its peak.
        final_learning_rate: learning rate at the end of the cosine, as a fraction of the peak.
        weight_decay: weight decay of matrices; norms and embeddings have none.
        beta1: decay rate of AdamW's running mean of gradients.
        beta2: decay rate of AdamW's running mean of squared gradients.
        validate_every: updates between validations; there is always one before and one after training.

    Raises:
        ValueError, TypeError: as for ``RunSettings``.
    """

    max_steps: int = 1000
    learning_rate: float = 3e-3
    warmup: float = 0.05
    final_learning_rate: float = 0.05
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    validate_every: int = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_counts("max_steps", "validate_every")
        self.check_above_zero("learning_rate")
        for name in ("beta1", "beta2"):
            check_probability(getattr(self, name), name)
        if not 0 <= self.final_learning_rate <= 1:
            raise ValueError(f"final_learning_rate must be in [0, 1], got {self.final_learning_rate}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be a finite number of at least 0, got {self.weight_decay}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be a fraction of the updates in [0, 1), got {self.warmup}")

    @property
    def warmup_steps(self) -> int:
        """Updates over which the learning rate rises."""
        return int(self.warmup * self.max_steps)
