"""State of a self-play run, for its checkpoints: where it is, and how good each iteration was."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lm_core.checkpoints.checkpoint import Checkpoint
from spin_trainer.training.weights import load_stored_weights, read_stored_weights, write_stored_weights


@dataclass
class RunState:
    """Where a run is.

    Attributes:
        iteration: number of the iteration under way, from 0; as many are complete.
        update: updates done within it.
        opponent: fingerprint of the opponent's weights.
        previous_opponent: that of the iteration before.
    """

    iteration: int = 0
    update: int = 0
    opponent: str = ""
    previous_opponent: str | None = None

    def state_dict(self) -> dict[str, Any]:
        """All attributes."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the attributes of ``state``."""
        for name, value in state.items():
            setattr(self, name, value)


class BestIteration:
    """Held-out measures before self-play (entry 0) and after each iteration.

    Args:
        folder: where the best weights are kept.
        patience: iterations without a better likelihood before stopping; None never stops and keeps no weights.
    """

    def __init__(self, folder: Path, patience: int | None) -> None:
        self.folder = folder
        self.patience = patience
        self.history: list[dict[str, float]] = []

    @property
    def number(self) -> int | None:
        """Iterations after which the likelihood was best; None before any measure."""
        losses = [entry["nll"] for entry in self.history]
        return losses.index(min(losses)) if losses else None

    @property
    def stops(self) -> bool:
        """Whether the likelihood has not improved for long enough."""
        if self.patience is None or self.number is None:
            return False
        return len(self.history) - 1 - self.number >= self.patience

    def add(self, measures: dict[str, float], policy: nn.Module) -> None:
        """Adds the measures, and keeps the policy's weights if it is the best so far; every process calls it."""
        self.history.append(measures)
        number = len(self.history) - 1
        if self.patience is not None and self.number == number:
            write_stored_weights(self.folder / f"iteration-{number}", policy)

    def put_back(self, policy: nn.Module) -> None:
        """Gives the policy the best weights, if any are kept."""
        if self.patience is not None and self.number is not None:
            folder = self.folder / f"iteration-{self.number}"
            load_stored_weights(policy, read_stored_weights(folder), str(folder))

    def state_dict(self) -> dict[str, Any]:
        """The measures."""
        return {"history": self.history}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the measures of ``state``."""
        self.history = list(state["history"])


IDENTITY = (
    *("seed", "fsdp", "train_sft_dataset", "valid_sft_dataset", "frozen_weights"),
    *("batch", "epochs", "opponent_kind", "sampling"),
)


def upgraded(checkpoint: Checkpoint) -> dict[str, Any]:
    """The trainer state of a checkpoint of version 0.1.0 under the keys that a session writes."""
    old = checkpoint.trainer_state
    kept = ("trainer", "optimizer", "schedule", "guard")
    run = ("iteration", "update", "opponent", "previous_opponent")
    return {
        **{name: old.get(name) for name in kept},
        "architecture": {},
        "identity": {name: old.get(name) for name in IDENTITY},
        "validation": [{}, {}],
        "state": {
            "run": {name: old.get(name) for name in run},
            "best": {"history": old.get("history")},
            "reference": old.get("reference"),
        },
    }
