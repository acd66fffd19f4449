"""Setting and restoring the dropout of any model.

Covers ``nn.Dropout`` and its variants as well as float attributes such as ``attention_dropout``, which models pass to
the attention function. The dropout in front of peft's adapters stays as their configuration has it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lm_core.checks import check_probability

_DROPOUT_MODULES = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def _dropout_attributes(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    # peft keeps one dropout for each adapter in a ModuleDict such as lora_dropout
    adapters = [
        part
        for module in model.modules()
        for name, child in module.named_children()
        if name.endswith("_dropout") and isinstance(child, nn.ModuleDict)
        for part in child.modules()
    ]
    for module in set(model.modules()) - set(adapters):
        if isinstance(module, _DROPOUT_MODULES):
            yield module, "p"
        for name, value in vars(module).items():
            if "dropout" in name and type(value) is float:
                yield module, name


def set_dropout_(model: nn.Module, prob: float) -> None:
    """Sets every dropout probability in ``model``, of dropout modules and of attention, but for peft's adapters.

    Raises:
        ValueError: ``prob`` is outside [0, 1).
    """
    check_probability(prob, "prob")
    for module, name in _dropout_attributes(model):
        setattr(module, name, float(prob))


@contextmanager
def dropout_of(model: nn.Module, prob: float) -> Iterator[None]:
    """Context manager around ``set_dropout_`` that restores every probability on exit."""
    before = [(module, name, getattr(module, name)) for module, name in _dropout_attributes(model)]
    set_dropout_(model, prob)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
