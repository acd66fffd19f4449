"""Generation cache: the segment being filled, the XL window before it, and a separate memory.

Rows fill segments of ``segment_length`` tokens independently and without padding, so prompts of different lengths in a
batch give the same results as each alone. When a row's segment is full, the tokens that leave its XL window are added
to its memory, exactly as after a training segment of the same length.

Legend: b batch, g key heads, s segment_length, m XL window, n new tokens, d feature of a head.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Bool, Int, Real
from torch import Tensor

from memorizing_transformer.memory.memory_list import KNNMemoryList
from memorizing_transformer.model.segment import Documents, Past, Place, remember


class MemoryCache:
    """The cache of ``MemorizingTransformer.init_cache``; opaque to ``lm_core.generate``.

    Args:
        places: places of all attentions.
        batch_size, segment_length: as for ``init_cache``.
        window: tokens in the XL window.
        dim_head: features of a head.
        make_memories: returns memories of ``batch_size`` rows; called at the first token if none were passed.
    """

    def __init__(
        self,
        *,
        places: Sequence[Place],
        batch_size: int,
        segment_length: int,
        window: int,
        dim_head: int,
        make_memories: Callable[[], KNNMemoryList],
    ) -> None:
        self.places = list(places)
        self.batch_size = batch_size
        self.segment_length = segment_length
        self.window = window
        self.dim_head = dim_head
        self._make_memories = make_memories
        self.length = 0
        self.masked = False
        self.fill = [0] * batch_size
        self.xl_lengths = [0] * batch_size
        self.memories = KNNMemoryList()
        self.adds = True
        self.segments: list[Tensor] = []  # (b, g, s, 2, d) for each attention
        self.windows: list[Tensor] = []  # (b, g, m, 2, d) for each attention that has one
        self.documents: Documents | None = None  # documents of the segments' tokens

    def check_next(self, x: Tensor, mask: Tensor | None, memories: KNNMemoryList | None) -> None:
        """Raises ``ValueError`` unless new tokens ``(b, n)`` with these arguments can follow."""
        if self.batch_size != x.shape[0]:
            raise ValueError(f"cache holds {self.batch_size} rows, got a batch of {x.shape[0]}")
        if mask is None and self.masked:
            raise ValueError("mask is None, but earlier tokens of the cache had a mask: pass the mask of all positions")
        if memories is not None and self.length:
            raise ValueError("knn_memories must be passed with the first tokens of a cache")

    def begin_steps(self) -> None:
        """Raises ``ValueError``: segments end at tokens that the host must know, and a memory is searched."""
        raise ValueError("its memory is searched and extended by the host")

    def begin(self, like: Tensor, memories: KNNMemoryList | None, adds: bool) -> None:
        """Allocates the buffers, in the dtype and on the device of ``like``; ``memories`` are copied."""
        self.adds = adds
        self.memories = self._make_memories() if memories is None else memories.selected(range(self.batch_size))
        for place in self.places:
            shape = (self.batch_size, place.key_heads, self.segment_length, 2, self.dim_head)
            # zeros, not empty: padding is multiplied by weights of zero, and NaN times zero is NaN
            self.segments.append(like.new_zeros(shape))
            if place.xl is not None:
                self.windows.append(like.new_zeros(*shape[:2], self.window, 2, self.dim_head))

    def pieces(self, x: Int[Tensor, "b n"], mask: Bool[Tensor, "b n"] | None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Splits new tokens where a row's segment is full; padding, where ``mask`` is False, is dropped.

        Yields pieces within one segment of each row: their columns ``(b, n)`` in ``x``, and a mask that is False at
        padding on the right (None if all rows are at the same place of their segments). Each piece must be appended
        before the next one is requested.
        """
        if mask is None:
            remaining = [x.shape[1]] * self.batch_size
            order = torch.arange(x.shape[1], device=x.device).expand_as(x)
        else:
            remaining = mask.sum(dim=1).tolist()
            order = (~mask).long().sort(dim=1, stable=True).indices  # real tokens first, in their order
        done = [0] * self.batch_size
        while any(remaining):
            take = [min(left, self.segment_length - fill) for left, fill in zip(remaining, self.fill, strict=True)]
            steps = torch.arange(max(take), device=x.device)
            starts = torch.tensor(done, device=x.device).unsqueeze(1)
            columns = order.gather(1, (steps + starts).clamp(max=x.shape[1] - 1))
            is_even = len(set(take)) == 1 and len(set(self.fill)) == 1
            inside = None if is_even else steps < torch.tensor(take, device=x.device).unsqueeze(1)
            remaining = [left - count for left, count in zip(remaining, take, strict=True)]
            done = [before + count for before, count in zip(done, take, strict=True)]
            yield columns, inside

    def past(self) -> Past:
        """Keys and values before the next piece."""
        device, used = self.segments[0].device, max(self.fill)
        fill = self.fill[:1] if len(set(self.fill)) == 1 else self.fill
        return Past(
            windows=self.windows,
            window_mask=self._window_mask(device),
            segments=[segment[:, :, :used] for segment in self.segments] if used else (),
            fill=torch.tensor(fill, device=device).unsqueeze(1),
            documents=None if self.documents is None else self.documents.ids[:, :used],
        )

    def _window_mask(self, device: torch.device) -> Bool[Tensor, "b m"] | None:
        if all(length == self.window for length in self.xl_lengths):
            return None
        lengths = torch.tensor(self.xl_lengths, device=device).unsqueeze(1)
        return torch.arange(self.window - 1, -1, -1, device=device) < lengths

    def append(
        self, kept: Sequence[Real[Tensor, "b _ n 2 _"]], mask: Tensor | None, documents: Documents | None
    ) -> None:
        """Adds the keys and values of a piece; full segments move to their rows' windows and memories."""
        n = kept[0].shape[2]
        counts = [n] * self.batch_size if mask is None else mask.sum(dim=1).tolist()
        ends = [fill + count for fill, count in zip(self.fill, counts, strict=True)]
        # rows at the same place are written together
        if mask is None:
            spans = [(slice(None), self.fill[0], ends[0])]
        else:
            spans = [(slice(row, row + 1), self.fill[row], ends[row]) for row in range(self.batch_size)]
        if documents is not None:
            shape = (self.batch_size, self.segment_length)
            ids = documents.ids.new_zeros(shape) if self.documents is None else self.documents.ids
            for rows, start, end in spans:
                ids[rows, start:end] = documents.ids[rows, : end - start]
            self.documents = Documents(ids, documents.open)
        for rows, start, end in spans:
            for segment, new in zip(self.segments, kept, strict=True):
                segment[rows, :, start:end] = new[rows, :, : end - start].to(segment.dtype)
        self.fill = ends
        full = [row for row, end in enumerate(ends) if end == self.segment_length]
        if full:
            self._commit(full)

    def _commit(self, rows: list[int]) -> None:
        """Moves the full segments of ``rows`` to their XL windows and memories."""
        index = torch.tensor(rows, device=self.segments[0].device)
        mask = self._window_mask(index.device)
        past = Past([window[index] for window in self.windows], None if mask is None else mask[index])
        kept = [segment[index] for segment in self.segments]
        with self.memories.at_batch_indices(rows):
            windows, window_mask = remember(
                self.places,
                kept,
                past,
                mask=None,
                documents=None if self.documents is None else self.documents.of(index),
                window=self.window,
                memories=self.memories if self.adds else None,
            )
        for window, new in zip(self.windows, windows, strict=True):
            window[index] = new
        lengths = [self.window] * len(rows) if window_mask is None else window_mask.sum(dim=1).tolist()
        for row, length in zip(rows, lengths, strict=True):
            self.fill[row] = 0
            self.xl_lengths[row] = length
        if self.documents is not None:
            self.documents = Documents(self.documents.ids, self.documents.open.index_fill(0, index, 0))

    def reorder(self, index: Int[Tensor, " rows"]) -> None:
        """Replaces row ``r`` by row ``index[r]``; the batch size may change."""
        rows = index.tolist()
        if rows == list(range(self.batch_size)):
            return  # copying memories is expensive
        self.batch_size = len(rows)
        self.fill = [self.fill[row] for row in rows]
        self.xl_lengths = [self.xl_lengths[row] for row in rows]
        self.segments = [segment.index_select(0, index) for segment in self.segments]
        self.windows = [window.index_select(0, index) for window in self.windows]
        self.memories = self.memories.selected(rows)
        if self.documents is not None:
            self.documents = self.documents.of(index)
