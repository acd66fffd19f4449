"""Moving padding within rows, which makes an adapter exact for any mask.

A causal model never attends to later tokens, so padding after the real tokens of a row cannot change them, independent
of the model's masks and positions: every call without a cache uses that layout. A cache grows at its end, so with one
the padding must come first, and the model needs a mask of it.

Legend: b batch, n sequence, d feature.
"""

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Realigned(NamedTuple):
    """Rows with their padding moved to one side.

    Attributes:
        ids: ``(b, n)`` ids, those at padding included.
        mask: ``(b, n)``, True at real tokens.
        back: ``(b, n)``, column of ``ids`` that has the token of each original column.
    """

    ids: Int[Tensor, "b n"]
    mask: Bool[Tensor, "b n"]
    back: Int[Tensor, "b n"]


def with_padding_last(ids: Int[Tensor, "b n"], mask: Bool[Tensor, "b n"]) -> Realigned:
    """Real tokens first, in their order, then padding."""
    return _realigned(ids, mask, real_first=True)


def with_padding_first(ids: Int[Tensor, "b n"], mask: Bool[Tensor, "b n"]) -> Realigned:
    """Padding first, then the real tokens in their order."""
    return _realigned(ids, mask, real_first=False)


def moved_back(states: Float[Tensor, "b n d"], realigned: Realigned) -> Float[Tensor, "b n d"]:
    """States moved from the realigned columns back to the original ones."""
    b, n, _ = states.shape
    # Whole rows of a matrix are copied (and their gradients added) faster than gathered entry by entry.
    first = torch.arange(0, b * n, n, device=states.device).unsqueeze(-1)
    flat = rearrange(first + realigned.back, "b n -> (b n)")
    return rearrange(rearrange(states, "b n d -> (b n) d").index_select(0, flat), "(b n) d -> b n d", b=b)


def has_gap(mask: Bool[Tensor, "b n"]) -> bool:
    """True if padding lies between two real tokens of a row; synchronises the device."""
    after_a_token = (mask[:, :-1] & ~mask[:, 1:]).cumsum(dim=1) > 0
    return bool((after_a_token & mask[:, 1:]).any())


def _realigned(ids: Tensor, mask: Tensor, *, real_first: bool) -> Realigned:
    order = mask.to(torch.uint8).argsort(dim=1, descending=real_first, stable=True)
    return Realigned(ids.gather(1, order), mask.gather(1, order), order.argsort(dim=1))
