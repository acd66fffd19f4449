"""Masks over sequences of different lengths: means under a mask, prompt masks, positions, padding.

A mask is boolean and True at the entries that count.

Legend: b batch, n sequence.
"""

import functools
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lm_core.nn.norms import statistics_dtype


def masked_mean(
    t: Float[Tensor, "*shape"],
    mask: Tensor | None = None,
    dim: int | tuple[int, ...] | None = 1,
    keepdim: bool = False,
) -> Tensor:
    """Mean of the entries where ``mask`` is True.

    The mean of no entries is 0 with zero gradient. Masked entries contribute nothing to value or gradient, even if
    they are infinite or NaN. Half-precision input is summed in float32, since the sum could overflow.

    Args:
        t: floating point; never written to.
        mask: boolean, True at entries that count. With fewer dimensions than ``t`` it is aligned on the left ((b, n)
            for (b, n, d)); sizes of 1 broadcast. None counts everything.
        dim: dimension(s) to average over; None for all.
        keepdim: True keeps averaged dimensions with size 1.

    Returns:
        The mean in the dtype of ``t``.

    Raises:
        TypeError: ``t`` is not floating point or ``mask`` not boolean.
        ValueError: ``mask`` does not broadcast to ``t``.
    """
    if not t.is_floating_point():
        raise TypeError(f"t must be floating point, got dtype {t.dtype}")
    dims = tuple(range(t.ndim)) if dim is None else dim
    if mask is None:
        kept = torch.ones((), dtype=torch.bool, device=t.device).expand(t.shape)
    elif mask.dtype != torch.bool:
        raise TypeError(f"mask must be boolean, got dtype {mask.dtype}")
    else:
        aligned = mask[(...,) + (None,) * (t.ndim - mask.ndim)]
        if aligned.ndim != t.ndim or any(m not in (1, s) for m, s in zip(aligned.shape, t.shape, strict=True)):
            raise ValueError(f"mask must broadcast to t of shape {tuple(t.shape)}, got shape {tuple(mask.shape)}")
        kept = aligned.expand(t.shape)
    total = torch.where(kept, t, 0).sum(dim=dims, keepdim=keepdim, dtype=statistics_dtype(t.dtype))
    count = kept.sum(dim=dims, keepdim=keepdim)
    return (total / count.clamp(min=1)).to(t.dtype)


def prompt_mask_from_lengths(lengths: Int[Tensor, "*b"], total_length: int) -> Bool[Tensor, "*b n"]:
    """True at the first ``lengths`` positions of each row: the mask of right-padded sequences.

    Args:
        lengths: integers in [0, total_length], shape (b,).
        total_length: n, the padded length.

    Raises:
        TypeError: ``lengths`` are not integers.
        ValueError: a length is negative or above ``total_length``.
    """
    if lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise TypeError(f"lengths must be integers, got dtype {lengths.dtype}")
    if total_length < 0:
        raise ValueError(f"total_length must be at least 0, got {total_length}")
    if lengths.device.type == "cpu" and lengths.numel() > 0 and not torch.compiler.is_compiling():
        low, high = (int(value) for value in torch.aminmax(lengths))
        if low < 0 or high > total_length:
            raise ValueError(f"lengths must be in [0, {total_length}], got {low if low < 0 else high}")
    return torch.arange(total_length, device=lengths.device) < lengths[..., None]


def maybe_and_mask(*masks: Tensor | None) -> Tensor | None:
    """The conjunction of the masks that are not None, broadcast together; None when all are None.

    Raises:
        TypeError: a mask is not boolean.
    """
    present = [mask for mask in masks if mask is not None]
    for mask in present:
        if mask.dtype != torch.bool:
            raise TypeError(f"masks must be boolean, got dtype {mask.dtype}")
    return functools.reduce(torch.logical_and, present) if present else None


def positions_from_mask(mask: Bool[Tensor, "*b n"]) -> Int[Tensor, "*b n"]:
    """Position of each real token among the real tokens of its row, from 0.

    Padding has the position of the last real token before it, or 0, so every result is a valid index.

    Raises:
        TypeError: ``mask`` is not boolean.
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be boolean, got dtype {mask.dtype}")
    return (mask.cumsum(dim=-1) - 1).clamp_(min=0)


def _pad(sequences: Sequence[Tensor], pad_id: int, *, left: bool) -> tuple[Int[Tensor, "b n"], Bool[Tensor, "b n"]]:
    if len(sequences) == 0:
        raise ValueError("sequences must hold at least one sequence, got none")
    first = sequences[0]
    for index, sequence in enumerate(sequences):
        if not isinstance(sequence, Tensor):
            raise TypeError(f"sequences[{index}] must be a tensor, got {type(sequence).__name__}")
        if sequence.ndim != 1:
            raise ValueError(f"sequences[{index}] must be one-dimensional, got shape {tuple(sequence.shape)}")
        if sequence.is_floating_point() or sequence.is_complex() or sequence.dtype == torch.bool:
            raise TypeError(f"sequences[{index}] must hold integer token ids, got dtype {sequence.dtype}")
        if sequence.device != first.device:
            raise ValueError(f"sequences[{index}] must be on {first.device}, got {sequence.device}")
    length = max(sequence.shape[0] for sequence in sequences)
    ids = torch.full((len(sequences), length), pad_id, dtype=torch.int64, device=first.device)
    mask = torch.zeros((len(sequences), length), dtype=torch.bool, device=first.device)
    for row, sequence in enumerate(sequences):
        size = sequence.shape[0]
        columns = slice(length - size, length) if left else slice(0, size)
        ids[row, columns] = sequence
        mask[row, columns] = True
    return ids, mask


def left_pad(sequences: Sequence[Tensor], pad_id: int = 0) -> tuple[Int[Tensor, "b n"], Bool[Tensor, "b n"]]:
    """Stacks token sequences of different lengths, padding before their first token.

    Args:
        sequences: integer tensors of shape (length,), at least one; a length may be 0.
        pad_id: value of the padding.

    Returns:
        int64 ids (b, n) with n the longest length, and the mask (b, n), True at tokens of the sequences.

    Raises:
        TypeError: a sequence is not an integer tensor.
        ValueError: no sequence, or one that is not one-dimensional or on another device.
    """
    return _pad(sequences, pad_id, left=True)


def right_pad(sequences: Sequence[Tensor], pad_id: int = 0) -> tuple[Int[Tensor, "b n"], Bool[Tensor, "b n"]]:
    """Stacks token sequences of different lengths, padding after their last token; otherwise like :func:`left_pad`."""
    return _pad(sequences, pad_id, left=False)
