"""Search through faiss indexes (extra ``faiss``): Flat, IVF, HNSW or any other factory string.

An index holds keys in the order they came; its number plus ``base`` is a token's position. Tokens that have left the
ring stay in the index until a quarter of it is stale and it is rebuilt from the ring; meanwhile a selector keeps them
out of every result. An index that must be trained takes over once a row has enough keys, and is trained anew whenever
the row has doubled; before that the search is exact.

| factory string | recall@32 on random unit vectors, d = 64, at least |
|---|---|
| Flat | 1 |
| IVF64,Flat with nprobe 40 | 0.9 |
| HNSW32 with ef_search 512 | 0.9 |
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

POINTS_PER_CLUSTER = 39  # below this many faiss's k-means warns
STALE_PART = 0.25


def faiss_module() -> Any:
    """The module ``faiss``.

    Raises:
        ImportError: neither extra is installed; the message names both.
    """
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            'backend="faiss" needs faiss: pip install "memorizing-transformer[faiss]", or on Linux with an NVIDIA GPU '
            '"memorizing-transformer[gpu]"; backend="exact" needs neither'
        ) from error
    return faiss


class FaissRow:
    """The index of one row.

    Args:
        dim: features of a key.
        factory: what ``faiss.index_factory`` takes.
        nprobe: clusters an IVF index looks into.
        ef_search: breadth of an HNSW index's search.

    Raises:
        ValueError: faiss knows no such index.
    """

    def __init__(self, *, dim: int, factory: str, nprobe: int, ef_search: int) -> None:
        self.dim, self.factory, self.nprobe, self.ef_search = dim, factory, nprobe, ef_search
        self._faiss = faiss_module()
        self._index = self._new_index()
        self.base = 0
        self._trained_on = 0
        self._needed = 0
        if not self._index.is_trained:
            self._needed = POINTS_PER_CLUSTER * int(self._faiss.extract_index_ivf(self._index).nlist)

    def _new_index(self) -> Any:
        try:
            return self._faiss.index_factory(self.dim, self.factory, self._faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            raise ValueError(f"index must be a factory string of faiss, got {self.factory!r}: {error}") from error

    @property
    def stop(self) -> int:
        """Position behind the last token in the index."""
        return self.base + int(self._index.ntotal)

    def is_ready(self, size: int) -> bool:
        """Whether a row of ``size`` tokens is searched through the index."""
        return size > 0 and size >= self._needed

    def needs_rebuild(self, first: int, written: int) -> bool:
        """Whether the index must be built anew to hold the tokens ``first`` to ``written``."""
        size = written - first
        if not self.is_ready(size):
            return False
        stale = first - self.base
        outgrown = self._needed > 0 and size >= 2 * self._trained_on
        return outgrown or self.stop > written or self.base > first or stale > STALE_PART * size

    def rebuild(self, keys: NDArray[np.float32], first: int) -> None:
        """Holds exactly ``keys``, those of the positions from ``first`` on."""
        self._index = self._new_index()
        if not self._index.is_trained:
            self._index.train(keys)
            self._trained_on = len(keys)
        self._index.add(keys)
        self.base = first

    def add(self, keys: NDArray[np.float32]) -> None:
        """Adds the keys of the positions from ``stop`` on."""
        self._index.add(keys)

    def reset(self) -> None:
        """Holds nothing."""
        self._index, self.base, self._trained_on = self._new_index(), 0, 0

    def search(self, queries: NDArray[np.float32], k: int, first: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Scores and positions of the nearest tokens at or behind ``first``; positions of -1 where none was found."""
        faiss = self._faiss
        selector = faiss.IDSelectorRange(first - self.base, int(self._index.ntotal))
        settings = {"sel": selector} if first > self.base else {}
        if isinstance(self._index, faiss.IndexIVF):
            parameters = faiss.SearchParametersIVF(nprobe=self.nprobe, **settings)
        elif isinstance(self._index, faiss.IndexHNSW):
            parameters = faiss.SearchParametersHNSW(efSearch=max(self.ef_search, k), **settings)
        else:
            parameters = faiss.SearchParameters(**settings) if settings else None
        scores, numbers = self._index.search(queries, k, params=parameters)
        return scores, np.where(numbers >= 0, numbers + self.base, -1)
