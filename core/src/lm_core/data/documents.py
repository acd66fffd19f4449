"""Documents: texts as one flat array of token ids.

Reads the sources of ``lm_core.data.rows``; tokenises with bytes by default or with anything that has ``encode``; caches
the result on disk, memory-mapped, on request. ``Documents`` holds token ids without any separator;
``lm_core.data.packing`` adds EOS when it fills rows. A tokenizer that puts BOS before a text puts it before a document.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from lm_core.checkpoints.atomic_io import new_directory, remove_leftovers
from lm_core.checkpoints.manifest import CheckpointError, verify_manifest, write_manifest
from lm_core.data.rows import WholeFile, data_fingerprint, iterate_rows
from lm_core.tokenizers import ByteTokenizer, prompt_ids

CACHE_FORMAT_VERSION = 2  # 1 had no BOS
_SURROGATE = re.compile("[\ud800-\udfff]")


@runtime_checkable
class Encoder(Protocol):
    """The part of ``lm_core.tokenizers.Tokenizer`` that reading a corpus needs."""

    def encode(self, text: str) -> Sequence[int]:
        """Token ids of ``text``."""


Document = str | bytes | Sequence[int]


@dataclass(kw_only=True, eq=False, repr=False)
class Documents(Sequence[NDArray[np.unsignedinteger]]):
    """Token ids of many documents in one flat array, which may be memory-mapped.

    Args:
        ids: all token ids, one document after another.
        starts: index in ``ids`` at which each document begins.
        lengths: number of tokens of each document.
        byte_lengths: number of bytes of text of each document, for losses in bits per byte.
    """

    ids: NDArray[np.unsignedinteger]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    byte_lengths: NDArray[np.int64]

    def __post_init__(self) -> None:
        if not len(self.starts) == len(self.lengths) == len(self.byte_lengths):
            raise ValueError(
                "starts, lengths and byte_lengths must have one entry a document, "
                f"got {len(self.starts)}, {len(self.lengths)} and {len(self.byte_lengths)}"
            )

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all documents together."""
        return int(self.lengths.sum())

    @property
    def num_bytes(self) -> int:
        """Number of bytes of text of all documents together."""
        return int(self.byte_lengths.sum())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the documents' lengths and token ids, independent of their integer type and storage order."""
        digest = hashlib.sha256(np.ascontiguousarray(self.lengths, dtype="<i8").tobytes())
        for document in self:
            digest.update(np.ascontiguousarray(document, dtype="<u4").tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: Any) -> Any:
        """Token ids of one document (an integer index), or some documents without a copy (a slice)."""
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        start = int(self.starts[index])
        return self.ids[start : start + int(self.lengths[index])]

    def select(self, indices: "Sequence[int] | NDArray[np.integer]") -> "Documents":
        """The documents at ``indices``, in that order, sharing the token ids."""
        chosen = np.asarray(indices, dtype=np.int64)
        return Documents(
            ids=self.ids,
            starts=self.starts[chosen],
            lengths=self.lengths[chosen],
            byte_lengths=self.byte_lengths[chosen],
        )

    @property
    def size(self) -> str:
        """Human-readable size: megabytes and number of documents."""
        return f"{self.num_bytes / 1e6:.1f} MB in {len(self):,} documents"

    def __repr__(self) -> str:
        return f"Documents({len(self)} documents, {self.num_tokens} tokens of {self.ids.dtype})"


def _encode(document: Document, tokenizer: Encoder) -> tuple[NDArray[np.unsignedinteger], int]:
    """Token ids of one document and its size in bytes (the number of ids, if the document is given as token ids)."""
    vocab_size = getattr(tokenizer, "vocab_size", None)
    limit = 2**32 if vocab_size is None else int(vocab_size)
    dtype = np.uint16 if limit <= 2**16 else np.uint32
    ids: Any = document
    size = len(document)
    if isinstance(document, str | bytes):
        raw = document.encode("utf-8", errors="surrogatepass") if isinstance(document, str) else document
        size = len(raw)
        if isinstance(tokenizer, ByteTokenizer):
            return np.frombuffer(raw, dtype=np.uint8).astype(dtype), size
        text = document if isinstance(document, str) else document.decode("utf-8", errors="replace")
        if surrogate := _SURROGATE.search(text):
            raise ValueError(f"a document holds the lone surrogate {surrogate[0]!r}, which only bytes can encode")
        ids = prompt_ids(tokenizer, text)
    values = np.asarray(ids, dtype=np.int64)
    if len(values) and (int(values.min()) < 0 or int(values.max()) >= limit):
        raise ValueError(f"token ids must be in [0, {limit}), got {int(values.min())} to {int(values.max())}")
    return values.astype(dtype), size


def _encoded(
    texts: Iterable[tuple[str, Document]], tokenizer: Encoder
) -> Iterator[tuple[NDArray[np.unsignedinteger], int]]:
    """``_encode`` of every document that is not empty; raises ``ValueError`` if all of them are, or naming a place."""
    is_empty = True
    for where, text in texts:
        try:
            ids, size = _encode(text, tokenizer)
        except ValueError as error:
            raise ValueError(f"{where.rstrip(',')}: {error}") from error
        if len(ids):
            is_empty = False
            yield ids, size
    if is_empty:
        raise ValueError("texts must hold at least one document that is not empty, got none")


