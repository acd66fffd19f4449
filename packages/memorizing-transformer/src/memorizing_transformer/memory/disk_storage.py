"""Ring buffers in memory-mapped files that stay readable after a kill at any instant.

A folder holds ``memory.json`` (shape and format), ``data.bin`` and for int8 ``scales.bin`` (sparse: blocks that were
never written take no space), and ``header.bin`` with two copies of every row's counts. The counts are written AFTER
the data they count, alternately to the first and the second copy, each with a generation number and a checksum; a
reader takes the newest intact one. Before slots of a full ring are overwritten, a header first drops the tokens in
them. So at any instant the header counts only complete tokens: a prefix of what was added.

A kill of the process loses nothing that was committed, since the system keeps the pages. To survive a power failure
too, call ``sync`` (one flush of the whole folder).
"""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lm_core.checkpoints.atomic_io import fsync_tree, new_directory
from lm_core.checkpoints.manifest import read_json, write_json
from memorizing_transformer.memory.ring_storage import RingStorage

FORMAT_VERSION = 1
META_FILE, DATA_FILE, SCALES_FILE, HEADER_FILE = "memory.json", "data.bin", "scales.bin", "header.bin"
_NUMPY = {"float32": np.float32, "bfloat16": np.int16, "int8": np.int8}


class DiskStorage(RingStorage):
    """``RingStorage`` in the files of a folder, which is created if missing and otherwise opened with its tokens.

    Args:
        directory: folder for this memory only, used by one process at a time; ``MemoryDirectory`` ensures that.
        rows, capacity, dim, storage: as for ``RingStorage``.

    Raises:
        ValueError: the folder has a memory of another shape or format, or a damaged one.
    """

    def __init__(self, directory: str | Path, *, rows: int, capacity: int, dim: int, storage: str) -> None:
        self.directory = Path(directory)
        self._header = -1
        self._generation = 0
        super().__init__(rows=rows, capacity=capacity, dim=dim, storage=storage, device=torch.device("cpu"))
        self._header = os.open(self.directory / HEADER_FILE, os.O_RDWR | getattr(os, "O_BINARY", 0))
        self._read_header()

    def close(self) -> None:
        """Closes the files; the memory must not be used afterwards."""
        if self._header >= 0:
            os.close(self._header)
            self._header = -1
        self.data, self.scales = torch.empty(0), None

    def sync(self) -> None:
        """Flushes everything to the disk, so that it survives a power failure."""
        fsync_tree(self.directory)

    def _allocate(self, capacity: int) -> tuple[Tensor, Tensor | None]:
        meta = {name: getattr(self, name) for name in ("rows", "capacity", "dim", "storage")}
        meta = {"format_version": FORMAT_VERSION, **meta}
        if not (self.directory / META_FILE).is_file():
            self._create(meta)
        stored = read_json(self.directory / META_FILE)
        for name, value in meta.items():
            if stored.get(name) != value:
                raise ValueError(f"{self.directory} holds a memory with {name} = {stored.get(name)!r}, not {value!r}")
        shape = (self.rows, self.capacity, 2, self.dim)
        mapped = np.memmap(self.directory / DATA_FILE, dtype=_NUMPY[self.storage], mode="r+", shape=shape)
        data = torch.from_numpy(mapped)
        if self.storage == "bfloat16":
            data = data.view(torch.bfloat16)
        if self.storage != "int8":
            return data, None
        scales = np.memmap(self.directory / SCALES_FILE, dtype=np.float16, mode="r+", shape=shape[:-1])
        return data, torch.from_numpy(scales)

    def _create(self, meta: dict[str, object]) -> None:
        entries = self.rows * self.capacity * 2
        sizes = {DATA_FILE: entries * self.dim * np.dtype(_NUMPY[self.storage]).itemsize}
        if self.storage == "int8":
            sizes[SCALES_FILE] = entries * 2
        with new_directory(self.directory) as temporary:
            for name, size in sizes.items():
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

    def _read_header(self) -> None:
        size = len(self._encoded(0))
        os.lseek(self._header, 0, os.SEEK_SET)
        content = os.read(self._header, 2 * size)
        newest = -1
        for copy in (content[:size], content[size:]):
            if len(copy) != size or struct.unpack("<I", copy[-4:])[0] != zlib.crc32(copy[:-4]):
                continue
            generation, *counts = struct.unpack(f"<q{2 * self.rows}q", copy[:-4])
            if generation > newest:
                newest, self.first, self.written = generation, list(counts[::2]), list(counts[1::2])
        if newest < 0:
            raise ValueError(f"{self.directory / HEADER_FILE} is damaged: neither copy of the counts is intact")
        self._generation = newest

    def _make_room(self, written: int) -> None:
        """Nothing to grow: the sparse files have their full size from the start."""
