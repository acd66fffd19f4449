"""Settings of a training run; the defaults are those of the quickstart.

The names are also the flags of ``memorizing-transformer train`` and the keys of its YAML file.
"""

from dataclasses import dataclass

from lm_core.checks import typed
from lm_core.training.config import CommonSettings


@typed
@dataclass(frozen=True, kw_only=True)
class TrainingSettings(CommonSettings):
    """Training: data, optimizer, schedule, precision, validation and checkpoints.

    Args:
        segment_length: tokens in a segment.
        batch_size: batch rows on each process, each of which reads documents in order.
        gradient_accumulation: successive segments in an update.
        use_memory: whether memorizing layers have their memory; false trains the same weights without.
        validation_documents: number of held-out documents scored; null for all.

    Raises:
        ValueError: a value is out of range; it is named.
        TypeError: a value is of another type.
    """

    max_steps: int = 600
    segment_length: int = 64
    batch_size: int = 16
    gradient_accumulation: int = 1
    use_memory: bool = True
    validate_every: int = 300
    validation_documents: int | None = 4
    checkpoint_every: int = 300

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_counts("segment_length", "batch_size", "gradient_accumulation", "validation_documents")
