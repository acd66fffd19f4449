"""Making the memories that a model reads and writes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lm_core.checks import check_positive
from memorizing_transformer.memory.memory_list import KNNMemoryList


class MakesMemories:
    """A model that says what its memories are like.

    Attributes:
        memorizing_layers: which layers have one.
        memory_settings: arguments of ``KNNMemory``.
        knn_memories_directory: keeps memories in memory-mapped files there; None keeps them on the model's device.
        token_emb: the embedding of tokens.
    """

    memorizing_layers: tuple[int, ...]
    memory_settings: dict[str, Any]
    knn_memories_directory: str | Path | None
    token_emb: nn.Embedding

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.token_emb.weight.device

    def create_knn_memories(
        self, *, batch_size: int, name: str | None = None, timeout: float = 10.0, **settings: Any
    ) -> KNNMemoryList:
        """Empty memories, one for each memorizing layer; with ``name``, what the folder of that name holds.

        Args:
            batch_size: rows.
            name: with ``knn_memories_directory``: a folder in it that is kept and can be opened again. Without it, a
                scratch folder that ``cleanup`` removes.
            timeout: seconds to wait for another process that uses the folder.
            **settings: arguments of ``KNNMemory`` other than the model's.

        Raises:
            ValueError: a name without ``knn_memories_directory``, or a folder with other memories.
            TimeoutError: another process uses the folder.
        """
        check_positive(batch_size, "batch_size")
        if name is not None and self.knn_memories_directory is None:
            raise ValueError(f"name {name!r} needs a model with knn_memories_directory, got None")
        create = KNNMemoryList.create_memories(
            batch_size=batch_size,
            num_memory_layers=len(self.memorizing_layers),
            memories_directory=self.knn_memories_directory,
            name=name,
            timeout=timeout,
        )
        place = {} if self.knn_memories_directory is not None else {"device": self.device}
        return create(**{**self.memory_settings, **place, **settings})

    @contextmanager
    def knn_memories_context(self, **settings: Any) -> Iterator[KNNMemoryList]:
        """``create_knn_memories`` for a block; files are let go of at its end, also after an error."""
        memories = self.create_knn_memories(**settings)
        try:
            yield memories
        finally:
            memories.cleanup()

    def _memories_in_passing(self, batch_size: int) -> KNNMemoryList:
        """Never in files: what a cache holds while a text is generated."""
        create = KNNMemoryList.create_memories(batch_size=batch_size, num_memory_layers=len(self.memorizing_layers))
        return create(**self.memory_settings, device=self.device)
