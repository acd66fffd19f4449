"""State of a self-play run, for its checkpoints: where it is, and how good each iteration was."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lm_core.checkpoints.checkpoint import Checkpoint
from lm_core.checkpoints.pretrained import WEIGHTS_FILE
from lm_core.checkpoints.weights import read_weights, save_weights
from spin_trainer.training.weights import load_stored_weights, replace_folder, stored_weights


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
            state = stored_weights(policy)
            replace_folder(
                self.folder / f"iteration-{number}", lambda folder: save_weights(folder / WEIGHTS_FILE, state)
            )

    def put_back(self, policy: nn.Module) -> None:
        """Gives the policy the best weights, if any are kept."""
        if self.patience is not None and self.number is not None:
            folder = self.folder / f"iteration-{self.number}"
            load_stored_weights(policy, read_weights(folder / WEIGHTS_FILE), str(folder))


def upgraded(checkpoint: Checkpoint) -> dict[str, Any]:
    """The trainer state of a checkpoint of version 0.1.0 under the keys that a session writes."""

    def kept(*names: str) -> dict[str, Any]:
        return {name: checkpoint.trainer_state.get(name) for name in names}

    data = ("train_sft_dataset", "valid_sft_dataset", "frozen_weights")
    return {
        **kept("trainer", "optimizer", "schedule", "guard"),
        "architecture": {},
        "identity": kept("seed", "fsdp", *data, "batch", "epochs", "opponent_kind", "sampling"),
        "validation": [{}, {}],
        "state": {
            "run": kept("iteration", "update", "opponent", "previous_opponent"),
            "best": kept("history"),
            **kept("reference"),
        },
    }
