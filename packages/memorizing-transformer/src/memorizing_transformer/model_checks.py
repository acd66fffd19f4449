"""What the model accepts: checks made before any work is done."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lm_core._checks import check_ids


def whole_number(value: int | float, name: str) -> int:
    """``value`` as an integer of at least 0.

    Raises:
        ValueError: it is none.
    """
    if value != int(value) or value < 0:
        raise ValueError(f"{name} must be a whole number of at least 0, got {value}")
    return int(value)


def layer_numbers(
    layers: int | Sequence[int] | None, depth: int, name: str, *, default: tuple[int, ...]
) -> tuple[int, ...]:
    """Layers counted from 1, in ascending order.

    Raises:
        ValueError: a layer does not exist, or comes twice.
    """
    if layers is None:
        return default
    chosen = (layers,) if isinstance(layers, int) else tuple(layers)
    wrong = [layer for layer in chosen if not 1 <= layer <= depth]
    if wrong:
        raise ValueError(f"{name} must be in 1 to {depth}, got {wrong}")
    if len(set(chosen)) != len(chosen):
        raise ValueError(f"{name} must be different from each other, got {list(chosen)}")
    return tuple(sorted(chosen))


def check_inputs(x: Tensor, *, mask: Tensor | None, past: int, num_tokens: int) -> None:
    """Checks ids and mask.

    Raises:
        TypeError: ``x`` holds no integers or ``mask`` is not boolean.
        ValueError: a shape does not fit, or (on the CPU) an id is out of range.
    """
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"x must hold integer token ids, got dtype {x.dtype}")
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"x must have shape (b, n) with at least one row and token, got {tuple(x.shape)}")
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be boolean (True at real tokens), got dtype {mask.dtype}")
        if mask.shape != (x.shape[0], past + x.shape[1]):
            expected = (x.shape[0], past + x.shape[1])
            raise ValueError(f"mask must have shape (b, cached + new) = {expected}, got {tuple(mask.shape)}")
    if not x.is_cuda:
        check_ids(x, num_tokens, "x")


def check_window(
    xl_memories: Sequence[Tensor] | None, layers: int, b: int, heads_and_dim: tuple[int, ...]
) -> list[Tensor]:
    """XL memories as ``(b, g, m, 2, d)``; none given is an empty list.

    Raises:
        ValueError: their number or a shape does not fit.
    """
    if xl_memories is None:
        return []
    if len(xl_memories) != layers:
        raise ValueError(f"xl_memories must have one entry for each of {layers} XL layers, got {len(xl_memories)}")
    windows = [one if one.ndim == 5 else one.unsqueeze(1) for one in xl_memories]
    width = windows[0].shape[2] if windows else 0
    for number, one in enumerate(windows):
        heads = one.shape[1]
        if one.ndim != 5 or one.shape != (b, heads, width, 2, heads_and_dim[1]):
            raise ValueError(
                f"xl_memories[{number}] must have shape (b, m, 2, d) with b = {b}, one m for all and "
                f"d = {heads_and_dim[1]}, got {tuple(xl_memories[number].shape)}"
            )
    return windows
