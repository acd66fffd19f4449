"""Search through faiss indexes (extra ``faiss``, or ``gpu``): Flat, IVF and HNSW.

Keys are in the index in the order they were added; a key's number plus ``base`` is a token's position. On the CPU,
tokens that have left the ring stay in the index until a quarter of it is stale and it is rebuilt; until then a selector
excludes them from results. Of the indexes that need training only IVF is supported: it is used once a row has enough
keys (before that the search is exact), and retrained whenever the row has doubled or a quarter of its training keys
have left the ring.

A memory on a CUDA device is searched there if faiss was built with GPU support; HNSW indexes run on the CPU, the only
place faiss has them. faiss's GPU indexes have no selectors, so there an index never keeps stale keys. Pointers are
passed from torch to faiss on torch's stream, without a copy to the host. ``faiss.contrib.torch_utils`` would do the
same, but patches every faiss class in the process, and its ``search`` takes no parameters.

| factory string | recall@32 on random unit vectors, d = 64, at least |
|---|---|
| Flat | 1 |
| IVF64,Flat with nprobe 40 | 0.9 |
| HNSW32 with ef_search 512 | 0.9 |

Legend: q queries, n keys, d feature, k neighbours.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memorizing_transformer.memory.ring_storage import RingStorage

POINTS_PER_CLUSTER = 39  # below this many faiss's k-means warns
STALE_PART = 0.25
# Workspace shared by all indexes on a GPU; faiss allocates 1.5 GB by default.
GPU_WORKSPACE_BYTES = 256 * 2**20
MOST_NEIGHBOURS_ON_GPU = 2048


def faiss_module() -> Any:
    """The module ``faiss``, imported on first use.

    Raises:
        ImportError: faiss is not installed; the message names its packages.
    """
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            'backend="faiss" needs faiss: pip install faiss-cpu, or on Linux with an NVIDIA GPU faiss-gpu; '
            'backend="exact" needs neither'
        ) from error
    return faiss


def has_gpu(device: torch.device) -> bool:
    """True if faiss can search on ``device``: a CUDA device, and faiss built with GPU support."""
    faiss = faiss_module()
    return device.type == "cuda" and hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


@cache
def gpu_resources() -> Any:
    """The workspace shared by all GPU indexes."""
    resources = faiss_module().StandardGpuResources()
    resources.setTempMemory(GPU_WORKSPACE_BYTES)
    return resources


class FaissIndex:
    """A faiss index that takes and returns tensors; arguments as for ``KNNMemory`` (``factory`` is its ``index``).

    With ``squared_l2`` scores are squared L2 distances, least first, instead of inner products, greatest first.

    Attributes:
        can_skip: whether ``search`` can exclude the oldest keys.
        clusters: number of clusters of an IVF index, which ``train`` must find before ``add``; else 0.

    Raises:
        ValueError: faiss has no such index, or not for ``device``; or it needs training and is not IVF.
    """

    def __init__(
        self, *, dim: int, factory: str, nprobe: int, ef_search: int, device: torch.device, squared_l2: bool = False
    ) -> None:
        faiss = faiss_module()
        try:
            metric = faiss.METRIC_L2 if squared_l2 else faiss.METRIC_INNER_PRODUCT
            index = faiss.index_factory(dim, factory, metric)
        except RuntimeError as error:
            raise ValueError(f"index must be a factory string of faiss, got {factory!r}: {error}") from error
        ivf = faiss.try_extract_index_ivf(index)
        if ivf is None and not index.is_trained:
            raise ValueError(f"index must be Flat, HNSW or IVF; only IVF may need training, got {factory!r}")
        on_gpu = has_gpu(device) and not isinstance(index, faiss.IndexHNSW)
        self.index = index
        self.device = device if on_gpu else torch.device("cpu")
        self.nprobe = nprobe
        self.ef_search = ef_search
        self.can_skip = not on_gpu
        self.clusters = 0 if ivf is None else int(ivf.nlist)
        if not on_gpu:
            return
        try:
            gpu = torch.cuda.current_device() if device.index is None else device.index
            self.index = faiss.index_cpu_to_gpu(gpu_resources(), gpu, index)
        except RuntimeError as error:
            raise ValueError(f"index must be one that faiss has for GPUs, got {factory!r}: {error}") from error
        if self.clusters:
            faiss.GpuParameterSpace().set_index_parameter(self.index, "nprobe", nprobe)

    def __len__(self) -> int:
        return int(self.index.ntotal)

    def train(self, keys: Float[Tensor, "n d"]) -> None:
        """Trains an IVF index on ``keys``."""
        keys = self._ready(keys)
        self.index.train_c(len(keys), _floats(keys))

    def add(self, keys: Float[Tensor, "n d"]) -> None:
        """Appends ``keys``; their numbers start at the current length."""
        keys = self._ready(keys)
        self.index.add_c(len(keys), _floats(keys))

    def reset(self) -> None:
        """Removes the keys; trained clusters stay."""
        self.index.reset()

    def search(
        self, queries: Float[Tensor, "q d"], k: int, *, skipped: int
    ) -> tuple[Float[Tensor, "q k"], Int[Tensor, "q k"]]:
        """Scores and numbers of the nearest keys other than the first ``skipped``.

        Raises:
            ValueError: ``k`` is more than faiss supports on a GPU.
        """
        faiss = faiss_module()
        if not self.can_skip and k > MOST_NEIGHBOURS_ON_GPU:
            raise ValueError(f"topk must be at most {MOST_NEIGHBOURS_ON_GPU} for faiss on a GPU, got {k}")
        selector = faiss.IDSelectorRange(skipped, len(self)) if skipped > 0 else None
        parameters = self._parameters(self.index, k, selector) if self.can_skip else None
        ready = self._ready(queries)
        scores = torch.empty(len(ready), k, device=self.device)
        numbers = torch.empty(len(ready), k, device=self.device, dtype=torch.long)
        pointer = faiss.cast_integer_to_idx_t_ptr(numbers.data_ptr())
        self.index.search_c(len(ready), _floats(ready), k, _floats(scores), pointer, parameters)
        return scores.to(queries), numbers.to(queries.device)

    def _parameters(self, index: Any, k: int, selector: Any) -> Any:
        faiss = faiss_module()
        settings = {} if selector is None else {"sel": selector}
        if isinstance(index, faiss.IndexPreTransform):
            inner = self._parameters(faiss.downcast_index(index.index), k, selector)
            return None if inner is None else faiss.SearchParametersPreTransform(index_params=inner)
        if isinstance(index, faiss.IndexIVF):
            return faiss.SearchParametersIVF(nprobe=self.nprobe, **settings)
        if isinstance(index, faiss.IndexHNSW):
            return faiss.SearchParametersHNSW(efSearch=max(self.ef_search, k), **settings)
        return faiss.SearchParameters(**settings) if settings else None

    def _ready(self, rows: Tensor) -> Tensor:
        """``rows`` in float32 and contiguous; on a GPU, faiss is set to torch's current stream."""
        rows = rows.detach().to(self.device, torch.float32).contiguous()
        if self.device.type == "cuda":
            stream = faiss_module().cast_integer_to_cudastream_t(torch.cuda.current_stream(self.device).cuda_stream)
            gpu_resources().setDefaultStream(rows.get_device(), stream)
        return rows


