"""Setting the dropout of any model, and putting it back.

Besides ``nn.Dropout`` and its kin, models keep attention dropout as a plain number that they hand to the attention
function; both are reached.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lm_core.checks import check_probability

_DROPOUT_MODULES = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def _places(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for module in model.modules():
        if isinstance(module, _DROPOUT_MODULES):
            yield module, "p"
        for name, value in vars(module).items():
            if "dropout" in name and type(value) is float:
                yield module, name


def set_dropout_(model: nn.Module, prob: float) -> None:
    """Sets every dropout probability in ``model``, of modules and of attention.

    Raises:
        ValueError: ``prob`` is outside [0, 1).
    """
    check_probability(prob, "prob")
    for module, name in _places(model):
        setattr(module, name, float(prob))


@contextmanager
def dropout_of(model: nn.Module, prob: float) -> Iterator[None]:
    """``set_dropout_`` inside; every probability is as before on leaving."""
    before = [(module, name, getattr(module, name)) for module, name in _places(model)]
    set_dropout_(model, prob)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
