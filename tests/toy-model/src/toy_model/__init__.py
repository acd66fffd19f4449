"""The smallest package that stands on lm-core."""

from toy_model.model.bigram import ToyModel

__all__ = ["ToyModel"]

__version__ = "0.1.0"
