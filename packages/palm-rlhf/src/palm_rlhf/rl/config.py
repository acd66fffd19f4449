"""Options of a reinforcement-learning run that do not depend on the objective."""

import math
from dataclasses import dataclass
from typing import Literal

from lm_core.checks import check_positive, typed


@typed
@dataclass(frozen=True, kw_only=True)
class RLConfig:
    """Optimizer, batches, precision and checkpoints.

    Args:
        actor_lr: actor learning rate.
        critic_lr: critic learning rate.
        actor_wd: weight decay of the actor's matrices.
        critic_wd: weight decay of the critic's matrices.
        betas: betas of AdamW.
        max_grad_norm: gradients with a greater global norm are scaled down, actor and critic each by their own; null
            only measures it.
        minibatch_size: responses an update, of all processes together.
        micro_batch_size: responses a backward, on each process; by default its whole share.
        epochs: passes over each batch of responses; by default the objective's (4 for PPO, 1 for the others).
        pad_id: fills rows after their end.
        seed: seed of draws, order and shuffles.
        device: auto takes CUDA, then MPS, then the CPU.
        precision: precision of matrix products; auto is bf16 on a GPU that has it and fp32 elsewhere.
        checkpoint_every: updates between checkpoints.
        keep_checkpoints: checkpoints kept; null for all.
        samples_logged: responses a phase that are written to samples.jsonl.

    Raises:
        ValueError: a value is out of range; it is named.
        TypeError: a value is of another type.
    """

    actor_lr: float = 1e-4
    critic_lr: float = 1e-4
    actor_wd: float = 0.0
    critic_wd: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float | None = 1.0
    minibatch_size: int = 16
    micro_batch_size: int | None = None
    epochs: int | None = None
    pad_id: int = 0
    seed: int = 0
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    checkpoint_every: int = 50
    keep_checkpoints: int | None = 2
    samples_logged: int = 4

    def __post_init__(self) -> None:
        for name in ("minibatch_size", "micro_batch_size", "epochs", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) is not None:
                check_positive(getattr(self, name), name)
        for name in ("actor_lr", "critic_lr", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be a finite number above 0, got {value}")
        for name in ("actor_wd", "critic_wd"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number of at least 0, got {getattr(self, name)}")
        if any(not 0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be in [0, 1), got {self.betas}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in [0, 2**32), got {self.seed}")
