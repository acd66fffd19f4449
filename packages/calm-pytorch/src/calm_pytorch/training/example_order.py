"""Which examples make up which update: an order that depends on the seed alone, so that a run can go on exactly.

Every epoch is a new permutation; what does not fill an update is left over. An update's examples are cut into
micro-batches and shared out over processes, so that any way of spreading them makes the same update.
"""

from typing import Any

import torch

from lm_core.checks import check_positive


class ExampleOrder:
    """Indices of the examples of each update, for this process.

    Args:
        length: examples there are.
        batch_size: of a micro-batch on one process.
        micro_batches: of an update.
        seed: of the permutations.
        rank: of this process.
        world_size: number of processes.

    Raises:
        ValueError: a size is below 1, or there are fewer examples than an update takes.
    """

    def __init__(
        self, *, length: int, batch_size: int, micro_batches: int = 1, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        check_positive(batch_size, "batch_size")
        check_positive(micro_batches, "grad_accum_steps")
        self.batch_size, self.micro_batches = batch_size, micro_batches
        self.length, self.seed, self.rank, self.world_size = length, seed, rank, world_size
        self.per_update = batch_size * micro_batches * world_size
        if length < self.per_update:
            raise ValueError(f"dataset must hold at least the {self.per_update} examples of an update, got {length}")
        self.updates_per_epoch = length // self.per_update
        self._epoch, self._permutation = -1, torch.empty(0)

    def micro_batches_of(self, step: int) -> list[list[int]]:
        """Indices of update ``step`` (the first is 0), one list for each micro-batch of this process."""
        epoch, place = divmod(step, self.updates_per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
            self._epoch, self._permutation = epoch, torch.randperm(self.length, generator=generator)
        update = self._permutation[place * self.per_update : (place + 1) * self.per_update]
        shares = update.view(self.micro_batches, self.world_size, self.batch_size)
        return [[int(index) for index in share] for share in shares[:, self.rank]]

    def fingerprint(self) -> dict[str, Any]:
        """What the order depends on."""
        return {"length": self.length, "per_update": self.per_update, "seed": self.seed}
