"""Seeded order of examples: every epoch is a permutation that depends on its key alone.

An order is a pure function of seed and position, so a run resumes from a single integer, and the order is the same for
any number of processes.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from lm_core.checks import check_positive

T = TypeVar("T")


def seed_of(*key: int | str) -> int:
    """A seed for ``torch`` or ``numpy`` that depends on every part of ``key``."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "big")


def permutation(count: int, *key: int | str) -> NDArray[np.int64]:
    """A permutation of ``range(count)`` that is determined by ``key``, such as seed and epoch."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed_of(*key))).numpy()


def held_out_split(rows: Sequence[T], count: int, *key: int | str) -> tuple[list[T], list[T]]:
    """Rows to learn from and ``count`` held-out rows, drawn by ``key``, each in their order."""
    order = permutation(len(rows), *key).tolist()
    return [rows[index] for index in sorted(order[count:])], [rows[index] for index in sorted(order[:count])]


class EpochOrder:
    """An endless sequence of example indices, one epoch after another.

    Args:
        count: number of examples.
        seed: seed of the permutations.
        key: further key of the permutations, such as a name if several orders share a seed.
        shuffle: False keeps every epoch in the order of the examples.

    Raises:
        ValueError: ``count`` is below 1.
    """

    def __init__(self, count: int, *, seed: int, key: tuple[int | str, ...] = (), shuffle: bool = True) -> None:
        check_positive(count, "count")
        self.count = count
        self.seed = seed
        self.key = key
        self.shuffle = shuffle
        self._epochs: dict[int, NDArray[np.int64]] = {}

    def epoch(self, number: int) -> NDArray[np.int64]:
        """Indices in the order of one epoch."""
        if not self.shuffle:
            return np.arange(self.count)
        if number not in self._epochs:
            # a batch reaches at most into the next epoch, so two permutations are enough
            self._epochs = {kept: order for kept, order in self._epochs.items() if abs(kept - number) == 1}
            self._epochs[number] = permutation(self.count, self.seed, number, *self.key)
        return self._epochs[number]

    def at(self, position: int) -> tuple[int, int]:
        """Epoch and index of the example at ``position`` of the sequence."""
        epoch, offset = divmod(position, self.count)
        return epoch, int(self.epoch(epoch)[offset]) if self.shuffle else offset

    def take(self, first: int, number: int) -> list[int]:
        """Indices at the positions ``[first, first + number)``."""
        return [self.at(position)[1] for position in range(first, first + number)]


class UpdateOrder:
    """Example indices of every update, cut into micro-batches and sharded over ranks.

    Args:
        count: number of examples.
        batch_size: examples of an update, over all micro-batches and ranks.
        micro_batches: number of forwards in an update.
        last: end of an epoch: "wrap" fills the last update from the next epoch, "short" makes it smaller, "drop"
            leaves out the examples that do not fill one.
        seed: seed of the permutations.
        key: further key of the permutations.
        rank: number of this process.
        world_size: number of processes.

    Raises:
        ValueError: a size is below 1, an update has fewer examples than forwards, or "drop" leaves no update.
    """

    def __init__(
        self,
        count: int,
        *,
        batch_size: int,
        micro_batches: int = 1,
        last: Literal["wrap", "short", "drop"] = "wrap",
        seed: int,
        key: tuple[int | str, ...] = (),
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        check_positive(batch_size, "batch_size")
        check_positive(micro_batches, "micro_batches")
        if batch_size % micro_batches:
            raise ValueError(f"batch_size must be a multiple of micro_batches {micro_batches}, got {batch_size}")
        if last == "drop" and count < batch_size:
            raise ValueError(f"there must be at least the {batch_size} examples of an update, got {count}")
        self.order = EpochOrder(count, seed=seed, key=key)
        self.batch_size = batch_size
        self.micro_batch_size = batch_size // micro_batches
        self.last = last
        self.rank = rank
        self.world_size = world_size

    @property
    def updates_per_epoch(self) -> int:
        """Number of updates in an epoch; for "wrap" the average number that begin in one, rounded up."""
        whole, rest = divmod(self.order.count, self.batch_size)
        return whole if self.last == "drop" or not rest else whole + 1

    def indices(self, update: int) -> list[int]:
        """Examples of update ``update`` (from 0) on all ranks."""
        if self.last == "wrap":
            return self.order.take(update * self.batch_size, self.batch_size)
        epoch, index = divmod(update, self.updates_per_epoch)
        start = index * self.batch_size
        return self.order.epoch(epoch)[start : start + self.batch_size].tolist()

    def micro_batches(self, update: int) -> list[list[int]]:
        """This rank's examples in each micro-batch: equally many lists on every rank, some of which may be empty."""
        indices = self.indices(update)
        size = self.micro_batch_size
        return [
            shard(indices[start : start + size], self.rank, self.world_size) for start in range(0, len(indices), size)
        ]

    def fingerprint(self) -> dict[str, int]:
        """Values that determine the order, for ``check_same_order``."""
        return {"examples": self.order.count, "batch_size": self.batch_size, "seed": self.order.seed}


def shard(indices: list[int], rank: int, world_size: int) -> list[int]:
    """The contiguous part of ``indices`` that belongs to ``rank``; parts differ by one at most."""
    return indices[len(indices) * rank // world_size : len(indices) * (rank + 1) // world_size]


def check_same_order(saved: Mapping[str, Any], current: Mapping[str, Any], *, cursor: str = "") -> None:
    """Raises ``ValueError`` if a saved order differs from the current one in any entry but ``cursor``."""
    if set(saved) != set(current):
        raise ValueError(f"state must have the keys {sorted(current)}, got {sorted(saved)}")
    for name, value in current.items():
        if name != cursor and saved[name] != value:
            difference = f"{name} is {value}, but was {saved[name]}"
            if name == "data":
                difference = "the documents differ from those"
            raise ValueError(f"cannot resume the data order: {difference} when the state was saved")
