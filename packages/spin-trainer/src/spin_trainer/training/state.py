"""State of a self-play run that its checkpoints hold: progress, and the scores of each iteration."""

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
    """Progress of a run.

    Attributes:
        iteration: index of the current iteration, which is also the number of completed ones.
        update: completed updates of the current iteration.
        opponent: fingerprint of the opponent's weights.
        previous_opponent: fingerprint of the previous iteration's opponent.
    """

    iteration: int = 0
    update: int = 0
    opponent: str = ""
    previous_opponent: str | None = None


class BestIteration:
    """History of held-out metrics, before self-play (entry 0) and after each iteration, and the best weights.

    Args:
        folder: folder for the best weights.
        patience: iterations without a better likelihood before stopping; None never stops and stores no weights.
        metric: metric that compares iterations, the smaller the better; with "-" in front, the larger the better.
    """

    def __init__(self, folder: Path, patience: int | None, *, metric: str = "nll") -> None:
        self.folder = folder
        self.patience = patience
        self.metric = metric
        self.history: list[dict[str, float]] = []

    @property
    def number(self) -> int | None:
        """Entry with the best metric; None while the history is empty."""
        sign, name = (-1, self.metric[1:]) if self.metric.startswith("-") else (1, self.metric)
        losses = [sign * entry[name] for entry in self.history]
        return losses.index(min(losses)) if losses else None

    @property
    def stops(self) -> bool:
        """True if the likelihood has not improved for ``patience`` iterations."""
        if self.patience is None or self.number is None:
            return False
        return len(self.history) - 1 - self.number >= self.patience

    def add(self, metrics: dict[str, float], policy: nn.Module) -> None:
        """Adds an entry, and stores the policy's weights if it is the best so far; every process must call it."""
        self.history.append(metrics)
        latest = len(self.history) - 1
        if self.patience is not None and self.number == latest:
            state = stored_weights(policy)
            best = self.folder / f"iteration-{latest}"
            replace_folder(best, lambda folder: save_weights(folder / WEIGHTS_FILE, state))

    def put_back(self, policy: nn.Module) -> None:
        """Loads the best weights into the policy, if weights are stored."""
        if self.patience is not None and self.number is not None:
            folder = self.folder / f"iteration-{self.number}"
            load_stored_weights(policy, read_weights(folder / WEIGHTS_FILE), str(folder))


def upgraded(checkpoint: Checkpoint) -> dict[str, Any]:
    """Converts the trainer state of a 0.1.0 checkpoint to the keys that a session writes now."""

    def select(*names: str) -> dict[str, Any]:
        return {name: checkpoint.trainer_state.get(name) for name in names}

    data = ("train_sft_dataset", "valid_sft_dataset", "frozen_weights")
    return {
        **select("trainer", "optimizer", "schedule", "guard"),
        "architecture": {},
        "identity": select("seed", "fsdp", *data, "batch", "epochs", "opponent_kind", "sampling"),
        "validation": [{}, {}],
        "state": {
            "run": select("iteration", "update", "opponent", "previous_opponent"),
            "best": select("history"),
            **select("reference"),
        },
    }
