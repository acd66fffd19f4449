"""The memory of one layer: keys and values of past tokens, searched for the nearest keys of each query.

Not differentiable: stored and retrieved keys and values carry no gradient (arXiv 2203.08913, section 3.1). Each batch
row has its own memory, evicted first in, first out. The model adds a segment only after its search, so no segment
retrieves itself. With several key heads each has its own keys, and tensors have a dimension of heads after the batch.

Legend: b batch rows in scope, n tokens, h key heads, d feature, k neighbours.
"""

import copy
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lm_core.checkpoints.atomic_io import new_file
from lm_core.checkpoints.tensor_files import load_tensors, save_tensors
from lm_core.checks import check_mask, check_positive, typed
from memorizing_transformer.memory.disk_storage import DiskStorage
from memorizing_transformer.memory.exact_search import (
    ACCELERATOR_SCORES,
    CPU_CHUNK,
    SCREENED_CHUNK,
    batched_top_k,
    exact_top_k,
    screened_top_k,
    worth_screening,
)
from memorizing_transformer.memory.faiss import FaissIndex, FaissRow
from memorizing_transformer.memory.ring_storage import RingStorage, StorageFormat

Backend = Literal["exact", "faiss"]
STATE_VERSION = 1


@dataclass(frozen=True)
class Retrieved:
    """Result of a search.

    Attributes:
        kv: keys and values, zero where ``mask`` is False.
        mask: True where there is a k-th neighbour.
        scores: inner products, greatest first; -inf where ``mask`` is False.
        positions: number of each token, counted from 0 since its row was cleared; -1 where ``mask`` is False.
    """

    kv: Float[Tensor, "b ... k 2 d"]
    mask: Bool[Tensor, "b ... k"]
    scores: Float[Tensor, "b ... k"]
    positions: Int[Tensor, "b ... k"]


