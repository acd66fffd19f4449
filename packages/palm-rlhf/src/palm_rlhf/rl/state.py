"""State of a run: counters, the current experience and its measurements, and their checkpoints.

A checkpoint may be written between any two updates, also in the middle of an epoch. Weights: see
``palm_rlhf.rl.policy_files``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lm_core.data.epochs import permutation
from palm_rlhf.rl.experience import Experience

Sums = dict[str, float]


class Phase:
    """Passes over one batch of responses.

    ``unit`` consecutive responses always stay in one minibatch: 1, or a group whose loss depends on all of it.

    Attributes:
        number: phases completed before this one.
        updates: optimizer updates of the whole run.
        redrawn: groups of the whole run that were drawn in place of others.
        epoch: completed passes over the current experience.
        cursor: rows of the current pass that have been used.
        experience: current experience; None before responses are drawn.
        metrics: metrics of the experience.
        sums: measurements of its updates; see ``PolicyUpdate``.
    """

    def __init__(self, *, seed: int, epochs: int, minibatch_size: int, device: torch.device, unit: int = 1) -> None:
        self.seed = seed
        self.epochs = epochs
        self.minibatch_size = minibatch_size
        self.device = device
        self.unit = unit
        self.number = 0
        self.updates = 0
        self.redrawn = 0
        self.epoch = 0
        self.cursor = 0
        self.experience: Experience | None = None
        self.metrics: dict[str, float] = {}
        self.sums: Sums = {}

    def begin(self, experience: Experience, metrics: dict[str, float]) -> None:
        """Starts the passes over a new experience."""
        self.experience = experience
        self.metrics = metrics
        self.sums = {}
        self.epoch = 0
        self.cursor = 0

    @property
    def is_done(self) -> bool:
        """True once every pass over the current experience is complete."""
        return self.epoch >= self.epochs

    def updates_of(self, count: int) -> int:
        """Updates of a phase of ``count`` responses."""
        return self.epochs * -(-count // self.minibatch_size)

    def remaining(self, phases: int, count: int) -> int:
        """Updates until the end of ``phases`` phases, of ``count`` responses each except the current one."""
        if self.experience is None:
            return max(0, phases - self.number) * self.updates_of(count)
        done = self.updates_of(self._count) // self.epochs * self.epoch + self.cursor // self.minibatch_size
        return self.updates_of(self._count) - done + max(0, phases - self.number - 1) * self.updates_of(count)

    def rows(self) -> Tensor:
        """Rows of the next minibatch: a function of seed, phase, epoch and cursor."""
        return self._order(self._count, self.epoch)[self.cursor : self.cursor + self.minibatch_size]

    def first_minibatches(self, count: int) -> Sequence[Tensor]:
        """Rows of each minibatch of the first pass over an experience of ``count`` responses."""
        return self._order(count, 0).split(self.minibatch_size)

    def learns_once(self, count: int) -> bool:
        """True if a phase of ``count`` responses is a single update, made by the policy that drew them."""
        return self.updates_of(count) == 1

    def _order(self, count: int, epoch: int) -> Tensor:
        units = torch.from_numpy(permutation(count // self.unit, self.seed, "minibatches", self.number, epoch))
        return (units[:, None] * self.unit + torch.arange(self.unit)).flatten()

    def advance(self, sums: Mapping[str, float]) -> None:
        """Counts an update on ``rows()`` with its measurements."""
        self.sums = combined(self.sums, sums)
        self.updates += 1
        self.cursor += self.minibatch_size
        if self.cursor >= self._count:
            self.epoch += 1
            self.cursor = 0

    def end(self) -> None:
        """Drops the experience."""
        self.experience = None
        self.number += 1

    @property
    def _count(self) -> int:
        assert self.experience is not None
        return len(self.experience)

    def state_dict(self) -> dict[str, Any]:
        """Counters, experience and measurements, for a checkpoint."""
        return {
            "counters": [self.number, self.updates, self.epoch, self.cursor, self.redrawn],
            "experience": {} if self.experience is None else self.experience.state_dict(),
            "metrics": self.metrics,
            "sums": self.sums,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resumes from ``state``."""
        # earlier checkpoints have no number of redrawn groups
        self.number, self.updates, self.epoch, self.cursor, self.redrawn = [*state["counters"], 0][:5]
        self.metrics = dict(state["metrics"])
        self.sums = dict(state["sums"])
        self.experience = Experience.from_state(state["experience"]).to(self.device) if state["experience"] else None


def combined(*parts: Mapping[str, float]) -> Sums:
    """Sums over several parts, or maxima (see ``is_maximum``); a name may be missing in some parts."""
    whole: Sums = {}
    for part in parts:
        for name, value in part.items():
            if name not in whole:
                whole[name] = value
            else:
                whole[name] = max(whole[name], value) if is_maximum(name) else whole[name] + value
    return whole


def is_maximum(name: str) -> bool:
    """True for the name of a measurement that is a maximum, not a sum."""
    return name.endswith("_max")
