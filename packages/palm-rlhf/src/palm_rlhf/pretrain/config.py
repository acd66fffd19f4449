"""Options of a pretraining run; the same names are the flags of ``palm-rlhf train`` and the keys of its YAML file."""

from dataclasses import dataclass

from lm_core.checks import typed
from lm_core.training.config import CommonSettings


@typed
@dataclass(frozen=True, kw_only=True)
class TrainingSettings(CommonSettings):
    """Training: data, optimizer, schedule, precision, logging and checkpoints.

    Args:
        sequence_length: tokens per row.
        batch_size: rows per micro-batch, on each process.
        gradient_accumulation: micro-batches per update.
        validation_tokens: tokens of held-out text that are scored; null for all.
    """

    sequence_length: int = 256
    batch_size: int = 4
    gradient_accumulation: int = 1
    validate_every: int = 250
    validation_tokens: int | None = 32_768
    checkpoint_every: int = 250

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_counts("sequence_length", "batch_size", "gradient_accumulation", "validation_tokens")