class KNNMemory:
    """Memory of ``num_indices`` batch rows. Copies and pickles are in memory, also those of a memory in files.

    Args:
        dim: features of a key, and of a value.
        max_memories: capacity of a row in tokens; when full, the oldest are evicted.
        num_indices: batch rows.
        memmap_filename: folder of memory-mapped files for the memory; None keeps it on ``device``.
        multiprocessing: accepted for compatibility, without effect.
        backend: "exact" search, or an index of "faiss".
        heads: key heads; 1 means that all query heads share the keys.
        storage: stored number format, "float32", "bfloat16" or "int8".
        device: device for storage and search.
        index: factory string of faiss.
        nprobe: clusters searched in an IVF index.
        ef_search: breadth of the search in an HNSW index.

    Raises:
        ValueError: a size below 1, an unknown name, or a folder with another memory.
        RuntimeError: another memory uses the folder.
        ImportError: ``backend="faiss"`` without faiss.
    """

    @typed
    def __init__(
        self,
        dim: int,
        max_memories: int = 16000,
        num_indices: int = 1,
        memmap_filename: str | Path | None = None,
        multiprocessing: bool = False,
        *,
        backend: Backend = "exact",
        heads: int = 1,
        storage: StorageFormat = "float32",
        device: torch.device | str = "cpu",
        index: str = "Flat",
        nprobe: int = 40,
        ef_search: int = 512,
    ) -> None:
        sizes = {"dim": dim, "max_memories": max_memories, "num_indices": num_indices, "heads": heads}
        for name, value in {**sizes, "nprobe": nprobe, "ef_search": ef_search}.items():
            check_positive(value, name)
        place = torch.device(device)
        if memmap_filename is not None and place.type != "cpu":
            raise ValueError(f"a memory in files is searched on the CPU, got device {place}")
        if multiprocessing:
            warn_without_effect("multiprocessing")
        self.dim = dim
        self.max_memories = max_memories
        self.num_indices = num_indices
        self.heads = heads
        self._new_index = partial(FaissIndex, dim=dim, factory=index, nprobe=nprobe, ef_search=ef_search, device=place)
        rows = num_indices * heads
        # one for each row, or none for the exact search; made first: a wrong factory string must not leave files
        self.indexes = [FaissRow(self._new_index) for _ in range(rows if backend == "faiss" else 0)]
        shape: dict[str, Any] = {"rows": rows, "capacity": max_memories, "dim": dim, "storage": storage}
        self.store: RingStorage = (
            RingStorage(device=place, **shape) if memmap_filename is None else DiskStorage(memmap_filename, **shape)
        )
        self.scoped_indices = list(range(num_indices))
        self._update_indexes(range(rows))

    def __copy__(self) -> "KNNMemory":
        return copy.deepcopy(self)  # two owners of one storage would miss each other's tokens

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "indexes": len(self.indexes)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self.indexes = [FaissRow(self._new_index) for _ in range(state["indexes"])]
        self._update_indexes(range(self.store.rows))

    def _stored(self, rows: Iterable[int]) -> list[int]:
        """Storage rows of the heads of batch rows."""
        return [row * self.heads + head for row in rows for head in range(self.heads)]

    def _update_indexes(self, stored: Iterable[int]) -> None:
        for row in stored if self.indexes else ():
            self.indexes[row].update(self.store, row)

    def __len__(self) -> int:
        """Number of tokens in all rows together."""
        return sum(self.sizes)

    @property
    def sizes(self) -> list[int]:
        """Number of tokens in each batch row, in scope or not."""
        return [self.store.size(row * self.heads) for row in range(self.num_indices)]

    @property
    def nbytes(self) -> int:
        """Bytes taken by keys and values."""
        return self.store.nbytes

    def set_scoped_indices(self, indices: Sequence[int]) -> None:
        """Sets the batch rows that ``add`` and ``search`` work on, in this order.

        Raises:
            ValueError: a row comes twice or does not exist.
        """
        rows = [int(index) for index in indices]
        self._check_rows(rows)
        self.scoped_indices = rows

    @contextmanager
    def at_batch_indices(self, indices: Sequence[int]) -> Iterator["KNNMemory"]:
        """``set_scoped_indices`` for a block; the previous rows are restored at its end, also after an error."""
        before = self.scoped_indices
        self.set_scoped_indices(indices)
        try:
            yield self
        finally:
            self.scoped_indices = before

    def _check_rows(self, rows: Sequence[int]) -> None:
        if len(set(rows)) != len(rows):
            raise ValueError(f"batch rows must be different from each other, got {rows}")
        if not rows or min(rows) < 0 or max(rows) >= self.num_indices:
            raise ValueError(f"batch rows must be in [0, {self.num_indices}), got {rows}")

    def add(self, memories: Float[Tensor, "b ... 2 d"], mask: Bool[Tensor, "b n"] | None = None) -> None:
        """Adds tokens after those of each row in scope.

        Args:
            memories: keys and values ``(b, n, 2, d)``, with several key heads ``(b, h, n, 2, d)``.
            mask: True at tokens to add; None adds all.

        Raises:
            ValueError: a shape does not fit, or a number is not finite (checked on the CPU); nothing is added then.
            TypeError: ``memories`` are not floating point, or the mask is not boolean.
        """
        self._check_added(memories, mask)
        by_head = memories.detach() if self.heads > 1 else memories.detach().unsqueeze(1)
        rows, new = [], []
        for index, row in enumerate(self.scoped_indices):
            kept = by_head[index] if mask is None else by_head[index][:, mask[index].to(memories.device)]
            if kept.shape[1]:
                rows += self._stored([row])
                new += list(kept)
        if rows:
            self.store.append(rows, new)
            self._update_indexes(rows)

    @property
    def _lead(self) -> tuple[int, ...]:
        """Leading sizes of a tensor: rows in scope, and key heads if several."""
        b = len(self.scoped_indices)
        return (b, self.heads) if self.heads > 1 else (b,)

    def _check_added(self, memories: Tensor, mask: Tensor | None) -> None:
        if not memories.is_floating_point():
            raise TypeError(f"memories must be floating point, got dtype {memories.dtype}")
        lead = self._lead
        n = memories.shape[-3] if memories.ndim == len(lead) + 3 else -1
        if memories.shape != (*lead, n, 2, self.dim):
            expected = ", ".join(str(size) for size in (*lead, "n", 2, self.dim))
            raise ValueError(f"memories must have shape ({expected}), got {tuple(memories.shape)}")
        if mask is not None:
            check_mask(mask, "mask", (lead[0], n))
        if memories.device.type == "cpu" and not bool(torch.isfinite(memories).all()):
            raise ValueError("memories must be finite, got inf or NaN")

    def clear(self, batch_indices: int | Sequence[int] | None = None) -> None:
        """Empties batch rows (all by default), in scope or not.

        Raises:
            ValueError: a row comes twice or does not exist.
        """
        chosen = range(self.num_indices) if batch_indices is None else batch_indices
        rows = [chosen] if isinstance(chosen, int) else [int(index) for index in chosen]
        if not rows:
            return
        self._check_rows(rows)
        stored = self._stored(rows)
        self.store.clear(stored)
        for row in stored if self.indexes else ():
            self.indexes[row].reset()

    def search(
        self,
        queries: Float[Tensor, "b ... d"],
        topk: int,
        nprobe: int | None = None,
        increment_hits: bool | None = None,
        increment_age: bool | None = None,
    ) -> tuple[Float[Tensor, "b ... k 2 d"], Bool[Tensor, "b ... k"]]:
        """Keys and values of the nearest tokens, nearest first, and a mask that is False where there is no k-th one.

        Args:
            queries: ``(b, ..., d)``, with several key heads ``(b, h, ..., d)``.
            topk: number of neighbours.
            nprobe, increment_hits, increment_age: accepted for compatibility, without effect.

        Raises:
            ValueError: a shape does not fit, or ``topk`` is below 1.
        """
        for name, value in (("nprobe", nprobe), ("increment_hits", increment_hits), ("increment_age", increment_age)):
            if value is not None:
                warn_without_effect(name)
        retrieved = self.retrieve(queries, topk)
        return retrieved.kv, retrieved.mask

    @torch.no_grad()
    def retrieve(self, queries: Float[Tensor, "b ... d"], topk: int) -> Retrieved:
        """``search`` that also returns scores and positions."""
        check_positive(topk, "topk")
        lead, stored, place = self._lead, self._stored(self.scoped_indices), self.store.device
        if queries.ndim < len(lead) + 1 or (*queries.shape[: len(lead)], queries.shape[-1]) != (*lead, self.dim):
            expected = ", ".join(str(size) for size in (*lead, "...", self.dim))
            raise ValueError(f"queries must have shape ({expected}), got {tuple(queries.shape)}")
        flat = queries.detach().to(place).reshape(len(stored), -1, self.dim)
        if place.type != "cpu" and not self.indexes and flat.numel():
            return self._search_together(stored, flat, topk, queries)
        shape = (*flat.shape[:2], topk)
        # rows are searched one by one and write their results here
        kv = torch.empty(*shape, 2, self.dim, dtype=queries.dtype, device=place)
        scores = torch.full(shape, -math.inf, dtype=torch.promote_types(queries.dtype, torch.float32), device=place)
        positions = torch.full(shape, -1, dtype=torch.long, device=place)
        for index, row in enumerate(stored if flat.shape[1] else ()):
            if size := self.store.size(row):
                scores[index], positions[index], slots = self._search_row(row, flat[index].to(scores.dtype), topk)
                self.store.read(row, slots, out=kv[index])
                if size < topk or self.indexes:
                    kv[index].masked_fill_(rearrange(positions[index] < 0, "q k -> q k 1 1"), 0.0)
            else:
                kv[index].zero_()
        kv, scores, positions = (
            part.to(queries.device).reshape(*queries.shape[:-1], topk, *part.shape[3:])
            for part in (kv, scores, positions)
        )
        return Retrieved(kv=kv, mask=positions >= 0, scores=scores, positions=positions)

    def _search_together(self, stored: list[int], flat: Tensor, k: int, queries: Tensor) -> Retrieved:
        """The search of all rows in one product a chunk, for accelerators; the host waits for nothing."""
        store = self.store
        dtype = torch.promote_types(queries.dtype, torch.float32)
        shape = (*queries.shape[:-1], k)
        if not any(store.size(row) for row in stored):
            return Retrieved(
                kv=queries.new_zeros(*shape, 2, self.dim),
                mask=torch.zeros(shape, dtype=torch.bool, device=queries.device),
                scores=torch.full(shape, -math.inf, dtype=dtype, device=queries.device),
                positions=torch.full(shape, -1, device=queries.device),
            )
        size = max(1024, ACCELERATOR_SCORES // (flat.shape[0] * flat.shape[1]))
        # an autocast region around the model would round the products
        with torch.autocast(store.device.type, enabled=False):
            scores, slots = batched_top_k(flat.to(dtype), store.batched_key_chunks(stored, size, dtype), k)
        positions = store.batched_positions(stored, slots)
        kv = store.batched_read(stored, slots, queries.dtype)
        if min(store.size(row) for row in stored) < k:
            missing = scores.isneginf()
            positions = positions.masked_fill(missing, -1)
            kv = kv.masked_fill(missing[..., None, None], 0.0)
        kv, scores, positions = (
            part.to(queries.device).reshape(*shape, *part.shape[3:]) for part in (kv, scores, positions)
        )
        return Retrieved(kv=kv, mask=positions >= 0, scores=scores, positions=positions)

    def _search_row(self, row: int, queries: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Scores, positions and slots of the nearest tokens of a row that is not empty."""
        store, size = self.store, self.store.size(row)
        if self.indexes and self.indexes[row].is_ready(size):
            scores, positions = self.indexes[row].search(queries, k, store.first[row])
            return scores.masked_fill(positions < 0, -math.inf), positions, positions.clamp(min=0) % self.max_memories

        chunks = partial(store.key_chunks, row, dtype=queries.dtype)
        # an autocast region around the model would round the products
        with torch.autocast(store.device.type, enabled=False):
            if worth_screening(queries, size):
                screened = partial(chunks, SCREENED_CHUNK)
                scores, slots = screened_top_k(queries, screened, k, partial(store.products, row))
            else:
                scores, slots = exact_top_k(queries, chunks(CPU_CHUNK), k)
        positions = store.positions(row, slots)
        if size < k:
            positions[:, size:] = -1
        return scores, positions, slots

    def selected(self, rows: Sequence[int]) -> "KNNMemory":
        """A copy, not on disk, whose batch row ``r`` is row ``rows[r]`` in scope; rows may repeat."""
        twin = KNNMemory.__new__(KNNMemory)
        twin.__dict__ |= self.__dict__
        stored = self._stored(self.scoped_indices[row] for row in rows)
        twin.store = self.store.selected(stored)
        twin.num_indices = len(rows)
        twin.scoped_indices = list(range(len(rows)))
        twin.indexes = [FaissRow(self._new_index) for _ in (stored if self.indexes else ())]
        twin._update_indexes(range(len(stored)))
        return twin

    def state_dict(self) -> dict[str, Any]:
        """All rows as tensors and numbers, for a checkpoint."""
        return {"format_version": STATE_VERSION, "heads": self.heads, **self.store.state()}

    def check_state(self, state: dict[str, Any]) -> None:
        """Raises ``ValueError`` unless ``state`` has the shape and number format of this memory, and is intact."""
        if not isinstance(state, dict):
            raise ValueError(f"the saved memory is damaged: it must be a dict, got {type(state).__name__}")
        expected = {"format_version": STATE_VERSION, "heads": self.heads}
        expected |= {name: getattr(self.store, name) for name in ("storage", "dim", "capacity")}
        for name, value in expected.items():
            if state.get(name) != value or type(state.get(name)) is not type(value):  # True equals 1
                raise ValueError(f"the memory was saved with {name} = {state.get(name)!r}, not {value!r}")
        self.store.check_state(state)
        counts = list(zip(state["first"], map(len, state["kv"]), strict=True))
        for row in range(self.num_indices):
            if len(set(counts[row * self.heads : (row + 1) * self.heads])) > 1:
                raise ValueError(f"the saved memory is damaged: the key heads of row {row} have different tokens")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replaces the content by that of ``state``.

        Raises:
            ValueError: the shape or number format differs; nothing is changed then.
        """
        self.check_state(state)
        self.store.load_state(state)
        for index in self.indexes:
            index.reset()
        self._update_indexes(range(self.store.rows))

    @typed
    def save(self, path: str | Path) -> None:
        """Writes the memory to one file, atomically."""
        write_state(path, self.state_dict())

    @typed
    def load(self, path: str | Path) -> None:
        """Reads a file of ``save``.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, or of another shape or number format; nothing is changed then.
        """
        self.load_state_dict(read_state(path))

    def close(self) -> None:
        """Closes the files, if there are any."""
        if isinstance(self.store, DiskStorage):
            self.store.close()


def write_state(path: str | Path, state: Any) -> None:
    """Writes the state of one memory or of several to a file, atomically."""
    target = Path(path).expanduser()
    target.parent.mkdir(parents=True, exist_ok=True)
    with new_file(target) as temporary:
        save_tensors(temporary, state)


def read_state(path: str | Path, kind: type = dict) -> Any:
    """The content of a file of ``write_state``, of type ``kind``; errors as for ``KNNMemory.load``."""
    state = load_tensors(Path(path).expanduser())
    if not isinstance(state, kind):
        raise ValueError(f"{path} must hold a saved memory ({kind.__name__}), got {type(state).__name__}")
    return state


@cache
def warn_without_effect(name: str) -> None:
    """Warns, once per process, that an argument of the original has no effect."""
    warnings.warn(f"{name} is accepted for compatibility and has no effect", UserWarning, stacklevel=4)
