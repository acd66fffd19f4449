"""What reward functions learn of a run (``trainer_state``), and what they log next to their rewards."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TrainerState:
    """Progress of a run, under transformers' names.

    Attributes:
        global_step: completed optimizer updates.
        max_steps: optimizer updates of the run; 0 outside of ``train``.
        epoch: completed passes over the prompts.
        is_world_process_zero: True in the main process.
    """

    global_step: int = 0
    max_steps: int = 0
    epoch: float = 0.0
    is_world_process_zero: bool = True


@dataclass
class RewardLog:
    """Logs of the rewards of some responses.

    Attributes:
        trainer_state: progress of the run, passed to functions that take it.
        learn: True where the responses are trained on, so that a reward that learns may learn from them.
        terms: each reward of a list ``(b,)`` by name, NaN where it left a response out.
        metrics: numbers of ``log_metric``.
        columns: values of ``log_extra``, one for each response.
    """

    trainer_state: TrainerState = field(default_factory=TrainerState)
    learn: bool = False
    terms: dict[str, list[float]] = field(default_factory=dict)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    columns: dict[str, list[Any]] = field(default_factory=dict)

    def log_metric(self, name: str, value: Any) -> None:
        """Adds a number, of which a phase's metrics have the mean.

        Raises:
            TypeError: it is not a number.
        """
        if isinstance(value, bool) or not isinstance(value, int | float | Tensor):
            raise TypeError(f"log_metric({name!r}) needs a number, got {value!r}"[:200])
        self.metrics.setdefault(str(name), []).append(float(value))

    def log_extra(self, name: str, values: Any) -> None:
        """Adds a column to the samples.

        Raises:
            TypeError: it is not a list.
        """
        if isinstance(values, str) or not isinstance(values, Sequence | Tensor):
            raise TypeError(f"log_extra({name!r}) needs a list of one value per response, got {values!r}"[:200])
        self.columns[str(name)] = values.tolist() if isinstance(values, Tensor) else list(values)

    def add_term(self, name: str, values: Tensor) -> None:
        """Adds the values of one reward; a name that exists gets a number."""
        count = sum(other.partition("#")[0] == name for other in self.terms)
        self.terms[f"{name}#{count + 1}" if count else name] = values.tolist()

    def values(self) -> dict[str, float]:
        """Metrics: means of ``log_metric``, mean and standard deviation of each term without what it left out."""
        found = {name: sum(numbers) / len(numbers) for name, numbers in self.metrics.items()}
        for name, numbers in self.terms.items():
            present = torch.tensor([number for number in numbers if not math.isnan(number)], dtype=torch.float64)
            if present.numel():
                found[f"rewards/{name}/mean"] = float(present.mean())
                found[f"rewards/{name}/std"] = float(present.std(correction=0))
        return found

    def sample_columns(self) -> dict[str, list[Any]]:
        """Columns of the samples: each term, and what functions logged."""
        return {**{f"rewards/{name}": values for name, values in self.terms.items()}, **self.columns}


def merged(logs: Sequence[RewardLog]) -> RewardLog:
    """The logs of several batches of responses; columns are of single batches and left out."""
    whole = RewardLog()
    for log in logs:
        for name, numbers in log.terms.items():
            whole.terms.setdefault(name, []).extend(numbers)
        for name, numbers in log.metrics.items():
            whole.metrics.setdefault(name, []).extend(numbers)
    return whole
