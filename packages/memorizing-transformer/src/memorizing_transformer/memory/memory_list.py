"""The memories of all memorizing layers."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch

from lm_core.checks import check_positive, typed
from memorizing_transformer.memory.directory import MemoryDirectory
from memorizing_transformer.memory.knn_memory import KNNMemory, read_state, write_state

FILE = "memories.safetensors"


class CreatesMemories(ABC):
    """A model that creates its memories.

    Attributes:
        memory_settings: arguments of ``KNNMemory``.
        memorizing_layers: layers with a memory.
        directory_argument: name of the attribute with the folder of memory-mapped memories.
    """

    memory_settings: dict[str, Any]
    memorizing_layers: tuple[int, ...]
    directory_argument: ClassVar[str]

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Device of the weights."""

    def create_knn_memories(
        self, *, batch_size: int, name: str | None = None, timeout: float = 10.0, **settings: Any
    ) -> "KNNMemoryList":
        """Memories, one for each memorizing layer: empty, or with ``name`` those of an existing folder.

        Args:
            batch_size: batch rows.
            name: name of a kept folder in the model's folder of memories; None for a scratch folder, until ``cleanup``.
            timeout: seconds to wait for another process that uses the folder.
            **settings: arguments of ``KNNMemory`` other than the model's.

        Raises:
            ValueError: a name without the model's folder of memories, or a folder with other memories.
            TimeoutError: another process uses the folder.
        """
        check_positive(batch_size, "batch_size")
        directory = getattr(self, self.directory_argument)
        if name is not None and directory is None:
            raise ValueError(f"name {name!r} needs a model with {self.directory_argument}, got None")
        create = KNNMemoryList.create_memories(
            batch_size=batch_size,
            num_memory_layers=len(self.memorizing_layers),
            memories_directory=directory,
            name=name,
            timeout=timeout,
        )
        place = {} if directory is not None else {"device": self.device}
        return create(**{**self.memory_settings, **place, **settings})

    @contextmanager
    def knn_memories_context(self, **settings: Any) -> "Iterator[KNNMemoryList]":
        """``create_knn_memories`` for a block; their files are closed at its end, also after an error."""
        memories = self.create_knn_memories(**settings)
        try:
            yield memories
        finally:
            memories.cleanup()


class KNNMemoryList(list[KNNMemory]):
    """A list of ``KNNMemory``, one for each memorizing layer, with operations on all of them."""

    _directory: MemoryDirectory | None = None

    def __reduce__(self) -> Any:
        """Copies and pickles are in memory: the folder has one owner."""
        return KNNMemoryList, (list(self),)

    @classmethod
    def create_memories(
        cls,
        *,
        batch_size: int,
        num_memory_layers: int,
        memories_directory: str | Path | None = None,
        name: str | None = None,
        timeout: float = 10.0,
    ) -> Callable[..., "KNNMemoryList"]:
        """A factory that takes the other arguments of ``KNNMemory`` and returns the list.

        Args:
            batch_size: batch rows.
            num_memory_layers: number of memories.
            memories_directory: folder for memory-mapped files; None keeps the memories on their device.
            name: name of a kept folder in ``memories_directory``; None for a scratch folder.
            timeout: seconds to wait for another process that uses the folder.
        """

        def create(*args: Any, **kwargs: Any) -> KNNMemoryList:
            make: Callable[..., KNNMemory] = partial(KNNMemory, *args)
            parent = None if memories_directory is None else MemoryDirectory(memories_directory, name, timeout=timeout)
            memories = cls()
            memories._directory = parent
            try:
                for number in range(1, num_memory_layers + 1):
                    folder = None if parent is None else parent.path / f"layer-{number}"
                    memories.append(make(num_indices=batch_size, memmap_filename=folder, **kwargs))
            except BaseException:
                memories.cleanup()
                raise
            return memories

        return create

    @property
    def batch_size(self) -> int:
        """Number of rows in scope; 0 without memories."""
        return len(self[0].scoped_indices) if self else 0

    @property
    def sizes(self) -> list[list[int]]:
        """Number of tokens, by layer and row."""
        return [memory.sizes for memory in self]

    def cleanup(self) -> None:
        """Closes files; a scratch folder is removed, a named one is kept."""
        for memory in self:
            memory.close()
        if self._directory is not None:
            self._directory.close()

    @contextmanager
    def at_batch_indices(self, indices: Sequence[int]) -> Iterator["KNNMemoryList"]:
        """Narrows every memory to some rows for a block; see ``KNNMemory.at_batch_indices``."""
        with ExitStack() as stack:
            for memory in self:
                stack.enter_context(memory.at_batch_indices(indices))
            yield self

    def clear_memory(
        self, batch_indices: int | Sequence[int] | None = None, memory_indices: Sequence[int] | None = None
    ) -> None:
        """Empties rows (all by default) of memories (all by default).

        Raises:
            ValueError: a row or a memory does not exist; nothing is emptied then.
        """
        chosen = range(len(self)) if memory_indices is None else memory_indices
        wrong = [index for index in chosen if not 0 <= index < len(self)]
        if wrong:
            raise ValueError(f"memory_indices must be in [0, {len(self)}), got {wrong}")
        for index in chosen:
            self[index].clear(batch_indices)

    def selected(self, rows: Sequence[int]) -> "KNNMemoryList":
        """A copy whose batch row ``r`` is row ``rows[r]`` in scope."""
        return KNNMemoryList(memory.selected(rows) for memory in self)

    def state_dict(self) -> list[dict[str, Any]]:
        """All memories as tensors and numbers, for a checkpoint."""
        return [memory.state_dict() for memory in self]

    def check_state(self, state: Sequence[dict[str, Any]]) -> None:
        """Raises ``ValueError`` unless ``state`` has as many memories, of the same shapes and number formats."""
        if len(state) != len(self):
            raise ValueError(f"state must have {len(self)} memories, got {len(state)}")
        for memory, saved in zip(self, state, strict=True):
            memory.check_state(saved)

    def load_state_dict(self, state: Sequence[dict[str, Any]]) -> None:
        """Replaces the content by that of ``state``.

        Raises:
            ValueError: see ``check_state``; nothing is changed then.
        """
        self.check_state(state)
        for memory, saved in zip(self, state, strict=True):
            memory.load_state_dict(saved)

    @typed
    def save(self, directory: str | Path) -> None:
        """Writes all memories to one file in a folder, atomically."""
        write_state(Path(directory).expanduser() / FILE, self.state_dict())

    @typed
    def load(self, directory: str | Path) -> None:
        """Reads a folder of ``save``; errors as for ``KNNMemory.load``, after which no memory is changed."""
        path = Path(directory).expanduser() / FILE
        if path.is_file() or not (path.parent / "layer-1.pt").is_file():
            self.load_state_dict(read_state(path, list))
        else:  # a file for each layer, from before this version
            self.load_state_dict([read_state(path.with_name(f"layer-{i}.pt")) for i in range(1, len(self) + 1)])
