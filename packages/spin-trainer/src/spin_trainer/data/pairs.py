"""Which pairs an update takes: a pure function of its number, so that resuming needs no cursor.

An epoch is a permutation of all pairs. An update takes ``batch_size * accumulation * processes`` of them, the last one
of an epoch what is left; its micro-batches are filled up with pairs of weight 0, so that every process runs the same
number of forwards.
"""

import math
from dataclasses import dataclass

import torch

from spin_trainer.data.opponent_answers import seed_of


@dataclass(frozen=True)
class Pair:
    """A row of the dataset beside an answer of the opponent.

    Attributes:
        row: number of the example.
        previous: whether the answer is of the iteration before.
    """

    row: int
    previous: bool = False


@dataclass(frozen=True)
class MicroBatch:
    """One forward's pairs on one process, and how much each counts (1, or 0 for filling)."""

    pairs: tuple[Pair, ...]
    weights: tuple[float, ...]


class PairOrder:
    """Updates of one iteration.

    Args:
        pairs: all pairs of the iteration.
        batch_size: pairs a micro-batch, on each process.
        accumulation: micro-batches an update.
        epochs: passes over all pairs.
        seed: of the permutations.
        iteration: part of what seeds them.
        rank, world_size: this process and how many there are.
    """

    def __init__(
        self,
        *,
        pairs: list[Pair],
        batch_size: int,
        accumulation: int,
        epochs: int,
        seed: int,
        iteration: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.pairs, self.batch_size, self.accumulation = pairs, batch_size, accumulation
        self.seed, self.iteration, self.rank, self.world_size = seed, iteration, rank, world_size
        self.pairs_per_update = batch_size * accumulation * world_size
        self.updates_per_epoch = math.ceil(len(pairs) / self.pairs_per_update)
        self.updates = self.updates_per_epoch * epochs

    def chosen(self, update: int) -> list[Pair]:
        """The pairs of update ``update`` (the first is 0) on all processes."""
        epoch, place = divmod(update, self.updates_per_epoch)
        generator = torch.Generator().manual_seed(seed_of("order", self.seed, self.iteration, epoch))
        order = torch.randperm(len(self.pairs), generator=generator)
        start = place * self.pairs_per_update
        return [self.pairs[number] for number in order[start : start + self.pairs_per_update].tolist()]

    def micro_batches(self, update: int) -> list[MicroBatch]:
        """This process's share of an update: an equal number of micro-batches on every process."""
        chosen = self.chosen(update)
        batches = []
        for number in range(math.ceil(len(chosen) / (self.batch_size * self.world_size))):
            start = (number * self.world_size + self.rank) * self.batch_size
            own = chosen[start : start + self.batch_size]
            if own:
                batches.append(MicroBatch(tuple(own), (1.0,) * len(own)))
            else:
                batches.append(MicroBatch((chosen[0],), (0.0,)))
        return batches
