"""What generation keeps: the segment that is being filled, the XL window before it, and a memory of its own.

Rows fill segments of ``segment_length`` tokens each at its own pace: padding is left out, so a batch of prompts of
different lengths gives what each gives alone. When a row's segment is full, what leaves its XL window goes into its
memory, exactly as after a training segment of the same length.

Legend: b batch, g key heads, s segment_length, m XL window, d feature of a head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memorizing_transformer.memory.memory_list import KNNMemoryList
from memorizing_transformer.model.block import Attention
from memorizing_transformer.model.knn_attention import as_memories, packed
from memorizing_transformer.model.segment import Documents, remembered_columns, split_columns


@dataclass(frozen=True)
class Kept:
    """Which of a layer's tensors the cache holds.

    Attributes:
        key_heads: of the layer.
        xl: whether it has an XL window.
        reads_xl: the attention whose XL window it reads (itself unless windows are shifted).
        memory: number among the memories, or None.
    """

    key_heads: int
    xl: bool
    reads_xl: int
    memory: int | None


def kept_of(attentions: Sequence[Attention], shift_xl: int) -> list[Kept]:
    """What each attention keeps, in a model whose XL windows are shifted down by ``shift_xl``."""
    windows = [number for number, one in enumerate(attentions) if one.xl is not None]
    kept = []
    for number, one in enumerate(attentions):
        reads = number if one.xl is None else windows[min(one.xl + shift_xl, len(windows) - 1)]
        kept.append(Kept(one.key_heads, one.xl is not None, reads, one.memory))
    return kept


class MemoryCache:
    """Made by ``MemorizingTransformer.init_cache``; opaque to ``lm_core.generate``.

    Args:
        kept: what each attention keeps.
        batch_size: rows.
        segment_length: tokens between two times that the memory grows.
        window: tokens of the XL window.
        dim_head: features of a head.
        make_memories: makes memories for so many rows, at the first token unless some are given before.
    """

    def __init__(
        self,
        *,
        kept: Sequence[Kept],
        batch_size: int,
        segment_length: int,
        window: int,
        dim_head: int,
        make_memories: Callable[[int], KNNMemoryList],
    ) -> None:
        self.kept, self.batch_size, self.segment_length, self.window = list(kept), batch_size, segment_length, window
        self.dim_head, self._make_memories = dim_head, make_memories
        self.length = 0
        self.masked = False
        self.fill = [0] * batch_size
        self.xl_lengths = [0] * batch_size
        self.memories: KNNMemoryList | None = None
        self.adds = True
        self.segments: list[Tensor] = []  # (b, g, s, 2, d) of each attention
        self.windows: list[Tensor | None] = []  # (b, g, m, 2, d) of each attention that has one
        self.documents: Tensor | None = None  # (b, s)
        self.open_documents: Tensor | None = None  # (b,)

    def check_next(self, x: Tensor, mask: Tensor | None, memories: KNNMemoryList | None) -> None:
        """Raises ``ValueError`` unless new tokens ``(b, n)`` with these settings can follow."""
        if self.batch_size != x.shape[0]:
            raise ValueError(f"cache holds {self.batch_size} rows, got a batch of {x.shape[0]}")
        if mask is None and self.masked:
            raise ValueError("mask is None but the cache was filled under one: pass the mask of all positions")
        if memories is not None and self.length:
            raise ValueError("knn_memories go with the first tokens of a cache")

    def take_up(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        """Counts new tokens; the part of ``mask`` that is theirs, or None if all of them are real."""
        fresh = None if mask is None else mask[:, self.length :]
        self.masked = self.masked or mask is not None
        self.length += x.shape[1]
        return None if fresh is None or bool(fresh.all()) else fresh

    def begin(self, like: Tensor, memories: KNNMemoryList | None, adds: bool) -> None:
        """Takes the room it needs, in the dtype and on the device of ``like``; ``memories`` are copied."""
        self.adds = adds
        self.memories = (
            self._make_memories(self.batch_size) if memories is None else memories.selected(range(self.batch_size))
        )
        for one in self.kept:
            shape = (self.batch_size, one.key_heads, self.segment_length, 2, self.dim_head)
            # zeros: padding is multiplied by weights of zero, and NaN times zero is NaN
            self.segments.append(like.new_zeros(shape))
            window = (*shape[:2], self.window, 2, self.dim_head)
            self.windows.append(like.new_zeros(window) if one.xl else None)

    # ------------------------------------------------------------------------------------- what a piece looks at

    def is_even(self) -> bool:
        """Whether all rows stand at the same place of their segments and XL windows."""
        return len(set(self.fill)) == 1 and len(set(self.xl_lengths)) == 1

    def past_mask(self, device: torch.device) -> Bool[Tensor, "b m"]:
        """Which columns of the XL windows hold something."""
        lengths = torch.tensor(self.xl_lengths, device=device).unsqueeze(1)
        return torch.arange(self.window - 1, -1, -1, device=device) < lengths

    def write_documents(self, found: Documents | None, counts: Sequence[int]) -> None:
        """Notes the documents of the first so many new tokens of each row."""
        if found is None:
            return
        if self.documents is None:
            shape = (self.batch_size, self.segment_length)
            self.documents = torch.zeros(shape, dtype=torch.long, device=found.ids.device)
        for row, (fill, count) in enumerate(zip(self.fill, counts, strict=True)):
            self.documents[row, fill : fill + count] = found.ids[row, :count]
        self.open_documents = found.open

    def remember(
        self, number: int, k: Float[Tensor, "b g n d"], v: Float[Tensor, "b g n d"], used: int, valid: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Writes an attention's new keys and values behind those of its rows.

        Args:
            number: of the attention.
            k: keys.
            v: values.
            used: columns of the segment in use afterwards.
            valid: ``(b, n)`` False at padding on the right; None where all rows stand at the same place.

        Returns:
            Keys and values of the XL window, if it has one, and of the segment.
        """
        segment = self.segments[number]
        new = torch.stack((k, v), dim=-2).detach().to(segment.dtype)
        if valid is None:
            segment[:, :, self.fill[0] : self.fill[0] + k.shape[2]] = new
        else:
            for row, count in enumerate(valid.sum(dim=1).tolist()):
                segment[row, :, self.fill[row] : self.fill[row] + count] = new[row, :, :count]
        columns = segment[:, :, :used]
        window = self.windows[self.kept[number].reads_xl] if self.kept[number].xl else None
        if window is not None and self.window:
            columns = torch.cat((window, columns), dim=2)
        keys, values = columns.unbind(dim=-2)
        return keys, values

    # ------------------------------------------------------------------------------------------- after a piece

    def advance(self, counts: Sequence[int]) -> None:
        """Tells that each row has taken so many tokens; rows whose segment is full commit it."""
        self.fill = [fill + count for fill, count in zip(self.fill, counts, strict=True)]
        full = [row for row, fill in enumerate(self.fill) if fill == self.segment_length]
        if full:
            self._commit(full)

    def _commit(self, rows: list[int]) -> None:
        device = self.segments[0].device
        index = torch.tensor(rows, device=device)
        documents = None
        if self.documents is not None and self.open_documents is not None:
            documents = Documents(self.documents[index], self.open_documents[index])
            self._forget([row for row, last in zip(rows, documents.open.tolist(), strict=True) if last > 0])
        past_mask = self.past_mask(device)[index]
        lengths: Tensor | None = None
        for number, one in enumerate(self.kept):
            window = self.windows[number]
            kv = self.segments[number][index]
            past = 0
            if window is not None:
                past, kv = self.window, torch.cat((window[index], kv), dim=2)
            keep = remembered_columns(
                past=past,
                past_mask=past_mask if past else None,
                key_mask=None,
                documents=documents,
                new=self.segment_length,
            )
            split = split_columns(kv, keep, past)
            if window is not None:
                window[index] = split.staying
                if split.staying_mask is not None:
                    lengths = split.staying_mask.sum(dim=1)
            if one.memory is not None and self.memories and self.adds:
                with self.memories.at_batch_indices(rows):
                    added = packed(as_memories(split.leaving))
                    self.memories[one.memory].add(added, mask=split.leaving_mask)
        counts = [0] * len(rows) if lengths is None else lengths.tolist()
        for row, count in zip(rows, counts, strict=True):
            self.fill[row], self.xl_lengths[row] = 0, int(count)
        if self.open_documents is not None:
            self.open_documents = self.open_documents.index_fill(0, index, 0)

    def _forget(self, rows: list[int]) -> None:
        if rows and self.adds and self.memories:
            self.memories.clear_memory(rows)

    def reorder(self, index: Int[Tensor, " rows"]) -> None:
        """Row ``r`` becomes what row ``index[r]`` was; the batch size may change."""
        rows = index.tolist()
        if rows == list(range(self.batch_size)):
            return  # copying a memory is the dearest part
        self.batch_size = len(rows)
        self.fill = [self.fill[row] for row in rows]
        self.xl_lengths = [self.xl_lengths[row] for row in rows]
        self.segments = [t.index_select(0, index) for t in self.segments]
        self.windows = [None if t is None else t.index_select(0, index) for t in self.windows]
        if self.memories is not None:
            self.memories = self.memories.selected(rows)
        if self.documents is not None:
            self.documents = self.documents[index]
        if self.open_documents is not None:
            self.open_documents = self.open_documents[index]
