"""State of a self-play run: where it is, its best iteration, and checkpoints with all that the next update needs."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lm_core.checkpoints.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from lm_core.checkpoints.pretrained import PretrainedMixin
from lm_core.training.optimization import LearningRateSchedule, NonFiniteGuard
from lm_core.training.run_directory import RunDirectory
from spin_trainer.model.spin import SPIN
from spin_trainer.training.checks import check_same_run
from spin_trainer.training.parallel import ParallelPolicy
from spin_trainer.training.weights import (
    is_partly_frozen,
    load_stored_weights,
    read_stored_weights,
    stored_weights,
    write_stored_weights,
)


@dataclass
class RunState:
    """Where a run is.

    Attributes:
        iteration: number of the iteration that is under way, from 0; as many are complete.
        update: updates done within it.
        steps: updates done in all.
        opponent: fingerprint of the opponent's weights.
        previous_opponent: that of the iteration before.
    """

    iteration: int = 0
    update: int = 0
    steps: int = 0
    opponent: str = ""
    previous_opponent: str | None = None


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
        return (
            self.patience is not None
            and self.number is not None
            and len(self.history) - 1 - self.number >= self.patience
        )

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


class RunCheckpoints:
    """Writes and reads a run's checkpoints.

    Args:
        spin: policy and reference.
        parallel: how the policy is spread over processes.
        best: held-out measures so far.
        guard: counts skipped updates.
        live_reference: whether the reference is needed to go on within an iteration.
        tokenizer: travels along.
        keep: how many checkpoints stay; None for all.
    """

    def __init__(
        self,
        *,
        spin: SPIN,
        parallel: ParallelPolicy,
        best: BestIteration,
        guard: NonFiniteGuard,
        live_reference: bool,
        tokenizer: Any,
        keep: int | None,
    ) -> None:
        self.spin, self.parallel, self.best, self.guard = spin, parallel, best, guard
        self.live_reference, self.tokenizer, self.keep = live_reference, tokenizer, keep

    def read(self, run: RunDirectory, state: RunState, identity: Mapping[str, Any]) -> dict[str, Any]:
        """Puts weights and counters where the newest checkpoint has them; refused before anything is changed.

        Returns:
            The states of optimizer, schedule, reference and random generators, for going on within an iteration.

        Raises:
            CheckpointError: it is of another run, damaged, or does not fit.
        """
        checkpoint: Checkpoint = load_checkpoint(run.checkpoints)
        found = checkpoint.trainer_state
        check_same_run(checkpoint, identity)
        load_stored_weights(self.spin.policy_model, checkpoint.model_state or {}, str(checkpoint.path))
        state.iteration, state.update, state.steps = found["iteration"], found["update"], checkpoint.step
        state.opponent, state.previous_opponent = found["opponent"], found["previous_opponent"]
        self.best.history = list(found["history"])
        self.guard.load_state_dict(found["guard"])
        return {**found, "rng": checkpoint.rng}

    def write(
        self,
        run: RunDirectory,
        state: RunState,
        identity: Mapping[str, Any],
        optimizer: torch.optim.Optimizer | None = None,
        schedule: LearningRateSchedule | None = None,
    ) -> None:
        """Writes a checkpoint; within an iteration with optimizer and schedule. Every process calls it."""
        policy: Any = self.spin.policy_model
        ours = isinstance(policy, PretrainedMixin) and not is_partly_frozen(policy)
        within = optimizer is not None and schedule is not None
        save_checkpoint(
            run.checkpoints,
            state.steps,
            model=stored_weights(policy) if self.parallel.fsdp or not ours else policy,
            config=policy.config if ours else None,
            trainer_state={
                **identity,
                "iteration": state.iteration,
                "update": state.update,
                "opponent": state.opponent,
                "previous_opponent": state.previous_opponent,
                "history": self.best.history,
                "guard": self.guard.state_dict(),
                "optimizer": self.parallel.optimizer_state(optimizer) if optimizer is not None else None,
                "schedule": schedule.state_dict() if schedule is not None else None,
                "reference": self.spin.ref_model.exported() if within and self.live_reference else None,
            },
            tokenizer=self.tokenizer,
            keep=self.keep,
        )
