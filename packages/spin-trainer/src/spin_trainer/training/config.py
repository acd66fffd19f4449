"""What can be chosen about self-play: arguments of ``SPINTrainer``, flags and YAML keys of the command.

The paper's schedule for iterations 0 to 3 is ``lambdas=[0.1, 0.1, 0.1, 5.0]`` and
``learning_rates=[5e-7, 5e-7, 1e-7, 1e-7]``, two epochs each, answers of the previous iteration mixed in.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lm_core.checks import check_positive, check_probability, either, typed
from spin_trainer.model.losses import LossName

# The original's name -> the one here; ``SPINTrainer`` takes both.
ORIGINAL_NAMES = {
    "grad_accum_steps": "gradient_accumulation",
    "start_learning_rate": "learning_rate",
    "valid_every": "validate_every",
}


@typed
@dataclass(frozen=True, kw_only=True)
class SelfPlaySettings:
    """Self-play: iterations, loss, sampling, optimizer, what is written when.

    Args:
        max_seq_len: longest prompt with answer, in tokens; answers are cut off there.
        iterations: rounds of generate, train, promote.
        epochs: passes over the pairs, in each iteration.
        batch_size: pairs a micro-batch, on each process.
        gradient_accumulation: micro-batches an update.
        learning_rate: at the beginning of an iteration.
        end_learning_rate: at its end; between them a line.
        learning_rate_num_decay_steps: updates over which the rate falls; null is the iteration's length.
        warmup: part of an iteration's updates over which it rises first.
        learning_rates: of each iteration instead of learning_rate (the end falls alike); the last one stays.
        lambda_: weight of the log-ratios.
        lambdas: of each iteration instead of lambda_; the last one stays.
        loss: logistic (the paper's), hinge, exponential or correlation.
        reduction: log-probabilities are sums over an answer's tokens (the paper), or means.
        opponent: reference is the frozen policy of the last promotion (the paper); policy answers live, ever anew.
        mix_previous: whether answers of the previous iteration are trained on too.
        ref_model_ema_decay: 1 freezes the reference within an iteration; below, it is a moving average.
        precompute_reference: reference log-probabilities once an iteration, instead of in every update.
        temperature: of the opponent's sampling; 0 is greedy.
        generation_batch_size: prompts answered at a time; null is twice the batch size.
        dropout: while training.
        weight_decay: of matrices.
        max_grad_norm: gradients with a greater global norm are scaled down; null only measures it.
        validate_every: updates between validations; there is one at both ends of each iteration anyway.
        early_stop_patience: iterations without a better held-out likelihood before stopping; null goes on. With it,
            the best iteration's weights are put back at the end.
        checkpoint_every: updates between checkpoints; there is one at the end of each iteration anyway.
        keep_checkpoints: how many stay; null for all.
        fsdp: spreads weights and optimizer state over the processes; needs a frozen reference whose log-probabilities
            are precomputed.
        precision: auto is bf16 on a GPU that has it and fp32 elsewhere.
        seed: of answers, order and dropout.
        device: auto takes CUDA, then MPS, then the CPU.

    Raises:
        ValueError: a value is out of range; it is named.
        TypeError: a value is of another type.
    """

    max_seq_len: int
    iterations: int = 1
    epochs: int = 2
    batch_size: int = 16
    gradient_accumulation: int = 2
    learning_rate: float = 1e-6
    end_learning_rate: float = 1e-7
    learning_rate_num_decay_steps: int | None = None
    warmup: float = 0.0
    learning_rates: Sequence[float] | None = None
    lambda_: float = 0.1
    lambdas: Sequence[float] | None = None
    loss: LossName = "logistic"
    reduction: Literal["sum", "mean"] = "sum"
    opponent: Literal["reference", "policy"] = "reference"
    mix_previous: bool = True
    ref_model_ema_decay: float = 1.0
    precompute_reference: bool = True
    temperature: float = 0.7
    generation_batch_size: int | None = None
    dropout: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    validate_every: int = 100
    early_stop_patience: int | None = None
    checkpoint_every: int | None = None
    keep_checkpoints: int | None = 2
    fsdp: bool = False
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.max_seq_len < 2:
            raise ValueError(f"max_seq_len must be at least 2, got {self.max_seq_len}")
        for name in ("iterations", "epochs", "batch_size", "gradient_accumulation", "validate_every"):
            check_positive(getattr(self, name), name)
        for name in (
            *("learning_rate_num_decay_steps", "generation_batch_size"),
            *("early_stop_patience", "checkpoint_every", "keep_checkpoints"),
        ):
            if getattr(self, name) is not None:
                check_positive(getattr(self, name), name)
        for name in ("learning_rate", "lambda_", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be a finite number above 0, got {value}")
        for name in ("learning_rates", "lambdas"):
            values = getattr(self, name)
            if values is not None and (not values or not all(0 < value < math.inf for value in values)):
                raise ValueError(f"{name} must hold finite numbers above 0, one an iteration, got {list(values)}")
        if not 0 <= self.end_learning_rate <= self.learning_rate:
            raise ValueError(
                f"end_learning_rate must be in [0, learning_rate = {self.learning_rate}], got {self.end_learning_rate}"
            )
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be a part of the updates in [0, 1), got {self.warmup}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be a finite number of at least 0, got {self.temperature}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be a finite number of at least 0, got {self.weight_decay}")
        if not 0 <= self.ref_model_ema_decay <= 1:
            raise ValueError(f"ref_model_ema_decay must be in [0, 1], got {self.ref_model_ema_decay}")
        if self.fsdp and self.live_reference:
            raise ValueError(
                "fsdp=True needs precompute_reference=True, opponent='reference' and ref_model_ema_decay=1, got "
                f"{self.precompute_reference}, {self.opponent!r} and {self.ref_model_ema_decay}"
            )
        check_probability(self.dropout, "dropout")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in [0, 2**32), got {self.seed}")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "SelfPlaySettings":
        """Settings by their names or the original's.

        Raises:
            ValueError: one is given under both.
        """
        settings = dict(given)
        for original, name in ORIGINAL_NAMES.items():
            if original in settings:
                both = {name: settings.get(name), original: settings.pop(original)}
                settings[name] = either(None, **both)
        return cls(**settings)

    @property
    def live_reference(self) -> bool:
        """Whether reference log-probabilities are computed in every update."""
        return not self.precompute_reference or self.opponent == "policy" or self.ref_model_ema_decay < 1

    def learning_rate_of(self, iteration: int) -> float:
        """The learning rate at the beginning of an iteration."""
        return self.learning_rate if self.learning_rates is None else _entry(self.learning_rates, iteration)

    def lambda_of(self, iteration: int) -> float | None:
        """The lambda of an iteration, where they differ."""
        return None if self.lambdas is None else _entry(self.lambdas, iteration)


def _entry(values: Sequence[float], number: int) -> float:
    return float(values[min(number, len(values) - 1)])