def _floats(tensor: Tensor) -> Any:
    return faiss_module().cast_integer_to_float_ptr(tensor.data_ptr())


class FaissRow:
    """The index of one row of a memory; ``new_index`` returns an empty index."""

    def __init__(self, new_index: Callable[[], FaissIndex]) -> None:
        self._new_index = new_index
        self.reset()
        self._needed = POINTS_PER_CLUSTER * self.index.clusters

    def is_ready(self, size: int) -> bool:
        """True if a row of ``size`` tokens is searched through the index."""
        return size > 0 and size >= self._needed

    def reset(self) -> None:
        """Removes the keys and the trained clusters."""
        self.index = self._new_index()
        self.base = 0
        # number of keys of the last training, and position of the first
        self._trained_on = 0
        self._trained_from = 0

    def update(self, store: RingStorage, row: int) -> None:
        """Adds the new tokens of ``row`` of ``store``, and drops those overwritten there."""
        first, written = store.first[row], store.written[row]
        size, stale, stop = written - first, first - self.base, self.base + len(self.index)
        if not self.is_ready(size):
            return
        allowed = STALE_PART * size if self.index.can_skip else 0
        is_stale = not 0 <= stale <= allowed or not first <= stop <= written
        if len(self.index) == 0 or is_stale or self._is_outgrown(size):
            self._rebuild(store.tokens(row)[:, 0], first)
        elif stop < written:
            self.index.add(store.tokens(row, stop)[:, 0])

    def _is_outgrown(self, size: int) -> bool:
        return self._needed > 0 and size >= 2 * self._trained_on

    def _rebuild(self, keys: Float[Tensor, "n d"], first: int) -> None:
        """Replaces the content by ``keys``, those of the positions from ``first`` on."""
        gone = first - self._trained_from
        if self._is_outgrown(len(keys)) or (self._needed and not 0 <= gone <= STALE_PART * self._trained_on):
            self.index = self._new_index()
            self.index.train(keys)
            self._trained_on = len(keys)
            self._trained_from = first
        else:
            self.index.reset()
        self.index.add(keys)
        self.base = first

    def search(
        self, queries: Float[Tensor, "q d"], k: int, first: int
    ) -> tuple[Float[Tensor, "q k"], Int[Tensor, "q k"]]:
        """Scores and positions of the nearest tokens from position ``first`` on; -1 where there are none."""
        scores, numbers = self.index.search(queries, k, skipped=first - self.base)
        return scores, torch.where(numbers >= 0, numbers + self.base, -1)
