"""Argument checks shared by every module."""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from beartype import BeartypeConf, beartype
from torch import Tensor

F = TypeVar("F", bound=Callable[..., object])

_CONF = BeartypeConf(violation_type=TypeError, is_pep484_tower=True)


def typed(function: F) -> F:
    """Checks annotated arguments at call time and raises ``TypeError`` (0 counts as a float)."""
    checked: F = beartype(conf=_CONF)(function)
    return checked


def either(default: Any, **names: Any) -> Any:
    """The value of an argument that has several names: the one that is not the default.

    Raises:
        ValueError: it was passed under several.
    """
    passed = {name: value for name, value in names.items() if value != default}
    if len(passed) > 1:
        raise ValueError(f"{' and '.join(names)} are one argument, got {passed}")
    return next(iter(passed.values()), default)


def check_ids(ids: Tensor, vocab_size: int, name: str) -> None:
    """Raises if ``ids`` are not integers in ``[0, vocab_size)``.

    Values are read, so on an accelerator this waits for the device: call it at the API boundary, not in every forward.

    Raises:
        TypeError: the dtype is not an integer dtype.
        ValueError: an id is negative or not below ``vocab_size``.
    """
    if torch.compiler.is_compiling():
        return
    if ids.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8):
        raise TypeError(f"{name} must hold integer token ids, got dtype {ids.dtype}")
    if ids.numel() == 0:
        return
    low, high = (int(value) for value in torch.aminmax(ids))
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(f"{name} must hold token ids in [0, {vocab_size}), got {wrong}")


def check_mask(mask: Tensor, name: str, shape: Sequence[int] | None = None) -> None:
    """Checks a mask that is True at what counts: integers would be taken as indices or be inverted bitwise.

    Args:
        mask: the mask.
        name: argument name in error messages.
        shape: required shape; None for any.

    Raises:
        TypeError: it is no tensor, or the dtype is not boolean.
        ValueError: the shape is another one.
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a boolean tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be boolean, got dtype {mask.dtype}; mask.bool() converts it")
    if shape is not None and mask.shape != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(mask.shape)}")


def check_positive(value: int, name: str) -> None:
    """Raises ``ValueError`` naming the argument unless ``value`` is at least 1."""
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_above_zero(value: float | None, name: str) -> None:
    """Raises ``ValueError`` naming the argument unless ``value`` is a finite number above 0; None passes."""
    if value is not None and not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number above 0, got {value}")


def check_temperature(value: float) -> None:
    """Raises ``ValueError`` unless ``value`` is a finite number of at least 0."""
    if not 0.0 <= value < math.inf:
        raise ValueError(f"temperature must be a finite number of at least 0, got {value}")


def check_probability(value: float, name: str) -> None:
    """Raises ``ValueError`` naming the argument unless ``value`` is in ``[0, 1)``, such as a dropout probability."""
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {value}")
