"""Settings of ``FineTuner``, which are the flags of ``calm-pytorch train`` too."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lm_core.checks import either, typed
from lm_core.training.config import CommonSettings

# The original's names, of the settings here.
ORIGINAL_NAMES = {"num_train_steps": "max_steps", "grad_accum_steps": "gradient_accumulation"}


@typed
@dataclass(frozen=True, kw_only=True)
class FineTunerSettings(CommonSettings):
    """Settings of a run, with defaults for new cross-attentions on a pretrained anchor.

    Args:
        learning_rate: peak learning rate.
        warmup: fraction of the updates over which the learning rate rises from zero to its peak.
        final_learning_rate: learning rate at the end of the cosine, as a fraction of the peak; 1 keeps the peak.
        weight_decay: weight decay of matrices; norms, gains and biases have none.
        batch_size: examples in a micro-batch on each process.
        gradient_accumulation: micro-batches of an update.
        gradient_checkpointing: computes the activations of the anchor's blocks again in the backward pass.

    Raises:
        ValueError, TypeError: as for ``CommonSettings``.
    """

    learning_rate: float = 3e-4
    warmup: float = 0.1
    final_learning_rate: float = 1.0
    weight_decay: float = 0.01
    beta2: float = 0.999
    max_grad_norm: float | None = 0.5
    validate_every: int = 100
    batch_size: int = 8
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_counts("batch_size", "gradient_accumulation")

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> "FineTunerSettings":
        """Creates settings from keyword arguments, under their names here or the original's; None is the default.

        Raises:
            ValueError: a setting is passed under both names.
            TypeError: a name is unknown.
        """
        settings = dict(arguments)
        for original, name in ORIGINAL_NAMES.items():
            if original in settings:
                settings[name] = either(None, **{name: settings.get(name), original: settings.pop(original)})
        nullable = {"max_grad_norm", "max_seconds", "checkpoint_every", "keep_checkpoints"}
        return cls(**{name: value for name, value in settings.items() if value is not None or name in nullable})
