"""Ring buffers in memory-mapped files that stay readable after a kill at any instant.

A folder holds ``memory.json`` (shape and format), ``data.bin``, for int8 ``scales.bin``, ``checksums.bin`` (sparse:
blocks take space once their row grows into them), and ``header.bin`` with two copies of every row's counts. The counts
are written AFTER the data they count, alternately to the first and the second copy, each with a generation number and a
checksum; a reader takes the newest intact one. Before slots of a full ring are overwritten, a header first drops the
tokens in them. So at any instant the header counts only complete tokens: a prefix of what was added.

Space on the disk is allocated before anything is written: on a full disk ``append`` raises ``OSError`` and changes
nothing. Without that, writing to a mapped page that has no block would end the process by SIGBUS.

Every token has a checksum of 8 bytes, written before the token is counted. A row is compared with its checksums when it
is first read after opening: a search, copy or save of a row with damaged tokens raises ``ValueError``. A change within
one word of 8 bytes of a token, such as a flipped bit, is always found, any other with a probability of 1 - 2^-63.
Opening reads no tokens. Damage to the files after that first read is found when they are next opened.

A kill of the process loses nothing that was committed, since the system keeps the pages. To survive a power failure
too, call ``sync`` (one flush of the whole folder).
"""

import errno
import hashlib
import os
import struct
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from torch import Tensor

from lm_core.checkpoints.atomic_io import fsync_tree, new_directory, write_file
from lm_core.checkpoints.manifest import read_json, to_json, write_json
from memorizing_transformer.memory.ring_storage import SMALLEST_GROWTH, RingStorage

FORMAT_VERSION = 2  # 1 had no checksums
META_FILE, DATA_FILE, SCALES_FILE, HEADER_FILE = "memory.json", "data.bin", "scales.bin", "header.bin"
CHECKSUMS_FILE = "checksums.bin"
LOCK_FILE = ".lock"
CHECKED_AT_ONCE = 16384  # tokens
_NUMPY = {"float32": np.float32, "bfloat16": np.int16, "int8": np.int8}


