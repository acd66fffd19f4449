"""Visibility of past tokens, and the update of XL windows and memories after a segment.

The XL window (arXiv 1901.02860) has keys and values of the newest tokens, passed from segment to segment. The memory is
searched as it was BEFORE a segment; tokens that leave the window are added afterwards, so no segment retrieves itself.

Documents: a start-of-document token begins one, an end-of-document token ends one. Tokens of document 0 continue the
text before the segment; later ones see neither the past nor another document of the segment. Only tokens of the last,
open document are stored: the newest stay in the XL window, others go to the memory. Padding is never seen or stored.

Legend: b batch, n new tokens, m tokens of the window, f tokens of the segment before the new ones, j columns (window,
segment so far, new), g key heads, d feature of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int, Real
from torch import Tensor

from lm_core.checks import check_mask
from lm_core.nn.masking import maybe_and_mask, positions_from_mask
from memorizing_transformer.memory.memory_list import KNNMemoryList
from memorizing_transformer.model.knn_attention import as_memories


class XLMemories(list[Tensor]):
    """Keys and values ``(b, m, 2, d)`` (with several key heads ``(b, h, m, 2, d)``) of each XL layer, not normalised.

    Attributes:
        mask: ``(b, m)``, False at empty columns on the left; None if no column is empty.
    """

    mask: Tensor | None = None


@dataclass(frozen=True)
class Place:
    """The place of an attention in the model.

    Attributes:
        number: index among all attentions.
        key_heads: number of key heads.
        xl: index among the attentions with an XL window, or None.
        memory: index among the attentions with a memory, or None.
        reads_xl: index of the XL window it reads (that of another attention if windows are shifted), or None.
        reads_memory: index of the memory it searches, or None.
    """

    number: int
    key_heads: int
    xl: int | None
    memory: int | None
    reads_xl: int | None
    reads_memory: int | None


@dataclass(frozen=True)
class Past:
    """Keys and values before the new tokens.

    Attributes:
        windows: XL window of each attention that has one; empty before the first segment.
        window_mask: False at empty columns of the windows; None if no column is empty.
        segments: for each attention, the part of the segment that was read before; empty at the start of a segment.
        fill: number of filled columns of ``segments`` for each row, or one number for all rows.
        documents: document of each of those columns; None without boundaries.
    """

    windows: Sequence[Real[Tensor, "b _ m 2 _"]] = ()
    window_mask: Bool[Tensor, "b m"] | None = None
    segments: Sequence[Real[Tensor, "b _ f 2 _"]] = ()
    fill: Int[Tensor, "#b 1"] | None = None
    documents: Int[Tensor, "b f"] | None = None

    @property
    def width(self) -> int:
        """Number of columns of the windows."""
        return self.windows[0].shape[2] if self.windows else 0

    @property
    def columns(self) -> int:
        """Number of columns of the segment so far."""
        return self.segments[0].shape[2] if self.segments else 0

    def of(self, place: Place) -> list[Tensor]:
        """Keys and values for one attention."""
        window = [self.windows[place.reads_xl]] if place.reads_xl is not None and self.windows else []
        return window + ([self.segments[place.number]] if self.segments else [])


def past_of_windows(xl_memories: Sequence[Tensor] | None, *, layers: int, b: int, dim_head: int) -> Past:
    """The ``Past`` of a segment of ``b`` rows, from the XL memories passed to the model.

    Raises:
        ValueError: there is not one for each of ``layers``, or a shape does not fit.
    """
    if xl_memories is None:
        return Past()
    if len(xl_memories) != layers:
        raise ValueError(f"xl_memories must have one entry for each of {layers} XL layers, got {len(xl_memories)}")
    windows = [kv if kv.ndim == 5 else kv.unsqueeze(1) for kv in xl_memories]
    width = windows[0].shape[2] if windows else 0
    for index, kv in enumerate(windows):
        if kv.ndim != 5 or kv.shape != (b, kv.shape[1], width, 2, dim_head):
            raise ValueError(
                f"xl_memories[{index}] must have shape (b, m, 2, d) with b = {b}, one m for all and "
                f"d = {dim_head}, got {tuple(xl_memories[index].shape)}"
            )
    mask = xl_memories.mask if isinstance(xl_memories, XLMemories) else None
    if mask is not None:
        check_mask(mask, "xl_memories.mask", (b, width))
    return Past(windows, mask)


@dataclass(frozen=True)
class Documents:
    """The document of each token.

    Attributes:
        ids: document numbers; 0 continues the text before the segment, and each boundary adds 1.
        open: document that continues after the last token.
    """

    ids: Int[Tensor, "b n"]
    open: Int[Tensor, " b"]

    def of(self, rows: Int[Tensor, " r"]) -> "Documents":
        """The documents of some rows."""
        return Documents(self.ids[rows], self.open[rows])


def find_documents(
    x: Int[Tensor, "b n"],
    *,
    sos_id: int | None,
    eos_id: int | None,
    mask: Bool[Tensor, "b n"] | None = None,
    before: Int[Tensor, " b"] | None = None,
) -> Documents | None:
    """The documents of a segment; None without ``sos_id`` and ``eos_id``.

    Args:
        x: token ids.
        sos_id: token that begins a document.
        eos_id: token that ends a document.
        mask: False at padding, which is never a boundary.
        before: open document before ``x``, if ``x`` continues a segment.
    """
    if sos_id is None and eos_id is None:
        return None
    begins, ends = (x == (-1 if token is None else token) for token in (sos_id, eos_id))
    if mask is not None:
        begins, ends = begins & mask, ends & mask
    boundaries = begins.long().cumsum(1) + ends.long().cumsum(1)
    if before is not None:
        boundaries = boundaries + before.unsqueeze(1)
    return Documents(ids=boundaries - ends.long(), open=boundaries[:, -1])


@dataclass(frozen=True)
class View:
    """Visibility of keys for each new token.

    Attributes:
        distances: position of the query minus that of the key; negative ahead of the query.
        visible: True where a query may look.
        continues_document: False at queries of documents that began in the segment (no memory); None if all may.
    """

    distances: Int[Tensor, "#b n j"]
    visible: Bool[Tensor, "#b n j"]
    continues_document: Bool[Tensor, "b n"] | None


def view_of(
    x: Int[Tensor, "b n"], past: Past, *, mask: Bool[Tensor, "b n"] | None, documents: Documents | None
) -> View:
    """The view of new tokens: nothing ahead, no padding (where ``mask`` is False), only their own document."""
    (b, n), m, f, device = x.shape, past.width, past.columns, x.device
    # distances; padding takes no position
    positions = torch.arange(n, device=device).unsqueeze(0) if mask is None else positions_from_mask(mask)
    if past.fill is not None:
        positions = positions + past.fill
    before = torch.cat((torch.arange(-m, 0, device=device), torch.arange(f, device=device))).expand(len(positions), -1)
    distances = positions.unsqueeze(2) - torch.cat((before, positions), dim=1).unsqueeze(1)
    if mask is not None:
        # two pads, or a pad and the token before it, share a position: the order of columns decides
        distances = distances.masked_fill(torch.ones_like(distances[0], dtype=torch.bool).triu(m + f + 1), -1)
    visible = distances >= 0
    # rows that have read less of their segment than others have empty columns
    filled = before[:, m:] < past.fill if past.fill is not None and len(past.fill) > 1 else None
    if any(part is not None for part in (past.window_mask, filled, mask, documents)):
        parts = zip((past.window_mask, filled, mask), (m, f, n), strict=True)
        visible = visible & torch.cat([_all_true(part, b, width, x) for part, width in parts], dim=1).unsqueeze(1)
    if documents is not None:
        so_far = x.new_zeros(b, f) if past.documents is None else past.documents
        keys = torch.cat((F.pad(so_far, (m, 0)), documents.ids), dim=1)
        visible = visible & (documents.ids.unsqueeze(2) == keys.unsqueeze(1))
    # padding sees everything, not nothing: its output is unused, but must not be NaN
    visible = visible | ~visible.any(dim=-1, keepdim=True)
    return View(distances, visible, None if documents is None else documents.ids == 0)


def _all_true(mask: Tensor | None, b: int, width: int, like: Tensor) -> Tensor:
    return torch.ones(b, width, dtype=torch.bool, device=like.device) if mask is None else mask


def remember(
    places: Sequence[Place],
    kept: Sequence[Real[Tensor, "b _ n 2 _"]],
    past: Past,
    *,
    mask: Bool[Tensor, "b n"] | None,
    documents: Documents | None,
    window: int,
    memories: KNNMemoryList | None,
) -> tuple[list[Tensor], Tensor | None]:
    """Moves a segment into the XL windows, and the tokens that leave these into the memories.

    Args:
        places: places of all attentions.
        kept: keys and values of the segment for each attention.
        past: windows before the segment.
        mask: False at padding.
        documents: documents of the segment.
        window: maximum number of columns of a window.
        memories: memories to extend, and to clear in rows where a document ended; None for no change.

    Returns:
        The new windows, and their mask, False at empty columns (None: no column is empty).
    """
    if memories and documents is not None:
        ended = (documents.open > 0).nonzero().flatten().tolist()
        for memory in memories:
            memory.clear([memory.scoped_indices[row] for row in ended])
    windows: list[Tensor] = []
    window_mask = None
    for place, kv in zip(places, kept, strict=True):
        if place.xl is None and place.memory is None:
            continue
        before = Past()
        if place.xl is not None and past.windows:
            before = past
            kv = torch.cat((past.windows[place.xl].to(kv), kv), dim=2)
        keep = _remembered(before, mask, documents, kept[0])
        (leaving, leaving_mask), (staying, staying_mask) = _split(kv, keep, 0 if place.xl is None else window)
        if place.xl is not None:
            windows.append(staying)
            window_mask = staying_mask
        if place.memory is not None and memories and leaving.shape[2]:
            memories[place.memory].add(as_memories(leaving), mask=_finite(leaving, leaving_mask))
    return windows, window_mask


def _remembered(past: Past, mask: Tensor | None, documents: Documents | None, like: Tensor) -> Tensor | None:
    """True at columns of window and segment to store: no padding, and only the open document; None for all."""
    if past.window_mask is None and mask is None and documents is None:
        return None
    b, n = like.shape[0], like.shape[2]
    old, new = _all_true(past.window_mask, b, past.width, like), _all_true(mask, b, n, like)
    if documents is not None:
        old = old & (documents.open == 0).unsqueeze(1)
        new = new & (documents.ids == documents.open.unsqueeze(1))
    return torch.cat((old, new), dim=1)


def _split(
    kv: Real[Tensor, "b g j 2 d"], keep: Bool[Tensor, "b j"] | None, window: int
) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
    """Columns that leave the XL window and columns that stay in it, each with a mask (None: all count).

    The newest ``window`` columns where ``keep`` is True (None: all) stay, moved to the right.
    """
    j = kv.shape[2]
    width = min(window, j)
    if keep is None:
        return (kv[:, :, : j - width], None), (kv[:, :, j - width :], None)
    # rank 1 is the newest stored column
    rank = keep.flip(1).cumsum(1).flip(1)
    # a stable sort moves the columns that stay to the right, oldest first
    order = (keep & (rank <= width)).long().sort(dim=1, stable=True).indices[:, j - width :]
    index = order[:, None, :, None, None].expand(-1, kv.shape[1], -1, 2, kv.shape[-1])
    mask = torch.arange(width - 1, -1, -1, device=keep.device) < keep.sum(dim=1, keepdim=True)
    staying = kv.gather(2, index).masked_fill(~mask[:, None, :, None, None], 0.0)
    return (kv, keep & (rank > width)), (staying, mask)


def _finite(kv: Tensor, mask: Tensor | None) -> Tensor | None:
    """``mask`` without columns of inf or NaN: after an update that is skipped, these must not stay in the memory."""
    if kv.is_cuda or torch.compiler.is_compiling():
        return mask
    finite = torch.isfinite(kv).all(dim=-1).all(dim=-1).all(dim=1)
    return mask if bool(finite.all()) else maybe_and_mask(mask, finite)
