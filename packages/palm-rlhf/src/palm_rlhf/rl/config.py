"""Numbers and names of a reinforcement-learning run, checked once."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lm_core.checks import check_positive, typed
from palm_rlhf.rl.experience import AdvantageEstimator
from palm_rlhf.rl.kl import KLEstimator
from palm_rlhf.rl.losses import Aggregation


@typed
@dataclass(frozen=True, kw_only=True)
class PolicySettings:
    """Optimizer, objective and bookkeeping; ``RLHFTrainer`` and ``GRPOTrainer`` describe each."""

    actor_lr: float = 1e-4
    critic_lr: float = 1e-4
    actor_wd: float = 0.0
    critic_wd: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps_clip: float = 0.2
    eps_clip_high: float | None = None
    value_clip: float | None = 0.4
    value_loss_weight: float = 0.5
    beta_s: float = 0.0
    kl_div_loss_weight: float = 0.1
    kl_in: Literal["reward", "loss"] = "reward"
    kl_estimator: KLEstimator = "k1"
    kl_target: float | None = None
    kl_horizon: int = 10_000
    gamma: float = 1.0
    gae_lambda: float = 0.95
    advantage_estimator: AdvantageEstimator = "gae"
    aggregation: Aggregation = "token"
    constant_length: int | None = None
    group_size: int = 1
    group_scale: Literal["group", "batch", "none"] = "group"
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    missing_eos_penalty: float = 0.0
    minibatch_size: int = 16
    micro_batch_size: int | None = None
    epochs: int = 1
    max_grad_norm: float | None = None
    seed: int = 0
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    checkpoint_every: int = 50
    keep_checkpoints: int | None = 2
    samples_logged: int = 4

    def __post_init__(self) -> None:
        for name in ("group_size", "minibatch_size", "epochs", "checkpoint_every", "kl_horizon"):
            check_positive(getattr(self, name), name)
        for name in ("micro_batch_size", "keep_checkpoints", "constant_length"):
            if getattr(self, name) is not None:
                check_positive(getattr(self, name), name)
        for name in ("actor_lr", "critic_lr", "max_grad_norm", "value_clip", "eps_clip_high"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be a finite number above 0, got {value}")
        for name in ("actor_wd", "critic_wd", "beta_s", "value_loss_weight", "kl_div_loss_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number of at least 0, got {getattr(self, name)}")
        if not 0 < self.eps_clip < 1:
            raise ValueError(f"eps_clip must be in (0, 1), got {self.eps_clip}")
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if any(not 0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be in [0, 1), got {self.betas}")
        if not math.isfinite(self.missing_eos_penalty):
            raise ValueError(f"missing_eos_penalty must be finite, got {self.missing_eos_penalty}")
        if self.advantage_estimator in ("group", "rloo") and self.group_size < 2:
            raise ValueError(f"group_size must be at least 2 to compare responses to one prompt, got {self.group_size}")
        if self.advantage_estimator == "reinforce" and self.epochs > 1:
            raise ValueError(f"epochs must be 1 with advantage_estimator 'reinforce', got {self.epochs}")
        if self.aggregation == "constant" and self.constant_length is None:
            raise ValueError('aggregation "constant" needs constant_length, got None')
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in [0, 2**32), got {self.seed}")

    def as_json(self) -> dict[str, Any]:
        """The settings as plain values."""
        return {**asdict(self), "betas": list(self.betas)}
