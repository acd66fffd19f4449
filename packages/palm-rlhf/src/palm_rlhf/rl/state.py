"""Where a run stands inside a phase: counters, the experience at hand, and what was measured on it so far.

All of it goes into checkpoints, so a run can be killed between any two updates, in the middle of an epoch too.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from palm_rlhf.rl.experience import Experience

Sums = dict[str, float]


class Phase:
    """Passes over one batch of responses.

    Attributes:
        number: phases done before this one.
        updates: optimizer updates of the whole run.
        epoch: passes done over the experience at hand.
        cursor: rows of the pass at hand that were used.
        experience: what is learned from; None before responses are drawn.
        facts: metrics of the experience.
        sums: of the updates made on it; see ``policy_update``.
    """

    def __init__(self, *, seed: int, epochs: int, minibatch_size: int) -> None:
        self.seed, self.epochs, self.minibatch_size = seed, epochs, minibatch_size
        self.number = self.updates = self.epoch = self.cursor = 0
        self.experience: Experience | None = None
        self.facts: dict[str, float] = {}
        self.sums: Sums = {}

    def begin(self, experience: Experience, facts: dict[str, float]) -> None:
        """Starts the passes over a new experience."""
        self.experience, self.facts, self.sums = experience, facts, {}
        self.epoch = self.cursor = 0

    @property
    def is_done(self) -> bool:
        """Whether every pass has been made."""
        return self.epoch >= self.epochs

    def rows(self) -> Tensor:
        """Rows of the next minibatch: a function of seed, phase, epoch and cursor."""
        return self._order(self._count, self.epoch)[self.cursor : self.cursor + self.minibatch_size]

    def first_minibatches(self, count: int) -> Sequence[Tensor]:
        """Rows of each minibatch of the first pass over an experience of ``count`` responses that is yet to begin."""
        return self._order(count, 0).split(self.minibatch_size)

    def _order(self, count: int, epoch: int) -> Tensor:
        seed = ((self.seed * 1_000_003 + self.number) * 1_000_003 + epoch) % 2**63
        return torch.randperm(count, generator=torch.Generator().manual_seed(seed))

    def advance(self, sums: Mapping[str, float]) -> None:
        """An update was made on ``rows()``; what it measured."""
        self.sums = combined(self.sums, sums)
        self.updates += 1
        self.cursor += self.minibatch_size
        if self.cursor >= self._count:
            self.epoch, self.cursor = self.epoch + 1, 0

    def end(self) -> None:
        """Lets go of the experience."""
        self.experience = None
        self.number += 1

    @property
    def _count(self) -> int:
        assert self.experience is not None
        return int(self.experience["scores"].shape[0])

    def state_dict(self) -> dict[str, Any]:
        """Everything, for a checkpoint."""
        return {
            "counters": [self.number, self.updates, self.epoch, self.cursor],
            "experience": self.experience or {},
            "facts": self.facts,
            "sums": self.sums,
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Goes on from ``state``."""
        self.number, self.updates, self.epoch, self.cursor = state["counters"]
        self.facts, self.sums = dict(state["facts"]), dict(state["sums"])
        # numbers without a dimension (the temperature) are read on the host
        self.experience = {
            name: value.to(device) if value.ndim else value.cpu() for name, value in state["experience"].items()
        } or None


def combined(*parts: Mapping[str, float]) -> Sums:
    """Sums of several parts, and maxima where a name says so; parts may lack names."""
    whole: Sums = {}
    for part in parts:
        for name, value in part.items():
            if name not in whole:
                whole[name] = value
            else:
                whole[name] = max(whole[name], value) if is_maximum(name) else whole[name] + value
    return whole


def is_maximum(name: str) -> bool:
    """Whether a measured name is a maximum and not a sum."""
    return name.endswith("_max")


def seeds(seed: int, phase: int) -> Iterator[int]:
    """Seeds of the draws of a phase, one a chunk of responses."""
    first = (seed * 1_000_003 + phase) * 1_000_003
    number = 0
    while True:
        yield (first + number) % 2**63
        number += 1
