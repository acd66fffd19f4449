"""Reading one whole segment: what it sees, and what of it is remembered for the next.

The memory is searched as it was BEFORE the segment; afterwards what leaves the XL window is added, so nothing of a
segment is found by itself.

Legend: b batch, n tokens of the segment, d feature, j columns (remembered ones, then the segment's).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lm_core.nn.masking import maybe_and_mask, positions_from_mask
from memorizing_transformer.memory.memory_list import KNNMemoryList
from memorizing_transformer.model.attention import causal_distances
from memorizing_transformer.model.block import Attention
from memorizing_transformer.model.knn_attention import as_memories, packed
from memorizing_transformer.model.layers import FeaturesOf
from memorizing_transformer.model.segment import (
    Documents,
    Split,
    find_documents,
    remembered_columns,
    split_columns,
    visible_pairs,
)
from memorizing_transformer.model.xl_memories import XLMemories


def read_segment(
    x: Tensor,
    *,
    features_of: FeaturesOf,
    attentions: Sequence[Attention],
    mask: Tensor | None,
    memories: KNNMemoryList | None,
    adds: bool,
    window: Sequence[Tensor],
    window_mask: Tensor | None,
    max_window: int,
    shift_window: int,
    sos_id: int | None,
    eos_id: int | None,
) -> tuple[Tensor, XLMemories | None]:
    """Features ``(b, n, d)`` of a segment, and the XL memories behind it (None for a model without an XL window).

    Args:
        x: token ids ``(b, n)``.
        features_of: the model from token ids to features; see ``Layers.forward`` for what else it takes.
        attentions: all of its attentions, in the order they are applied.
        mask: ``(b, n)`` True at real tokens; None for all.
        memories: searched, and then added to.
        adds: False leaves the memories as they are.
        window: the XL window of each layer that has one, ``(b, g, m, 2, d)``; empty for a first segment.
        window_mask: ``(b, m)`` False at its columns that hold nothing.
        max_window: tokens of the XL window; 0 for none.
        shift_window: how many XL layers farther up a layer reads.
        sos_id: token that begins a document.
        eos_id: token that ends one.
    """
    n, past = x.shape[1], window[0].shape[2] if window else 0
    documents = find_documents(x, sos_id=sos_id, eos_id=eos_id, mask=mask)
    distances = _distances(n, past, mask, x.device)
    visible = visible_pairs(
        distances,
        past=past,
        past_mask=window_mask,
        key_mask=mask,
        query_documents=None if documents is None else documents.ids,
        key_documents=None if documents is None else documents.ids,
    )
    kept: dict[int, Tensor] = {}

    def remember(number: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        kept[number] = torch.stack((k, v), dim=-2).detach()
        one = attentions[number]
        if one.xl is None or not past:
            return k, v
        old = window[min(one.xl + shift_window, len(window) - 1)]
        return torch.cat((old[..., 0, :].to(k), k), dim=2), torch.cat((old[..., 1, :].to(v), v), dim=2)

    features = features_of(
        x,
        distances=distances,
        visible=visible,
        past=past,
        documents=documents,
        memories=memories,
        remember=remember,
    )
    if adds and memories and documents is not None:
        _forget(memories, documents)
    new = XLMemories() if max_window else None
    for number, one in enumerate(attentions):
        if one.xl is None and one.memory is None:
            continue
        has_window, columns = one.xl is not None, kept[number]
        old = past if has_window else 0
        if old and one.xl is not None:
            columns = torch.cat((window[one.xl].to(columns), columns), dim=2)
        keep = remembered_columns(
            past=old, past_mask=window_mask if old else None, key_mask=mask, documents=documents, new=n
        )
        split = split_columns(columns, keep, max_window if has_window else 0)
        if has_window and new is not None:
            new.append(packed(split.staying))
            new.mask = split.staying_mask
        if one.memory is not None and memories and adds and split.leaving.shape[2]:
            memories[one.memory].add(packed(as_memories(split.leaving)), mask=_finite(split))
    return features, new


def _distances(n: int, past: int, mask: Tensor | None, device: torch.device) -> Tensor:
    """Positions of the queries minus those of all columns; padding takes no position."""
    in_columns = causal_distances(n, past + n, device)
    if mask is None:
        return in_columns.unsqueeze(0)
    positions = positions_from_mask(mask)
    before = torch.arange(-past, 0, device=device).expand(mask.shape[0], -1)
    distances = positions.unsqueeze(2) - torch.cat((before, positions), dim=1).unsqueeze(1)
    # two pads, or a pad and the token before it, have one position: the order of columns decides
    return distances.masked_fill(in_columns < 0, -1)


def _forget(memories: KNNMemoryList, documents: Documents) -> None:
    begun = (documents.open > 0).nonzero().flatten().tolist()
    if begun:
        for memory in memories:
            memory.clear([memory.scoped_indices[row] for row in begun])


def _finite(split: Split) -> Tensor | None:
    """What may be added: a loss that overflowed is the trainer's to skip, and must not stay in the memory."""
    if split.leaving.is_cuda or torch.compiler.is_compiling():
        return split.leaving_mask
    finite = torch.isfinite(split.leaving).all(dim=-1).all(dim=-1).all(dim=1)
    return split.leaving_mask if bool(finite.all()) else maybe_and_mask(split.leaving_mask, finite)
