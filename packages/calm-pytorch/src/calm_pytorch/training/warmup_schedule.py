"""A torch scheduler under a linear warmup, stepped once for each optimizer update."""

from collections.abc import Mapping
from typing import Any

from torch.optim.lr_scheduler import LRScheduler


class WarmupSchedule:
    """The learning rates of a torch scheduler, times ``min(1, update / warmup_steps)``.

    It has the interface of ``lm_core.training.accelerator.LearningRateSchedule``.

    Args:
        optimizer: whose learning rates now are the peaks.
        scheduler: a class such as ``torch.optim.lr_scheduler.CosineAnnealingLR``.
        scheduler_kwargs: its arguments besides the optimizer.
        warmup_steps: updates over which the factor rises; 0 for none.
    """

    def __init__(
        self, optimizer: Any, scheduler: type[LRScheduler], scheduler_kwargs: Mapping[str, Any], warmup_steps: int
    ) -> None:
        self.optimizer, self.warmup_steps, self.steps_done = optimizer, warmup_steps, 0
        self.scheduler = scheduler(optimizer, **scheduler_kwargs)
        self._undamped = [float(group["lr"]) for group in optimizer.param_groups]
        self._damp()

    def _damp(self) -> None:
        factor = min(1.0, (self.steps_done + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        for group, rate in zip(self.optimizer.param_groups, self._undamped, strict=True):
            group["lr"] = rate * factor

    @property
    def learning_rate(self) -> float:
        """Of the first group, for the next update."""
        return float(self.optimizer.param_groups[0]["lr"])

    def step(self) -> None:
        """Tells that an update was made."""
        # some schedulers go on from the rates they find, so they find their own
        for group, rate in zip(self.optimizer.param_groups, self._undamped, strict=True):
            group["lr"] = rate
        self.scheduler.step()
        self.steps_done += 1
        self._undamped = [float(group["lr"]) for group in self.optimizer.param_groups]
        self._damp()

    def state_dict(self) -> dict[str, Any]:
        """Progress, in plain numbers."""
        kept = {
            name: value
            for name, value in self.scheduler.state_dict().items()
            if isinstance(value, (int, float, list)) and not isinstance(value, bool)
        }
        return {"steps_done": self.steps_done, "undamped": list(self._undamped), "scheduler": kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on at the update ``state`` was taken at."""
        self.scheduler.load_state_dict({**self.scheduler.state_dict(), **state["scheduler"]})
        self.steps_done, self._undamped = int(state["steps_done"]), list(state["undamped"])
        self._damp()
