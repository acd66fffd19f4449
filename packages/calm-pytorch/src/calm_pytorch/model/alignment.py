"""Alignment of two tokenizers over one text: an anchor token reads no text that is still to come.

Legend: b batch, n anchor tokens, m augment tokens.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lm_core.checks import typed

Offsets = Sequence[tuple[int, int]]


@typed
def align_by_offsets(
    anchor: Int[Tensor, "b n two"] | Sequence[Offsets], augment: Int[Tensor, "b m two"] | Sequence[Offsets]
) -> Bool[Tensor, "b n m"]:
    """True where the augment's token ends no later in the text than the anchor's.

    An anchor position that may look there sees only text it has itself read, so a composition with this ``alignment``
    is causal although its models cut the text differently.

    Args:
        anchor: for each row and token the ``(start, end)`` characters, as ``offset_mapping`` of a Hugging Face
            tokenizer gives them; lists of different lengths are padded.
        augment: the same for the augment's tokens. Empty spans (special tokens, padding) are not read and read
            nothing.

    Raises:
        ValueError: another number of rows, spans that are no pairs, or a span that ends before it starts.
    """
    first, second = _spans(anchor, "anchor"), _spans(augment, "augment")
    if first.shape[0] != second.shape[0]:
        raise ValueError(f"anchor and augment must have equally many rows, got {first.shape[0]} and {second.shape[0]}")
    ends = first[..., 1]
    real = first[..., 1] > first[..., 0]
    real_augment = second[..., 1] > second[..., 0]
    within = second[..., 1].unsqueeze(1) <= ends.unsqueeze(2)
    return within & real.unsqueeze(2) & real_augment.unsqueeze(1)


def _spans(offsets: Tensor | Sequence[Offsets], name: str) -> Tensor:
    if not isinstance(offsets, Tensor):
        longest = max((len(row) for row in offsets), default=0)
        rows = [[tuple(span) for span in row] + [(0, 0)] * (longest - len(row)) for row in offsets]
        if any(len(span) != 2 for row in rows for span in row):
            raise ValueError(f"{name} must hold (start, end) pairs")
        offsets = torch.tensor(rows, dtype=torch.long).reshape(len(rows), longest, 2)
    if offsets.ndim != 3 or offsets.shape[-1] != 2:
        raise ValueError(f"{name} must have shape (b, tokens, 2), got {tuple(offsets.shape)}")
    if bool((offsets[..., 1] < offsets[..., 0]).any()):
        raise ValueError(f"{name} must hold spans whose end is not before their start")
    return offsets
