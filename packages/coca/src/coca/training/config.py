"""Settings of a training run.

The names are also the flags of ``coca train`` and the keys of its YAML file. The defaults are those of a model of the
preset "small"; ``coca.cli.presets`` has the quickstart's.
"""

from dataclasses import dataclass

from lm_core.checks import typed
from lm_core.training.config import CommonSettings


@typed
@dataclass(frozen=True, kw_only=True)
class TrainingSettings(CommonSettings):
    """Training: batches, optimizer, schedule, precision, validation and checkpoints.

    Args:
        batch_size: pairs in an update, over all processes together; all are contrasted with each other.
        micro_batches: parts of an update's pairs that are in memory one after the other; all pairs are contrasted all
            the same, for one more forward of the encoders (arXiv 2101.06983).
        max_length: tokens at which captions are cut, BOS and EOS included.
        shift: largest random shift of an image in pixels, in each direction.
        workers: processes that decode images ahead of the training, in each process of it; 0 decodes between updates.
        validation_captions: held-out images to caption in a validation; null for all. The last validation takes all.

    Raises:
        ValueError: a value is out of range; it is named.
        TypeError: a value is of another type.
    """

    max_steps: int = 50_000
    learning_rate: float = 5e-4  # CLIP's for its ViT-B/32 (arXiv 2103.00020, table 20)
    validate_every: int = 1000
    checkpoint_every: int | None = 1000
    batch_size: int = 256
    micro_batches: int = 1
    max_length: int = 64
    shift: int = 0
    workers: int = 0
    validation_captions: int | None = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_counts("batch_size", "micro_batches")
        if self.compile and self.fsdp:
            # blocks whose texts differ in length from batch to batch: inductor's backward asserts another shape
            raise ValueError("compile must be False with fsdp=True for CoCa, whose backward torch.compile gets wrong")
        for name, least in (("max_length", 3), ("shift", 0), ("workers", 0), ("validation_captions", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
