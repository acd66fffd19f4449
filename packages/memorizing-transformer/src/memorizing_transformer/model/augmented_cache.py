"""Generation cache of ``MemoryAugmentedLM``: that of ``MemorizingTransformer``, and the model's own between segments.

The model's cache has, for each row, the window and the segment so far. It is dropped when a row's segment is full or a
document ends; the next call reads the tokens that are left in all windows again, padded on the left.

Legend: b batch, g key heads, s segment_length, m window.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from memorizing_transformer.memory.memory_list import KNNMemoryList
from memorizing_transformer.model.generation_cache import MemoryCache
from memorizing_transformer.model.segment import Documents


class AugmentedCache(MemoryCache):
    """The cache of ``MemoryAugmentedLM.init_cache``; opaque to ``lm_core.generate``.

    Args:
        incremental: False reads every piece without the model's own cache, with gradients.
        **settings: arguments of ``MemoryCache``; the last of ``places`` is that of the token ids.
    """

    def __init__(self, *, incremental: bool, **settings: Any) -> None:
        super().__init__(**settings)
        self.incremental = incremental
        self.live: Any = None
        self.live_mask: Tensor | None = None

    def begin(self, like: Tensor, memories: KNNMemoryList | None, adds: bool) -> None:
        """Allocates the buffers; see ``MemoryCache.begin``."""
        super().begin(like, memories, adds)
        for buffers, width in ((self.segments, self.segment_length), (self.windows, self.window)):
            buffers[-1] = torch.zeros(self.batch_size, 1, width, 2, 1, dtype=torch.long, device=like.device)

    @property
    def open_documents(self) -> Int[Tensor, " b"]:
        """The document that continues in each row."""
        if self.documents is None:
            return torch.zeros(self.batch_size, dtype=torch.long, device=self.segments[-1].device)
        return self.documents.open

    def context(self) -> list[Int[Tensor, " _"]]:
        """For each row, the tokens of its open document in the window and in the segment so far."""
        out = []
        for row in range(self.batch_size):
            segment = self.segments[-1][row, 0, : self.fill[row], 0, 0]
            window = self.windows[-1][row, 0, self.window - self.xl_lengths[row] :, 0, 0]
            if self.documents is not None:
                is_open = int(self.documents.open[row])
                segment = segment[self.documents.ids[row, : self.fill[row]] == is_open]
                window = window if is_open == 0 else window[:0]
            out.append(torch.cat((window, segment)))
        return out

    def append(self, kept: Sequence[Tensor], mask: Tensor | None, documents: Documents | None) -> None:
        """Adds a piece; drops the model's cache where a row's segment is full or a document ended."""
        was_open = self.open_documents
        ends = documents is not None and bool((documents.open != was_open).any())
        super().append(kept, mask, documents)
        if ends or not all(self.fill):
            self.live = None

    def reorder(self, index: Int[Tensor, " rows"]) -> None:
        """Replaces row ``r`` by row ``index[r]``; the batch size may change."""
        rows = index.tolist()
        if rows != list(range(self.batch_size)) and self.live is not None:
            self.live.reorder(index)
            self.live_mask = None if self.live_mask is None else self.live_mask.index_select(0, index)
        super().reorder(index)
