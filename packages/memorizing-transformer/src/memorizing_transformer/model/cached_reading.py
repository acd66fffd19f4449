"""Reading new tokens behind what a cache holds, as generation does.

The tokens are cut where a row's segment is full: there its memory grows, exactly as after a training segment. Rows of
different lengths stand at different places of their segments, so each goes as far as the end of its own.

Legend: b batch, n new tokens, d feature.
"""

import torch
from torch import Tensor

from memorizing_transformer.model.generation_cache import MemoryCache
from memorizing_transformer.model.layers import FeaturesOf
from memorizing_transformer.model.segment import find_documents, visible_pairs


class CachedReader:
    """Reads pieces of text into a cache.

    Args:
        cache: holds what was read before, and then the new tokens too.
        features_of: the model from token ids to features; see ``Layers.forward`` for what else it takes.
        features: d of what it gives.
        sos_id: token that begins a document.
        eos_id: token that ends one.
    """

    def __init__(
        self, cache: MemoryCache, *, features_of: FeaturesOf, features: int, sos_id: int | None, eos_id: int | None
    ) -> None:
        self.cache, self.features_of, self.features = cache, features_of, features
        self.sos_id, self.eos_id = sos_id, eos_id

    def read(self, x: Tensor, fresh_mask: Tensor | None) -> Tensor:
        """Features ``(b, n, d)`` of new tokens ``(b, n)``; ``fresh_mask`` is False at padding among them."""
        if fresh_mask is None and self.cache.is_even():
            return self._read_evenly(x)
        return self._read_row_by_row(x, torch.ones_like(x, dtype=torch.bool) if fresh_mask is None else fresh_mask)

    def _read_evenly(self, x: Tensor) -> Tensor:
        """Pieces up to the next end of a segment, the same in all rows."""
        outputs: list[Tensor] = []
        while x.shape[1]:
            if not self.cache.is_even():  # rows forgot different documents
                return torch.cat((*outputs, self._read_row_by_row(x, torch.ones_like(x, dtype=torch.bool))), dim=1)
            piece = x[:, : self.cache.segment_length - self.cache.fill[0]]
            outputs.append(self._read_piece(piece, None))
            x = x[:, piece.shape[1] :]
        return torch.cat(outputs, dim=1)

    def _read_row_by_row(self, x: Tensor, valid: Tensor) -> Tensor:
        """Pieces in which each row goes as far as the end of its own segment; padding is left out."""
        cache = self.cache
        order = (~valid).long().sort(dim=1, stable=True).indices  # real tokens first, in their order
        remaining, done = valid.sum(dim=1).tolist(), [0] * x.shape[0]
        # zeros stay where there is padding
        out = cache.segments[0].new_zeros(*x.shape, self.features)
        while any(remaining):
            take = [min(left, cache.segment_length - fill) for left, fill in zip(remaining, cache.fill, strict=True)]
            n = max(take)
            steps = torch.arange(n, device=x.device)
            inside = steps < torch.tensor(take, device=x.device).unsqueeze(1)
            places = (steps + torch.tensor(done, device=x.device).unsqueeze(1)).clamp(max=x.shape[1] - 1)
            columns = order.gather(1, places)
            features = self._read_piece(x.gather(1, columns), inside)
            out[inside.nonzero()[:, 0], columns[inside]] = features[inside]
            remaining = [left - count for left, count in zip(remaining, take, strict=True)]
            done = [before + count for before, count in zip(done, take, strict=True)]
        return out

    def _read_piece(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """Tokens that stay within one segment of each row; ``valid`` is False at padding on the right."""
        cache, n = self.cache, x.shape[1]
        counts = [n] * x.shape[0] if valid is None else valid.sum(dim=1).tolist()
        used = max(fill + count for fill, count in zip(cache.fill, counts, strict=True))
        starts = torch.tensor(cache.fill[:1] if valid is None else cache.fill, device=x.device).unsqueeze(1)
        query_positions = starts + torch.arange(n, device=x.device)
        columns = torch.arange(-cache.window, used, device=x.device)
        distances = query_positions.unsqueeze(2) - columns
        documents = find_documents(x, sos_id=self.sos_id, eos_id=self.eos_id, mask=valid, before=cache.open_documents)
        cache.write_documents(documents, counts)
        is_uniform = valid is None and documents is None and cache.xl_lengths[0] == cache.window
        visible = visible_pairs(
            distances,
            past=cache.window,
            past_mask=None if is_uniform or not cache.window else cache.past_mask(x.device),
            query_documents=None if documents is None else documents.ids,
            key_documents=None if documents is None or cache.documents is None else cache.documents[:, :used],
        )

        def remember(number: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            return cache.remember(number, k, v, used, valid)

        features = self.features_of(
            x,
            distances=distances,
            visible=visible,
            past=cache.window,
            documents=documents,
            memories=cache.memories,
            remember=remember,
        )
        cache.advance(counts)
        return features
