"""One faiss index, on the CPU or on a CUDA device, that takes and gives tensors.

On the CPU a search can leave out the oldest keys. faiss's GPU indexes have no selectors: there whoever holds the index
must see to it that it has no keys that are to be left out.

Pointers go straight from torch to faiss on the GPU, on torch's stream; nothing passes through the host. The module
``faiss.contrib.torch_utils`` would do the same, but replaces the methods of every faiss class in the process, and its
``search`` takes no parameters.

Legend: q queries, n keys, d feature, k neighbours.
"""

from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

# What one GPU's indexes may use together while they work; faiss's own default takes 1.5 GB at once.
GPU_WORKSPACE_BYTES = 256 * 2**20
MOST_NEIGHBOURS_ON_GPU = 2048


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


def empty_index(dim: int, factory: str) -> Any:
    """faiss's own index for inner products.

    Raises:
        ValueError: faiss knows no such index.
    """
    faiss = faiss_module()
    try:
        return faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ValueError(f"index must be a factory string of faiss, got {factory!r}: {error}") from error


def has_gpu(device: torch.device) -> bool:
    """Whether faiss can search on ``device``: a CUDA device, and a faiss that was built for GPUs."""
    faiss = faiss_module()
    return device.type == "cuda" and hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


@cache
def _gpu_resources() -> Any:
    resources = faiss_module().StandardGpuResources()
    resources.setTempMemory(GPU_WORKSPACE_BYTES)
    return resources


class CPUIndex:
    """An index in main memory.

    Attributes:
        can_skip: whether ``search`` can leave out the oldest keys.
        must_be_trained: whether ``train`` must come before ``add``.
        clusters: of an IVF index, else 0.

    Args:
        index: empty, of faiss.
        nprobe: clusters an IVF index looks into.
        ef_search: breadth of an HNSW index's search.
    """

    can_skip = True

    def __init__(self, index: Any, *, nprobe: int, ef_search: int) -> None:
        self._index, self.nprobe, self.ef_search = index, nprobe, ef_search
        self.must_be_trained = not index.is_trained
        self.clusters = _clusters(index)

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def train(self, keys: Float[Tensor, "n d"]) -> None:
        """Learns clusters from ``keys``, if the index has any."""
        self._index.train(_rows(keys))

    def add(self, keys: Float[Tensor, "n d"]) -> None:
        """Numbers ``keys`` from its length on."""
        self._index.add(_rows(keys))

    def reset(self) -> None:
        """Holds no keys; what was learned stays."""
        self._index.reset()

    def search(
        self, queries: Float[Tensor, "q d"], k: int, *, skipped: int
    ) -> tuple[Float[Tensor, "q k"], Int[Tensor, "q k"]]:
        """Scores and numbers of the nearest keys other than the first ``skipped``."""
        selector = faiss_module().IDSelectorRange(skipped, len(self)) if skipped > 0 else None
        scores, numbers = self._index.search(_rows(queries), k, params=self._parameters(self._index, k, selector))
        return torch.from_numpy(scores).to(queries), torch.from_numpy(numbers).to(queries.device)

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


class GPUIndex:
    """An index in the memory of a CUDA device; attributes as for ``CPUIndex``.

    Args:
        index: empty, of faiss, on the CPU; it is copied.
        device: the device.
        nprobe: clusters an IVF index looks into.

    Raises:
        ValueError: faiss has no such index for GPUs.
    """

    can_skip = False

    def __init__(self, index: Any, *, device: torch.device, nprobe: int) -> None:
        faiss = faiss_module()
        self.device = device
        self.must_be_trained = not index.is_trained
        self.clusters = _clusters(index)
        number = (
            device.index if device.index is not None else torch.cuda.current_device() if device.type == "cuda" else 0
        )
        try:
            self._index = faiss.index_cpu_to_gpu(_gpu_resources(), number, index)
        except RuntimeError as error:
            raise ValueError(
                f"index must be one that faiss has for GPUs, got {type(index).__name__}: {error}"
            ) from error
        if self.clusters:
            faiss.GpuParameterSpace().set_index_parameter(self._index, "nprobe", nprobe)

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def train(self, keys: Float[Tensor, "n d"]) -> None:
        """Learns clusters from ``keys``, if the index has any."""
        keys = self._ready(keys)
        self._index.train_c(len(keys), _floats(keys))

    def add(self, keys: Float[Tensor, "n d"]) -> None:
        """Numbers ``keys`` from its length on."""
        keys = self._ready(keys)
        self._index.add_c(len(keys), _floats(keys))

    def reset(self) -> None:
        """Holds no keys; what was learned stays."""
        self._index.reset()

    def search(
        self, queries: Float[Tensor, "q d"], k: int, *, skipped: int
    ) -> tuple[Float[Tensor, "q k"], Int[Tensor, "q k"]]:
        """Scores and numbers of the nearest keys.

        Raises:
            ValueError: ``k`` is more than faiss gives on a GPU.
        """
        assert skipped == 0
        if k > MOST_NEIGHBOURS_ON_GPU:
            raise ValueError(f"topk must be at most {MOST_NEIGHBOURS_ON_GPU} for faiss on a GPU, got {k}")
        given = self._ready(queries)
        scores = torch.empty(len(given), k, device=self.device)
        numbers = torch.empty(len(given), k, device=self.device, dtype=torch.long)
        pointer = faiss_module().cast_integer_to_idx_t_ptr(numbers.data_ptr())
        self._index.search_c(len(given), _floats(given), k, _floats(scores), pointer)
        return scores.to(queries.dtype), numbers

    def _ready(self, rows: Tensor) -> Tensor:
        """Float32 and contiguous; what faiss does next follows what torch has begun on its stream."""
        rows = rows.to(self.device, torch.float32).contiguous()
        if self.device.type == "cuda":
            stream = faiss_module().cast_integer_to_cudastream_t(torch.cuda.current_stream(self.device).cuda_stream)
            _gpu_resources().setDefaultStream(rows.get_device(), stream)
        return rows


def _clusters(index: Any) -> int:
    faiss = faiss_module()
    ivf = faiss.try_extract_index_ivf(index)
    return 0 if ivf is None else int(ivf.nlist)


def _rows(tensor: Tensor) -> Any:
    return np.ascontiguousarray(tensor.detach().float().cpu().numpy())


def _floats(tensor: Tensor) -> Any:
    return faiss_module().cast_integer_to_float_ptr(tensor.data_ptr())
