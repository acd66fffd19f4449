"""Options of a reinforcement-learning run that do not depend on the objective."""

import math
from dataclasses import dataclass

from lm_core.checks import typed
from lm_core.training.config import RunSettings
from palm_rlhf.rl.importance import ImportanceCorrection


@typed
@dataclass(frozen=True, kw_only=True)
class RLConfig(RunSettings):
    """Training: optimizer, batches, precision and checkpoints.

    Args:
        actor_lr: actor learning rate.
        critic_lr: critic learning rate.
        actor_wd: weight decay of the actor's matrices.
        critic_wd: weight decay of the critic's matrices.
        warmup: fraction of the updates over which learning rates rise from zero to their peaks.
        final_learning_rate: learning rates at the end of a cosine, as a fraction of the peaks; 1 keeps them.
        betas: betas of AdamW.
        minibatch_size: responses per update, over all processes.
        micro_batch_size: responses per backward pass, on each process; by default the process's share of a minibatch.
        epochs: passes over the responses of a phase; by default the objective's (4 for PPO, 1 for the others).
        pad_id: id that fills rows after their end.
        validate_every: updates between validations on held-out prompts, of which the best checkpoint is kept; there is
            always one before and one after training.
        samples_logged: responses per phase that are written to samples.jsonl.
        importance_correction: weights of responses that another engine sampled, by its log-probs: "token" or "sequence"
            for truncated importance weights, "_mask" for those that drop ratios above the cap, "none" for 1.
        importance_cap: largest importance weight.
    """

    actor_lr: float = 1e-4
    critic_lr: float = 1e-4
    actor_wd: float = 0.0
    critic_wd: float = 0.0
    warmup: float = 0.0
    final_learning_rate: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    minibatch_size: int = 16
    micro_batch_size: int | None = None
    epochs: int | None = None
    pad_id: int = 0
    checkpoint_every: int | None = 50
    validate_every: int | None = None
    samples_logged: int = 4
    importance_correction: ImportanceCorrection = "token"
    importance_cap: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_counts("minibatch_size", "micro_batch_size", "epochs", "validate_every")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be in [0, 1), a fraction of the updates, got {self.warmup}")
        if not 0 <= self.final_learning_rate <= 1:
            raise ValueError(f"final_learning_rate must be in [0, 1], got {self.final_learning_rate}")
        self.check_above_zero("actor_lr", "critic_lr", "importance_cap")
        for name in ("actor_wd", "critic_wd"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number of at least 0, got {getattr(self, name)}")
        if any(not 0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be in [0, 1), got {self.betas}")
