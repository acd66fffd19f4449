"""Early stopping: the held-out likelihood after each iteration, and the weights of the best one."""

from pathlib import Path
from typing import Any

from torch import nn

from spin_trainer.training.weights import load_stored_weights, read_stored_weights, write_stored_weights


class BestIteration:
    """Held-out measures before self-play (entry 0) and after each iteration.

    Args:
        folder: where the best weights are kept.
        patience: iterations without a better likelihood before stopping; None never stops and keeps no weights.
    """

    def __init__(self, folder: Path, patience: int | None) -> None:
        self.folder, self.patience = folder, patience
        self.history: list[dict[str, float]] = []

    @property
    def number(self) -> int | None:
        """Iterations after which the likelihood was best; None before any measure."""
        losses = [entry["nll"] for entry in self.history]
        return losses.index(min(losses)) if losses else None

    @property
    def stops(self) -> bool:
        """Whether the likelihood has not improved for long enough."""
        return self.patience is not None and self.number is not None and self._since(self.number) >= self.patience

    def add(self, measures: dict[str, Any], policy: nn.Module) -> None:
        """Notes the measures, and keeps the policy's weights if it is the best so far; every process calls it."""
        self.history.append(measures)
        number = len(self.history) - 1
        if self.patience is not None and self.number == number:
            write_stored_weights(self.folder / f"iteration-{number}", policy)

    def put_back(self, policy: nn.Module) -> None:
        """Gives the policy the best weights, if any are kept."""
        if self.patience is not None and self.number is not None:
            folder = self.folder / f"iteration-{self.number}"
            load_stored_weights(policy, read_stored_weights(folder), str(folder))

    def _since(self, number: int) -> int:
        return len(self.history) - 1 - number
