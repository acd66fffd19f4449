"""A datastore for kNN-LM (arXiv 1911.00172, section 2): states of a model, each with the token that came next.

A folder has ``corpus.safetensors`` (the token ids, with a checksum, and what the datastore was made from) and ``keys``,
a ``DiskStorage`` of the states: they are counted only once written, so a kill at any instant leaves a prefix, and
building continues from there. Entry i belongs to the i-th token that has a next one in its document.

Search is by squared L2 distance, exact in chunks: with a last feature of -|k|^2 / 2 for keys and 1 for queries, the
nearest keys are those of the greatest inner product. Or through an index of faiss, which is built when it is opened.

Legend: n entries, q queries, k neighbours, d feature.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from lm_core.checkpoints.atomic_io import new_file, remove_leftovers
from lm_core.checkpoints.tensor_files import load_tensors, save_tensors
from lm_core.checks import check_positive, typed
from lm_core.data.documents import Documents
from memorizing_transformer.memory.disk_storage import DiskStorage
from memorizing_transformer.memory.exact_search import CPU_CHUNK, exact_top_k
from memorizing_transformer.memory.faiss import POINTS_PER_CLUSTER, FaissIndex

FORMAT_VERSION = 1
CORPUS_FILE, KEYS_FOLDER, LOCK_FILE = "corpus.safetensors", "keys", ".lock"


@dataclass(frozen=True)
class Neighbours:
    """Result of a search, nearest first.

    Attributes:
        distances: squared L2 distances, infinite where there are fewer than k entries.
        tokens: token after each neighbour; 0 where there is none.
        entries: number of each neighbour in the datastore, -1 where there is none.
    """

    distances: Float[Tensor, "q k"]
    tokens: Int[Tensor, "q k"]
    entries: Int[Tensor, "q k"]


class Datastore:
    """An existing datastore, opened for reading by any number of processes.

    Args:
        directory: folder of ``build_datastore``.
        index: factory string of faiss, such as "IVF256,Flat"; None searches exactly.
        nprobe: clusters searched in an IVF index.

    Raises:
        FileNotFoundError: the folder has no datastore.
        ValueError: it is damaged, or not complete; building continues when it is started again.
        ImportError: ``index`` without faiss.
    """

    @typed
    def __init__(self, directory: str | Path, *, index: str | None = None, nprobe: int = 32) -> None:
        self.directory = Path(directory).expanduser()
        check_positive(nprobe, "nprobe")
        if not (self.directory / CORPUS_FILE).is_file():
            raise FileNotFoundError(f"datastore must be a folder of build_datastore, got {self.directory}")
        self.corpus, self.made_from = read_corpus(self.directory)
        self.size, self.dim = num_entries(self.corpus), int(self.made_from["dim"])
        self._keys = open_keys(self.directory, self.made_from, self.size, read_only=True)
        if self._keys.size(0) < self.size:
            have = self._keys.size(0)
            self.close()
            raise ValueError(f"the datastore in {self.directory} has {have:,} of {self.size:,} entries: build it on")
        self._index = None if index is None else self._faiss(index, nprobe)

    def __len__(self) -> int:
        return self.size

    def close(self) -> None:
        """Closes the files."""
        self._keys.close()

    @property
    def nbytes(self) -> int:
        """Bytes of the keys."""
        return self._keys.nbytes

    def check(self, **expected: Any) -> None:
        """Raises ``ValueError`` unless the datastore was made from what is passed, such as ``model=fingerprint``."""
        for name, value in expected.items():
            stored = self.made_from.get(name)
            if value is not None and stored is not None and value != stored:
                raise ValueError(
                    f"the datastore in {self.directory} was made with another {name}: {stored}, not {value}; build a "
                    "new one"
                )

    @cached_property
    def _places(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Number of the first entry of each document, and the ids' index of its first token."""
        counts = np.maximum(self.corpus.lengths - 1, 0)
        return np.cumsum(counts) - counts, self.corpus.starts

    @cached_property
    def _next_tokens(self) -> Tensor:
        has_next = np.ones(len(self.corpus.ids), dtype=bool)
        has_next[(self.corpus.starts + self.corpus.lengths - 1)[self.corpus.lengths > 0]] = False
        return torch.from_numpy(self.corpus.ids[np.flatnonzero(has_next) + 1].astype(np.int64))

    def place(self, entry: int) -> tuple[int, int]:
        """Document and position in it of an entry's token."""
        firsts, _ = self._places
        counts = np.maximum(self.corpus.lengths - 1, 0)
        document = int(np.searchsorted(firsts + counts, entry, side="right"))
        return document, entry - int(firsts[document])

    @torch.no_grad()
    def search(self, queries: Float[Tensor, "q d"], k: int) -> Neighbours:
        """The ``k`` nearest entries of each query.

        Raises:
            ValueError: ``k`` is below 1, the queries have another size, or the files are damaged.
        """
        check_positive(k, "k")
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise ValueError(f"queries must have shape (q, {self.dim}), got {tuple(queries.shape)}")
        device = queries.device
        flat = queries.detach().cpu()
        flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
        if len(flat) == 0:
            distances, entries = flat.new_empty(0, k), torch.empty(0, k, dtype=torch.long)
        elif self._index is not None:
            distances, entries = self._index.search(flat.float(), k, skipped=0)
            distances = distances.to(flat.dtype)
            entries = entries.masked_fill(entries < 0, -1)
        else:
            with torch.autocast("cpu", enabled=False):
                scores, entries = exact_top_k(F.pad(flat, (0, 1), value=1.0), self._chunks(flat.dtype), k)
            distances = (flat.square().sum(1, keepdim=True) - 2 * scores).clamp(min=0.0)
            entries = entries.masked_fill(scores.isneginf(), -1)
        missing = entries < 0
        tokens = self._next_tokens[entries.clamp(min=0)].masked_fill(missing, 0)
        distances = distances.masked_fill(missing, torch.inf)
        return Neighbours(distances.to(device), tokens.to(device), entries.to(device))

    def _chunks(self, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        for first, keys in self._keys.key_chunks(0, CPU_CHUNK, dtype):
            yield first, torch.cat((keys, keys.square().sum(1, keepdim=True) / -2), dim=1)

    def _faiss(self, factory: str, nprobe: int) -> FaissIndex:
        index = FaissIndex(
            dim=self.dim,
            factory=factory,
            nprobe=nprobe,
            ef_search=512,
            device=torch.device("cpu"),
            squared_l2=True,
        )
        if index.clusters:
            wanted = max(index.clusters * POINTS_PER_CLUSTER, 1)
            if self.size < wanted:
                raise ValueError(f"index {factory!r} needs {wanted:,} entries for its clusters, got {self.size:,}")
            some = torch.linspace(0, self.size - 1, min(self.size, 4 * wanted)).long()
            out = torch.empty(len(some), 1, self.dim)
            self._keys.read(0, some, out=out)
            index.train(out[:, 0])
        for _, keys in self._keys.key_chunks(0, CPU_CHUNK, torch.float32):
            index.add(keys)
        return index


def num_entries(corpus: Documents) -> int:
    """Number of tokens with a next one in their document."""
    return int(np.maximum(corpus.lengths - 1, 0).sum())


def read_corpus(directory: Path) -> tuple[Documents, dict[str, Any]]:
    """The token ids of a datastore, and what it was made from.

    Raises:
        ValueError: the file is damaged or of another format.
    """
    path = directory / CORPUS_FILE
    stored = load_tensors(path)
    if not isinstance(stored, dict) or stored.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path} is no corpus of a datastore of format {FORMAT_VERSION}")
    lengths = stored["lengths"].numpy()
    sizes = stored["byte_lengths"].numpy()
    corpus = Documents(
        ids=stored["ids"].numpy().view(np.uint32),
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        byte_lengths=sizes,
    )
    return corpus, dict(stored["made_from"])