class DiskStorage(RingStorage):
    """``RingStorage`` in the files of a folder, which is created if missing and otherwise opened with its tokens.

    A copy (``copy.deepcopy``) or pickle of it is a ``RingStorage`` in memory, since the files have one owner.

    Args:
        directory: folder for this memory only, which is locked until ``close``.
        rows, capacity, dim, storage, parts: as for ``RingStorage``.
        read_only: opens an existing folder without its lock, so that several processes can read it.

    Raises:
        ValueError: the folder has a memory of another shape or format, or a damaged one.
        RuntimeError: another memory uses the folder.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        rows: int,
        capacity: int,
        dim: int,
        storage: str,
        parts: int = 2,
        read_only: bool = False,
    ) -> None:
        self.directory = Path(directory).expanduser()
        # pages that are only read are those of the file; nothing else may be written
        self._mode: Literal["r+", "c"] = "c" if read_only else "r+"
        self._header = -1
        self._generation = 0
        # factors of the checksums: odd, so that no change of a single word cancels
        token = parts * dim * np.dtype(_NUMPY[storage]).itemsize
        self._word = np.dtype(f"<u{next(width for width in (8, 4, 2, 1) if token % width == 0)}")
        words = token // self._word.itemsize
        factors = hashlib.shake_256(b"memorizing-transformer").digest(8 * (words + 2))
        self._factors = np.frombuffer(factors, dtype="<u8") | np.uint64(1)
        # rows whose tokens have been compared with their checksums
        self._verified: set[int] = set()
        shape: dict[str, Any] = {"rows": rows, "capacity": capacity, "dim": dim, "storage": storage, "parts": parts}
        super().__init__(device=torch.device("cpu"), **shape)
        self._lock = FileLock(self.directory / LOCK_FILE)
        if not read_only:
            try:
                self._lock.acquire(timeout=0)
            except Timeout as error:
                raise RuntimeError(f"another memory uses the files in {self.directory}; close it first") from error
        access = os.O_RDONLY if read_only else os.O_RDWR
        self._header = os.open(self.directory / HEADER_FILE, access | getattr(os, "O_BINARY", 0))
        try:
            self._read_header()
            if self._version == 1:
                self._add_checksums()
        except (ValueError, OSError):
            self.close()
            raise
        # per row: slots that have blocks on the disk
        self._allocated = [min(written, capacity) for written in self.written]

    def __reduce__(self) -> Any:
        return _in_memory, (self.selected(range(self.rows)).__dict__,)

    def close(self) -> None:
        """Closes the files; the memory must not be used afterwards."""
        if self._header >= 0:
            os.close(self._header)
            self._header = -1
            self._lock.release()
        self.data, self.scales = torch.empty(0), None
        self._checksums = np.empty((0, 0), dtype=np.uint64)

    def sync(self) -> None:
        """Flushes everything to the disk, so that it survives a power failure."""
        fsync_tree(self.directory)

    def _allocate(self, capacity: int) -> tuple[Tensor, Tensor | None]:
        meta = {name: getattr(self, name) for name in ("rows", "capacity", "dim", "storage")}
        meta = {"format_version": FORMAT_VERSION, **meta, **({} if self.parts == 2 else {"parts": self.parts})}
        if not (self.directory / META_FILE).is_file() and self._mode == "r+":
            self._create(meta)
        stored = read_json(self.directory / META_FILE)
        self._version = stored.get("format_version")
        if self._version == 1 and type(self._version) is int:
            with (self.directory / CHECKSUMS_FILE).open("wb") as stream:
                stream.truncate(self._sizes()[CHECKSUMS_FILE])
            stored["format_version"] = FORMAT_VERSION
        for name, value in meta.items():
            if stored.get(name) != value or type(stored.get(name)) is not type(value):  # True equals 1
                raise ValueError(f"{self.directory} holds a memory with {name} = {stored.get(name)!r}, not {value!r}")
        for name, size in self._sizes().items():
            found = (self.directory / name).stat().st_size if (self.directory / name).is_file() else 0
            if found != size:  # numpy would extend a shorter file with zeros
                raise ValueError(f"{self.directory / name} is damaged: it has {found:,} bytes, not {size:,}")
        shape = (self.rows, self.capacity, self.parts, self.dim)
        self._checksums = np.memmap(self.directory / CHECKSUMS_FILE, dtype="<u8", mode=self._mode, shape=shape[:2])
        mapped = np.memmap(self.directory / DATA_FILE, dtype=_NUMPY[self.storage], mode=self._mode, shape=shape)
        data = torch.from_numpy(mapped)
        if self.storage == "bfloat16":
            data = data.view(torch.bfloat16)
        if self.storage != "int8":
            return data, None
        scales = np.memmap(self.directory / SCALES_FILE, dtype=np.float16, mode=self._mode, shape=shape[:-1])
        return data, torch.from_numpy(scales)

    def _sizes(self) -> dict[str, int]:
        """Bytes of each file of tokens."""
        slots = self.rows * self.capacity
        entries = slots * self.parts
        sizes = {DATA_FILE: entries * self.dim * np.dtype(_NUMPY[self.storage]).itemsize, CHECKSUMS_FILE: slots * 8}
        return {**sizes, SCALES_FILE: entries * 2} if self.storage == "int8" else sizes

    def _create(self, meta: dict[str, object]) -> None:
        with new_directory(self.directory) as temporary:
            for name, size in self._sizes().items():
                with (temporary / name).open("wb") as stream:
                    stream.truncate(size)
            (temporary / HEADER_FILE).write_bytes(self._encoded(0) * 2)
            write_json(temporary / META_FILE, meta)

    def _encoded(self, generation: int) -> bytes:
        counts = [count for pair in zip(self.first, self.written, strict=True) for count in pair]
        body = struct.pack(f"<q{2 * self.rows}q", generation, *counts)
        return body + struct.pack("<I", zlib.crc32(body))

    def _commit(self) -> None:
        if self._header < 0:
            return
        self._generation += 1
        copy = self._encoded(self._generation)
        os.lseek(self._header, (self._generation % 2) * len(copy), os.SEEK_SET)
        os.write(self._header, copy)

    def _before_writing(self, after: dict[int, tuple[int, int]]) -> None:
        kept = list(self.first)
        for row, (first, _) in after.items():
            self.first[row] = min(first, self.written[row])
        if self.first != kept:
            self._commit()

    def _after_writing(self, row: int, slots: slice | Tensor) -> None:
        places = slots if isinstance(slots, slice) else slots.numpy()
        self._checksums[row, places] = self._checksums_of(row, slots)

    def _checksums_of(self, row: int, slots: slice | Tensor) -> NDArray[np.uint64]:
        """A weighted sum of each token's words modulo 2^64; not 0 for a token of zeros."""
        numbers = (
            self.data[row, slots].view(torch.uint8).numpy().reshape(-1, self.parts * self.dim * self.data.itemsize)
        )
        words = numbers.view(self._word)
        sums = self._factors[-1] + np.einsum("nw,w->n", words, self._factors[:-2], dtype=np.uint64, casting="safe")
        if self.scales is not None:
            scales = (
                self.scales[row, slots]
                .view(torch.uint8)
                .numpy()
                .reshape(-1, 2 * self.parts)
                .view(f"<u{2 * self.parts}")[:, 0]
            )
            sums += scales * self._factors[-2]
        return sums

    def _before_reading(self, row: int) -> None:
        if row in self._verified:
            return
        damaged = []
        for start, stop in self.ranges(row):
            for low in range(start, stop, CHECKED_AT_ONCE):
                some = slice(low, min(low + CHECKED_AT_ONCE, stop))
                differs = self._checksums_of(row, some) != self._checksums[row, some]
                damaged += (low + differs.nonzero()[0]).tolist()
        if damaged:
            raise ValueError(
                f"{self.directory / DATA_FILE} is damaged: {len(damaged)} of {self.size(row)} tokens of row {row} "
                f"differ from what was written, the first in slot {damaged[0]}; clear the row to continue without it"
            )
        self._verified.add(row)

    def _add_checksums(self) -> None:
        """Adds the checksums that a folder of format 1 lacks, of the tokens as they are."""
        path = self.directory / CHECKSUMS_FILE
        for row in range(self.rows):
            for start, stop in self.ranges(row):
                _allocate_blocks(path, 8 * (row * self.capacity + start), 8 * (stop - start))
                self._after_writing(row, slice(start, stop))
        meta = read_json(self.directory / META_FILE)
        write_file(self.directory / META_FILE, to_json({**meta, "format_version": FORMAT_VERSION}))

    def _read_header(self) -> None:
        size, path = len(self._encoded(0)), self.directory / HEADER_FILE
        os.lseek(self._header, 0, os.SEEK_SET)
        content = os.read(self._header, 2 * size)
        newest, damaged = -1, 0
        for copy in (content[:size], content[size:]):
            if len(copy) != size or struct.unpack("<I", copy[-4:])[0] != zlib.crc32(copy[:-4]):
                damaged += 1
                continue
            generation, *counts = struct.unpack(f"<q{2 * self.rows}q", copy[:-4])
            if generation > newest:
                newest, self.first, self.written = generation, list(counts[::2]), list(counts[1::2])
        if newest < 0:
            raise ValueError(f"{path} is damaged: neither copy of the counts is intact")
        if damaged:
            warnings.warn(
                f"one of two copies of the counts in {path} is damaged; the other may lack the newest tokens",
                stacklevel=5,
            )
        for first, written in zip(self.first, self.written, strict=True):
            if not 0 <= first <= written <= first + self.capacity:
                raise ValueError(f"{path} is damaged: a row of {self.capacity} tokens has {first} to {written}")
        self._generation = newest

    def _make_room(self, written: Mapping[int, int]) -> None:
        # bytes of a slot in each file
        slot = {name: size // (self.rows * self.capacity) for name, size in self._sizes().items()}
        for row, count in written.items():
            start, stop = self._allocated[row], min(count, self.capacity)
            if stop <= start:
                continue
            stop = min(self.capacity, max(stop, start + SMALLEST_GROWTH))
            for name, size in slot.items():
                _allocate_blocks(self.directory / name, (row * self.capacity + start) * size, (stop - start) * size)
            self._allocated[row] = stop


def _in_memory(attributes: dict[str, Any]) -> RingStorage:
    storage = RingStorage.__new__(RingStorage)
    storage.__dict__ |= attributes
    return storage


def _allocate_blocks(path: Path, offset: int, size: int) -> None:
    """Allocates blocks for a part of a file without data; raises ``OSError`` if the disk is full."""
    try:
        with path.open("r+b") as stream:
            try:
                os.posix_fallocate(stream.fileno(), offset, size)
            except (AttributeError, OSError) as error:  # missing on macOS and Windows, or in the file system
                if getattr(error, "errno", errno.EOPNOTSUPP) not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
                stream.seek(offset)
                stream.write(bytes(size))
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}; nothing was added to the memory", str(path)) from error
