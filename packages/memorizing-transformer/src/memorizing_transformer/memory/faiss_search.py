"""Search through faiss indexes (extra ``faiss``, or ``gpu``): Flat, IVF, HNSW or any other factory string.

An index holds keys in the order they came; its number plus ``base`` is a token's position. On the CPU, tokens that have
left the ring stay in the index until a quarter of it is stale and it is rebuilt from the ring; meanwhile a selector
keeps them out of every result. An index that must be trained takes over once a row has enough keys, and is trained anew
whenever the row has doubled or a quarter of what it was trained on has gone; before that the search is exact.

A memory on a CUDA device is searched there if faiss was built for it (``faiss_index``); an HNSW index, which faiss has
only for the CPU, stays there.

| factory string | recall@32 on random unit vectors, d = 64, at least |
|---|---|
| Flat | 1 |
| IVF64,Flat with nprobe 40 | 0.9 |
| HNSW32 with ef_search 512 | 0.9 |

Legend: q queries, n keys, d feature, k neighbours.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memorizing_transformer.memory.faiss_index import CPUIndex, GPUIndex, empty_index, faiss_module, has_gpu

POINTS_PER_CLUSTER = 39  # below this many faiss's k-means warns
STALE_PART = 0.25


class FaissRow:
    """The index of one row.

    Args:
        dim: features of a key.
        factory: what ``faiss.index_factory`` takes.
        nprobe: clusters an IVF index looks into.
        ef_search: breadth of an HNSW index's search.
        device: where the keys are.

    Raises:
        ValueError: faiss knows no such index.
    """

    def __init__(self, *, dim: int, factory: str, nprobe: int, ef_search: int, device: torch.device) -> None:
        self.dim, self.factory, self.nprobe, self.ef_search, self.device = dim, factory, nprobe, ef_search, device
        self.base = 0
        self._index = self._new_index()
        # of the keys it was last trained on: how many, and the position of the first
        self._trained_on, self._trained_from = 0, 0
        self._needed = POINTS_PER_CLUSTER * self._index.clusters if self._index.must_be_trained else 0

    def _new_index(self) -> CPUIndex | GPUIndex:
        index = empty_index(self.dim, self.factory)
        if has_gpu(self.device) and not isinstance(index, faiss_module().IndexHNSW):
            return GPUIndex(index, device=self.device, nprobe=self.nprobe)
        return CPUIndex(index, nprobe=self.nprobe, ef_search=self.ef_search)

    @property
    def stop(self) -> int:
        """Position behind the last token in the index."""
        return self.base + len(self._index)

    def is_ready(self, size: int) -> bool:
        """Whether a row of ``size`` tokens is searched through the index."""
        return size > 0 and size >= self._needed

    def needs_rebuild(self, first: int, written: int) -> bool:
        """Whether the index must be built anew to hold the tokens ``first`` to ``written``."""
        size, stale = written - first, first - self.base
        if not self.is_ready(size):
            return False
        allowed = STALE_PART * size if self._index.can_skip else 0
        return self._is_outgrown(size) or self.stop > written or stale < 0 or stale > allowed

    def _is_outgrown(self, size: int) -> bool:
        return self._needed > 0 and size >= 2 * self._trained_on

    def rebuild(self, keys: Float[Tensor, "n d"], first: int) -> None:
        """Holds exactly ``keys``, those of the positions from ``first`` on."""
        gone = first - self._trained_from
        if self._is_outgrown(len(keys)) or (self._needed and not 0 <= gone <= STALE_PART * self._trained_on):
            self._index = self._new_index()
            self._index.train(keys)
            self._trained_on, self._trained_from = len(keys), first
        else:
            self._index.reset()
        self._index.add(keys)
        self.base = first

    def add(self, keys: Float[Tensor, "n d"]) -> None:
        """Adds the keys of the positions from ``stop`` on."""
        self._index.add(keys)

    def reset(self) -> None:
        """Holds nothing."""
        self._index, self.base, self._trained_on, self._trained_from = self._new_index(), 0, 0, 0

    def search(
        self, queries: Float[Tensor, "q d"], k: int, first: int
    ) -> tuple[Float[Tensor, "q k"], Int[Tensor, "q k"]]:
        """Scores and positions of the nearest tokens at or behind ``first``; positions of -1 where none was found."""
        scores, numbers = self._index.search(queries, k, skipped=first - self.base)
        return scores, torch.where(numbers >= 0, numbers + self.base, -1)
