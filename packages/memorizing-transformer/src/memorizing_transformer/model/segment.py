"""What of the past a segment may see, and what of it is remembered afterwards.

Documents: a start-of-document token begins one, an end-of-document token ends one. Tokens of document 0 continue what
came before the segment; later ones see neither the past nor another document of the segment. Afterwards only tokens of
the document that is still open are remembered, oldest first: the newest ``width`` of them stay in the XL window, the
others go to the memory. Padding is seen by no token and remembered nowhere.

Legend: b batch, n tokens, j columns (remembered ones, then the segment's), g key heads, d feature of a head.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """Which document tokens belong to.

    Attributes:
        ids: 0 continues what came before; counted up at each boundary.
        open: the document that goes on behind the last token.
    """

    ids: Int[Tensor, "b n"]
    open: Int[Tensor, " b"]


def find_documents(
    x: Int[Tensor, "b n"],
    *,
    sos_id: int | None,
    eos_id: int | None,
    mask: Bool[Tensor, "b n"] | None = None,
    before: Int[Tensor, " b"] | None = None,
) -> Documents | None:
    """The documents of a segment; None without tokens that bound them.

    Args:
        x: token ids.
        sos_id: begins a document.
        eos_id: ends one.
        mask: False at padding, which bounds nothing.
        before: document that was open before ``x``, where ``x`` continues a segment.
    """
    if sos_id is None and eos_id is None:
        return None
    none = torch.zeros_like(x, dtype=torch.bool)
    begins = none if sos_id is None else x == sos_id
    ends = none if eos_id is None else x == eos_id
    if mask is not None:
        begins, ends = begins & mask, ends & mask
    boundaries = begins.long().cumsum(1) + ends.long().cumsum(1)
    if before is not None:
        boundaries = boundaries + before.unsqueeze(1)
    return Documents(ids=boundaries - ends.long(), open=boundaries[:, -1])


def additive(bias: Float[Tensor, "#b h i j"], visible: Bool[Tensor, "#b i j"]) -> Float[Tensor, "#b h i j"]:
    """The bias with -inf where a query may not look."""
    return bias.masked_fill(~visible.unsqueeze(1), -torch.inf)


def visible_pairs(
    distances: Int[Tensor, "#b i j"],
    *,
    past: int,
    past_mask: Bool[Tensor, "b past"] | None = None,
    key_mask: Bool[Tensor, "b n"] | None = None,
    query_documents: Int[Tensor, "b i"] | None = None,
    key_documents: Int[Tensor, "b n"] | None = None,
) -> Bool[Tensor, "#b i j"]:
    """Which keys each query may see: not ahead, no padding, of its own document.

    Args:
        distances: position of the query minus that of the key.
        past: how many of the columns come before the segment.
        past_mask: False at columns before the segment that hold nothing.
        key_mask: False at padding.
        query_documents: of the queries.
        key_documents: of the segment's columns.
    """
    visible = distances >= 0
    b = next((t.shape[0] for t in (past_mask, key_mask, query_documents) if t is not None), None)
    if b is None:
        return visible
    j = distances.shape[-1]
    old = torch.ones(b, past, dtype=torch.bool, device=distances.device) if past_mask is None else past_mask
    new = torch.ones(b, j - past, dtype=torch.bool, device=distances.device) if key_mask is None else key_mask
    visible = visible & torch.cat((old, new), dim=1).unsqueeze(1)
    if query_documents is not None and key_documents is not None:
        same = query_documents.unsqueeze(2) == F.pad(key_documents, (past, 0)).unsqueeze(1)
        visible = visible & same
    # padding sees everything rather than nothing: its output is not used, but must not be NaN
    return visible | ~visible.any(dim=-1, keepdim=True)


def remembered_columns(
    *,
    past: int,
    past_mask: Bool[Tensor, "b past"] | None,
    key_mask: Bool[Tensor, "b n"] | None,
    documents: Documents | None,
    new: int,
) -> Bool[Tensor, "b j"] | None:
    """Which columns are remembered: no padding, and of the open document; None for all."""
    if past_mask is None and key_mask is None and documents is None:
        return None
    some = next(t for t in (past_mask, key_mask, None if documents is None else documents.ids) if t is not None)
    old = torch.ones(some.shape[0], past, dtype=torch.bool, device=some.device) if past_mask is None else past_mask
    fresh = torch.ones(some.shape[0], new, dtype=torch.bool, device=some.device) if key_mask is None else key_mask
    if documents is not None:
        old = old & (documents.open == 0).unsqueeze(1)
        fresh = fresh & (documents.ids == documents.open.unsqueeze(1))
    return torch.cat((old, fresh), dim=1)


@dataclass(frozen=True)
class Split:
    """Columns that leave the XL window, and those that stay in it.

    Attributes:
        leaving: keys and values.
        leaving_mask: False at columns that are not to be stored; None where all are.
        staying: keys and values, the newest on the right.
        staying_mask: False at columns on the left that hold nothing; None where all hold something.
    """

    leaving: Float[Tensor, "b g n 2 d"]
    leaving_mask: Bool[Tensor, "b n"] | None
    staying: Float[Tensor, "b g m 2 d"]
    staying_mask: Bool[Tensor, "b m"] | None


def staying_mask(keep: Bool[Tensor, "b j"] | None, width: int) -> Bool[Tensor, "b width"] | None:
    """Which of ``width`` columns hold something once the newest kept ones are moved to the right; None for all."""
    if keep is None:
        return None
    count = keep.sum(dim=1, keepdim=True)
    return torch.arange(width - 1, -1, -1, device=keep.device) < count


def split_columns(kv: Float[Tensor, "b g j 2 d"], keep: Bool[Tensor, "b j"] | None, window: int) -> Split:
    """Moves the newest ``window`` remembered columns of each row to the right; the others leave.

    Args:
        kv: keys and values in the order of time.
        keep: which columns are remembered; None for all.
        window: how many stay at most.
    """
    j = kv.shape[2]
    width = min(window, j)
    if keep is None:
        leaving, staying = kv.split((j - width, width), dim=2)
        return Split(leaving, None, staying, None)
    # rank 1 is the newest remembered column
    rank = keep.flip(1).cumsum(1).flip(1)
    stays = keep & (rank <= width)
    leaves = keep & (rank > width)
    # a stable sort by "stays" puts what stays on the right, in the order of time
    order = stays.long().sort(dim=1, stable=True).indices[:, j - width :]
    index = order[:, None, :, None, None].expand(-1, kv.shape[1], -1, 2, kv.shape[-1])
    mask = staying_mask(keep, width)
    assert mask is not None
    staying = kv.gather(2, index).masked_fill(~mask[:, None, :, None, None], 0.0)
    return Split(kv, leaves, staying, mask)