def tokenise(texts: Iterable[Document], *, tokenizer: Encoder | None = None) -> Documents:
    """Encodes documents into one array in memory. Empty documents are left out.

    Args:
        texts: documents as text, as raw UTF-8 bytes, or as token ids.
        tokenizer: anything with ``encode``; bytes by default.

    Raises:
        ValueError: ``texts`` contain no token.
    """
    tokenizer = ByteTokenizer() if tokenizer is None else tokenizer
    return _tokenised(((f"document {index}", text) for index, text in enumerate(texts)), tokenizer)


def _tokenised(texts: Iterable[tuple[str, Document]], tokenizer: Encoder) -> Documents:
    pieces, sizes = zip(*_encoded(texts, tokenizer), strict=True)
    lengths = np.array([len(piece) for piece in pieces], dtype=np.int64)
    return _documents(np.concatenate(pieces), lengths, np.array(sizes, dtype=np.int64))


def _documents(ids: NDArray[np.unsignedinteger], lengths: NDArray[np.int64], sizes: NDArray[np.int64]) -> Documents:
    return Documents(ids=ids, starts=np.cumsum(lengths) - lengths, lengths=lengths, byte_lengths=sizes)


def read_texts(source: Any, *, field: str = "text") -> Iterator[Document]:
    """The documents of ``source``: ``field`` of each row, or a whole text file.

    Args:
        source: a source of ``lm_core.data.rows``, or an iterable of texts, token-id lists, or mappings with ``field``.
        field: column of the document.

    Raises:
        FileNotFoundError, ValueError, TypeError, ImportError: as for ``lm_core.data.rows.load_rows``; also
            ``ValueError`` for a row without ``field``.
    """
    return (document for _, document in _located_texts(source, field))


def _located_texts(source: Any, field: str) -> Iterator[tuple[str, Document]]:
    """Documents with their places."""
    return ((where, _document_of(row, field, where)) for where, row in iterate_rows(source, name="data"))


def _document_of(row: Any, field: str, where: str) -> Document:
    if isinstance(row, dict):
        column = "text" if isinstance(row, WholeFile) else field
        if column not in row:
            raise ValueError(f"field {field!r} is missing in {where} which has {sorted(row)}")
        row = row[column]
    if isinstance(row, str | bytes):
        return row
    if isinstance(row, Sequence | np.ndarray) and all(isinstance(value, int | np.integer) for value in row):
        return row  # type: ignore[return-value]
    raise ValueError(f"{where} must be text or a list of token ids, got {type(row).__name__}")


def load_documents(
    source: Any, *, tokenizer: Encoder | None = None, field: str = "text", cache_dir: str | Path | None = None
) -> Documents:
    """Reads and tokenises ``source``, with ``cache_dir`` only once: later calls memory-map the stored array.

    The cache is keyed by the files' paths, sizes and modification times (a dataset by its own fingerprint), by the
    tokenizer and by ``field``. It is written atomically under a lock, so several processes may share it.

    Args:
        source: a source of ``read_texts``.
        tokenizer: anything with ``encode``; bytes by default.
        field: column of the document.
        cache_dir: folder of the cache; None keeps everything in memory.

    Raises:
        FileNotFoundError, ValueError, TypeError: as for ``read_texts``; also ``ValueError`` if there is no token.
    """
    tokenizer = ByteTokenizer() if tokenizer is None else tokenizer
    texts = _located_texts(source, field)
    try:
        if cache_dir is None:
            return _tokenised(texts, tokenizer)
        directory = Path(cache_dir).expanduser() / _cache_key(source, tokenizer, field)
        directory.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(directory.with_suffix(".lock")):
            if not (directory / "meta.json").is_file():
                remove_leftovers(directory.parent, directory.name)
                _write_cache(directory, texts, tokenizer)
    except ValueError as error:
        if "at least one document" in str(error):
            raise ValueError(f"{source} is empty: it holds no document with any text") from error
        raise
    return _read_cache(directory)


def _cache_key(source: Any, tokenizer: Encoder, field: str) -> str:
    identity = getattr(tokenizer, "fingerprint", None)
    if identity is None:  # another library's tokenizer is identified by its output
        probe = "The quick brown fox\n\tdef f(x): return x ** 2  # naïve, 日本語 🙂"
        identity = [type(tokenizer).__qualname__, getattr(tokenizer, "vocab_size", None)]
        identity.append([int(value) for value in tokenizer.encode(probe)])
    content = json.dumps([CACHE_FORMAT_VERSION, data_fingerprint(source), identity, field])
    return hashlib.sha256(content.encode()).hexdigest()[:24]


def _write_cache(directory: Path, texts: Iterable[tuple[str, Document]], tokenizer: Encoder) -> None:
    lengths, sizes = [], []
    with new_directory(directory) as temporary:
        with (temporary / "ids.bin").open("wb") as stream:
            for ids, size in _encoded(texts, tokenizer):
                stream.write(ids.tobytes())
                lengths.append(len(ids))
                sizes.append(size)
        np.save(temporary / "lengths.npy", np.array([lengths, sizes], dtype=np.int64))
        meta = {"format_version": CACHE_FORMAT_VERSION, "dtype": ids.dtype.name, "tokens": sum(lengths)}
        (temporary / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        write_manifest(temporary)


def _read_cache(directory: Path) -> Documents:
    try:
        verify_manifest(directory)
    except CheckpointError as error:
        raise ValueError(f"the corpus cache is damaged ({error}); remove the folder to have it built again") from error
    meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
    ids = np.memmap(directory / "ids.bin", dtype=np.dtype(meta["dtype"]), mode="r")
    lengths, sizes = np.load(directory / "lengths.npy", allow_pickle=False)
    return _documents(ids, lengths, sizes)
