"""The Transformer-XL window (arXiv 1901.02860): keys and values of the newest tokens, handed from call to call.

Legend: b batch, h heads, g key heads, m tokens of the window, d feature of a head.
"""

from collections.abc import Sequence

from torch import Tensor


class XLMemories(list[Tensor]):
    """Keys and values ``(b, m, 2, d)`` (with several key heads ``(b, h, m, 2, d)``) of each XL layer, not normalised.

    Attributes:
        mask: ``(b, m)`` False at columns on the left that hold nothing; None where all hold something.
    """

    mask: Tensor | None = None


def check_window(xl_memories: Sequence[Tensor] | None, layers: int, b: int, dim_head: int) -> list[Tensor]:
    """XL memories as ``(b, g, m, 2, d)``; none given is an empty list.

    Args:
        xl_memories: as they were handed to the model.
        layers: how many layers have an XL window.
        b: rows of the batch.
        dim_head: d.

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
        if one.ndim != 5 or one.shape != (b, one.shape[1], width, 2, dim_head):
            raise ValueError(
                f"xl_memories[{number}] must have shape (b, m, 2, d) with b = {b}, one m for all and "
                f"d = {dim_head}, got {tuple(xl_memories[number].shape)}"
            )
    return windows
