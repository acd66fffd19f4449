"""Settings of a training run, with the quickstart's defaults.

The names are also the flags of ``coca train`` and the keys of its YAML file.
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
        max_length: tokens at which captions are cut, BOS and EOS included.
        shift: largest random shift of an image in pixels, in each direction.
        compile: compiles the model with its losses (torch.compile).
        validation_captions: held-out images to caption in a validation; null for all. The last validation takes all.

    Raises:
        ValueError: a value is out of range; it is named.
        TypeError: a value is of another type.
    """

    batch_size: int = 64
    max_length: int = 64
    shift: int = 1
    compile: bool = False
    validation_captions: int | None = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_counts("batch_size")
        for name, least in (("max_length", 3), ("shift", 0), ("validation_captions", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
