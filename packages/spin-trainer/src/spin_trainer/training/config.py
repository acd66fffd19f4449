"""Settings of the trainers: their arguments, and flags and YAML keys of the commands.

The schedule of the SPIN paper for iterations 0 to 3 is ``lambdas=[0.1, 0.1, 0.1, 5.0]`` and
``learning_rates=[5e-7, 5e-7, 1e-7, 1e-7]``, two epochs each, answers of the previous iteration mixed in.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from lm_core.checks import check_probability, either, typed
from lm_core.cli.text_generation import SamplingFlags
from lm_core.training.config import RunSettings
from spin_trainer.model.losses import LossName

# The original's name -> the name here; the trainers accept both.
ORIGINAL_NAMES = {
    "grad_accum_steps": "gradient_accumulation",
    "start_learning_rate": "learning_rate",
    "valid_every": "validate_every",
}


S = TypeVar("S", bound="FineTuningSettings")


@typed
@dataclass(frozen=True, kw_only=True)
class FineTuningSettings(RunSettings):
    """Settings that all trainers share: lengths, batches, optimizer, validation.

    Args:
        max_seq_len: maximum length of a prompt with its answer, in tokens; answers are truncated there.
        epochs: passes over the data.
        max_steps: optimizer updates of the run.
        batch_size: rows per batch and process; an update has ``gradient_accumulation`` of these.
        micro_batch_size: rows per backward pass, on each process; by default the whole batch. Smaller values only save
            memory.
        gradient_accumulation: batches per update.
        learning_rate: learning rate at the beginning, or after the warmup.
        end_learning_rate: learning rate at the end, reached by linear decay.
        warmup: fraction of the updates over which the learning rate rises.
        dropout: dropout probability of the model while training; that of adapters (lora_dropout) stays as configured.
        weight_decay: weight decay of matrices; norms and embeddings do not decay.
        validation_fraction: fraction of the data held out for validation.
        validate_every: updates between validations; there is always one before and one after training.
        gradient_checkpointing: whether the model's blocks compute activations again in the backward, to save memory.

    Raises:
        ValueError: a value is out of range.
        TypeError: a value has the wrong type.
    """

    max_seq_len: int
    epochs: int = 1
    max_steps: int | None = None
    batch_size: int = 16
    micro_batch_size: int | None = None
    gradient_accumulation: int = 1
    learning_rate: float = 1e-6
    end_learning_rate: float = 0.0
    warmup: float = 0.0
    dropout: float = 0.0
    weight_decay: float = 0.0
    validation_fraction: float = 0.0
    validate_every: int = 100
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        RunSettings.__post_init__(self)
        if self.max_seq_len < 2:
            raise ValueError(f"max_seq_len must be at least 2, got {self.max_seq_len}")
        self.check_counts("epochs", "max_steps", "batch_size", "micro_batch_size", "gradient_accumulation")
        self.check_counts("validate_every")
        self.check_above_zero("learning_rate")
        if not 0 <= self.end_learning_rate <= self.learning_rate:
            raise ValueError(
                f"end_learning_rate must be in [0, learning_rate = {self.learning_rate}], got {self.end_learning_rate}"
            )
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be a fraction of the updates in [0, 1), got {self.warmup}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be a finite number of at least 0, got {self.weight_decay}")
        check_probability(self.dropout, "dropout")
        check_probability(self.validation_fraction, "validation_fraction")

    @classmethod
    def of(cls: type[S], arguments: Mapping[str, Any], config: S | None = None) -> S:
        """Creates settings from keyword arguments, under their names here or the original's; or returns ``config``.

        Raises:
            ValueError: a setting is passed under both names, or next to ``config``.
        """
        if config is not None:
            if arguments:
                raise ValueError(f"pass config or single settings, not both; got config and {sorted(arguments)}")
            return config
        settings = dict(arguments)
        for original, name in ORIGINAL_NAMES.items():
            if original in settings:
                settings[name] = either(None, **{name: settings.get(name), original: settings.pop(original)})
        return cls(**settings)

    @property
    def rows_per_pass(self) -> int:
        """Rows of one forward and backward, on each process."""
        return min(self.micro_batch_size or self.batch_size, self.batch_size)


@typed
@dataclass(frozen=True, kw_only=True)
class SelfPlaySettings(FineTuningSettings, SamplingFlags):
    """Settings of self-play: iterations, loss, sampling, optimizer, intervals of validation and checkpoints.

    A run ends after all iterations, or within one after ``max_steps`` updates; the end of an iteration always has a
    checkpoint.

    Args:
        iterations: rounds of generation, training and promotion.
        epochs: passes over the pairs in each iteration.
        learning_rate: learning rate at the beginning of each iteration.
        end_learning_rate: learning rate at the end of each iteration, reached by linear decay.
        learning_rate_num_decay_steps: updates over which the learning rate decays; null is the iteration's length.
        warmup: fraction of an iteration's updates over which the learning rate rises.
        learning_rates: learning rate of each iteration, instead of learning_rate; the last one is repeated.
        lambda_: weight of the log-ratios in the loss; larger values keep the policy closer to the opponent.
        lambdas: weight of the log-ratios in each iteration, instead of lambda_; the last one is repeated.
        loss: loss function: logistic (as in the paper), hinge, exponential or correlation.
        reduction: sum (as in the paper) or mean of the log-probabilities of an answer's tokens.
        reference_free: whether to leave the reference out of the loss, for an entropy bonus instead of the KL
            penalty (arXiv 2601.08198).
        opponent: model that answers: reference, the policy at the last promotion (as in the paper), or policy, live.
        mix_previous: whether to train on the previous iteration's answers as well.
        ref_model_ema_decay: 1 freezes the reference within an iteration; below 1 it is a moving average.
        precompute_reference: whether to compute reference log-probabilities once per iteration, not in every update.
        max_new_tokens: maximum length of a generated answer; null is what max_seq_len leaves.
        generation_batch_size: prompts per generation batch; null is twice the batch size.
        validate_every: updates between validations; both ends of an iteration are always validated.
        early_stop_patience: iterations without better held-out likelihood before stopping at the best; null for never.

    Raises:
        ValueError: a value is out of range.
        TypeError: a value has the wrong type.
    """

    iterations: int = 1
    epochs: int = 2
    gradient_accumulation: int = 2
    end_learning_rate: float = 1e-7
    learning_rate_num_decay_steps: int | None = None
    learning_rates: Sequence[float] | None = None
    lambda_: float = 0.1
    lambdas: Sequence[float] | None = None
    loss: LossName = "logistic"
    reduction: Literal["sum", "mean"] = "sum"
    reference_free: bool = False
    opponent: Literal["reference", "policy"] = "reference"
    mix_previous: bool = True
    ref_model_ema_decay: float = 1.0
    precompute_reference: bool = True
    max_new_tokens: int | None = None
    temperature: float = 0.7
    top_p: float | None = 0.9
    generation_batch_size: int | None = None
    early_stop_patience: int | None = None
    checkpoint_every: int | None = None

    def __post_init__(self) -> None:
        FineTuningSettings.__post_init__(self)
        SamplingFlags.__post_init__(self)
        self.check_counts("iterations", "learning_rate_num_decay_steps", "generation_batch_size", "early_stop_patience")
        self.check_counts("max_new_tokens")
        self.check_above_zero("lambda_")
        for name in ("learning_rates", "lambdas"):
            values = getattr(self, name)
            if values is not None and (not values or not all(0 < value < math.inf for value in values)):
                raise ValueError(f"{name} must hold finite numbers above 0, one an iteration, got {list(values)}")
        if not 0 <= self.ref_model_ema_decay <= 1:
            raise ValueError(f"ref_model_ema_decay must be in [0, 1], got {self.ref_model_ema_decay}")
        if self.fsdp and self.live_reference:
            raise ValueError(
                "fsdp=True needs precompute_reference=True, opponent='reference' and ref_model_ema_decay=1, got "
                f"{self.precompute_reference}, {self.opponent!r} and {self.ref_model_ema_decay}"
            )
        if self.reference_free and self.live_reference:
            raise ValueError(
                "reference_free=True has no reference to compute, it needs precompute_reference=True, "
                f"opponent='reference' and ref_model_ema_decay=1, got {self.precompute_reference}, {self.opponent!r} "
                f"and {self.ref_model_ema_decay}"
            )

    @property
    def live_reference(self) -> bool:
        """True if reference log-probabilities are computed in every update."""
        return not self.precompute_reference or self.opponent == "policy" or self.ref_model_ema_decay < 1


def value_of(iteration: int, schedule: Sequence[float] | None, default: float) -> float:
    """Value of a schedule at an iteration, repeating its last entry; the default if there is no schedule."""
    return default if schedule is None else float(schedule[min(iteration, len(schedule) - 1)])