def open_keys(directory: Path, made_from: Mapping[str, Any], entries: int, *, read_only: bool) -> DiskStorage:
    """The storage of the keys; a new one if there is none and ``read_only`` is False."""
    return DiskStorage(
        directory / KEYS_FOLDER,
        rows=1,
        capacity=entries,
        dim=int(made_from["dim"]),
        storage=str(made_from["storage"]),
        parts=1,
        read_only=read_only,
    )


class DatastoreWriter:
    """A datastore that is being built; a context manager that locks its folder.

    Args:
        directory: new folder, or that of an unfinished datastore made from the same, which is continued.
        corpus: documents whose states are stored.
        made_from: model, tokenizer and settings; must have ``dim`` and ``storage``.

    Raises:
        RuntimeError: another process is building in the folder.
        ValueError: the folder has other content, or a datastore made from something else.
    """

    def __init__(self, directory: str | Path, corpus: Documents, made_from: Mapping[str, Any]) -> None:
        self.directory = Path(directory).expanduser()
        self.corpus = corpus
        self.made_from = {**made_from, "corpus": corpus.fingerprint}
        self._keys: DiskStorage | None = None

    def __enter__(self) -> "DatastoreWriter":
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.directory / LOCK_FILE)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise RuntimeError(f"another process is building a datastore in {self.directory}") from error
        try:
            remove_leftovers(self.directory)
            path = self.directory / CORPUS_FILE
            others = {entry.name for entry in self.directory.iterdir()} - {CORPUS_FILE, KEYS_FOLDER, LOCK_FILE}
            if others or (not path.is_file() and (self.directory / KEYS_FOLDER).exists()):
                raise ValueError(f"directory must be new or of a datastore, {self.directory} has {sorted(others)[:5]}")
            if path.is_file():
                stored = read_corpus(self.directory)[1]
                changed = [
                    f"{name} is {value}, but was {stored.get(name)}"
                    for name, value in self.made_from.items()
                    if stored.get(name) != value
                ]
                if changed:
                    raise ValueError(f"{self.directory} has another datastore: {', '.join(changed)}")
            else:
                self._write_corpus(path)
            self._keys = open_keys(self.directory, self.made_from, num_entries(self.corpus), read_only=False)
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        if self._keys is not None:
            self._keys.close()
        self._lock.release()

    @property
    def written(self) -> int:
        """Number of entries so far."""
        assert self._keys is not None
        return self._keys.size(0)

    def append(self, keys: Float[Tensor, "n d"]) -> None:
        """Adds the next entries.

        Raises:
            OSError: the disk is full; nothing was added.
            ValueError: a state is not finite.
        """
        assert self._keys is not None
        if not bool(torch.isfinite(keys).all()):
            raise ValueError("states must be finite, got inf or NaN")
        self._keys.append([0], [keys.float().unsqueeze(1)])

    def sync(self) -> None:
        """Flushes everything to the disk."""
        assert self._keys is not None
        self._keys.sync()

    def _write_corpus(self, path: Path) -> None:
        corpus = self.corpus
        ids = np.concatenate([np.asarray(document, dtype=np.int64) for document in corpus])
        state = {
            "format_version": FORMAT_VERSION,
            "ids": torch.from_numpy(ids.astype(np.int32)),
            "lengths": torch.from_numpy(np.asarray(corpus.lengths, dtype=np.int64)),
            "byte_lengths": torch.from_numpy(np.asarray(corpus.byte_lengths, dtype=np.int64)),
            "made_from": self.made_from,
        }
        with new_file(path) as temporary:
            save_tensors(temporary, state)
