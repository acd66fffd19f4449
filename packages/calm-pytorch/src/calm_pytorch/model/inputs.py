"""Arguments of a call: entries for each augment, padding, and labels.

Legend: b batch, n sequence, m prompt positions.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lm_core.checks import check_mask

IGNORED = -100


def each_augment(given: Any, augments: Sequence[Any], name: str, *, shared_too: bool = False) -> list[Tensor | None]:
    """``given`` for each augment: a single tensor serves all that read prompts.

    Args:
        given: one tensor, or one for each augment, or None.
        augments: the augments.
        name: name of the argument in errors.
        shared_too: gives a single tensor to augments that share the anchor's sequence as well.

    Raises:
        ValueError: another number of entries.
        TypeError: an entry is neither a tensor nor None, or a mask is not boolean.
    """
    if name.endswith("mask"):
        for mask in [given] if isinstance(given, Tensor) else given or ():
            if isinstance(mask, Tensor):
                check_mask(mask, name)
    if given is None or isinstance(given, Tensor):
        return [given if shared_too or not augment.shared_sequence else None for augment in augments]
    entries = list(given)
    if len(entries) != len(augments):
        raise ValueError(f"{name} must be one for all augments or one for each of {len(augments)}, got {len(entries)}")
    for entry in entries:
        if entry is not None and not isinstance(entry, Tensor):
            raise TypeError(f"{name} must hold tensors or None, got {type(entry).__name__}")
    return entries


def real_tokens(ids: Tensor, mask: Tensor | None, pad_id: int) -> Tensor | None:
    """``(b, m)`` True where a token is real: where ``mask`` is True, or, without one, where ids are not ``pad_id``.

    None where nothing is padding; on an accelerator only for float input, because looking would wait for the device.
    """
    if mask is not None:
        return mask
    if ids.is_floating_point():
        return None
    real = ids != pad_id
    if ids.device.type == "cpu" and not torch.compiler.is_compiling() and bool(real.all()):
        return None
    return real


def labels_of(seq: Tensor, mask: Tensor | None, pad_id: int) -> Tensor:
    """``(b, n - 1)``: the next token at each position that counts, ``IGNORED`` elsewhere."""
    labels = seq[:, 1:]
    counted = (labels != pad_id) & (seq[:, :-1] != pad_id)
    if mask is not None:
        counted = counted & mask[:, 1:]
    return labels.masked_fill(~counted, IGNORED)
