"""Settings of a training run.

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

    segment_length: int = 512
    batch_size: int = 16
    gradient_accumulation: int = 1
    use_memory: bool = True
    validation_documents: int | None = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_counts("segment_length", "batch_size", "gradient_accumulation", "validation_documents")
