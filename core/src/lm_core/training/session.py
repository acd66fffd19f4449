"""The beginning and the end of a training run, which every trainer's loop stands between.

A trainer's ``train`` is its own readable loop; what it does before the first update, to decide whether there is
another, and with the checkpoint of a killed run is the same everywhere and is here.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lm_core.checkpoints.checkpoint import Checkpoint, on_main_process
from lm_core.checkpoints.manifest import CheckpointError
from lm_core.checks import typed
from lm_core.distributed import broadcast_object, rank
from lm_core.training.config import CommonSettings
from lm_core.training.metrics import MetricsLog, plot_curves, progress_bar, read_metrics
from lm_core.training.optimization import LearningRateSchedule, optimizer_groups
from lm_core.training.run_directory import RunDirectory

Outcome = Literal["finished", "interrupted", "out of time"]


class Stopping:
    """Decides, for all processes alike, whether a loop goes on behind an update.

    Args:
        interrupt: asked whether someone pressed Ctrl-C; an ``InterruptHandler`` that has been entered.
        max_seconds: from now; None for no limit.
    """

    def __init__(self, interrupt: Any, max_seconds: float | None) -> None:
        self._interrupt, self._max_seconds, self._started = interrupt, max_seconds, time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the loop began."""
        return time.monotonic() - self._started

    def outcome(self, *, last: bool) -> Outcome:
        """ "finished" while nothing asks to stop, and always behind the last update; every process has to ask."""
        interrupted = self._interrupt.should_stop()
        # one clock decides, or some processes would go on alone
        late = self._max_seconds is not None and broadcast_object(self.seconds > self._max_seconds)
        if last:
            return "finished"
        return "interrupted" if interrupted else "out of time" if late else "finished"


def split_trackers(trackers: Sequence[Any]) -> tuple[list[str], list[Any]]:
    """The names that ``accelerate`` is to start, and the objects with ``log(values, step=...)``."""
    return (
        [tracker for tracker in trackers if isinstance(tracker, str)],
        [tracker for tracker in trackers if not isinstance(tracker, str)],
    )


@contextlib.contextmanager
def open_metrics(
    run: RunDirectory,
    *,
    objective: nn.Module,
    accelerator: Any,
    trackers: Sequence[Any],
    project: str,
    settings: Mapping[str, Any],
    step: int,
    max_steps: int,
    shown: Sequence[str] = ("loss", "tokens_per_second"),
) -> Iterator[MetricsLog]:
    """The run's log with its bar and trackers; ``objective`` is in training mode inside, afterwards all as it was.

    Args:
        run: entered.
        objective: what is trained.
        accelerator: starts the trackers that are names.
        trackers: as a trainer takes them.
        project: name under which trackers file the run.
        settings: that trackers record; None is left out.
        step: updates that are done.
        max_steps: of the whole run.
        shown: values that the bar shows.
    """
    names, objects = split_trackers(trackers)
    with contextlib.ExitStack() as stack:
        for module in objective.modules():
            stack.callback(setattr, module, "training", module.training)
        objective.train()
        if names:
            accelerator.init_trackers(project, config={k: v for k, v in settings.items() if v is not None})
            stack.callback(lambda: [tracker.finish() for tracker in accelerator.trackers])
            objects = [*objects, accelerator]
        is_main = rank() == 0
        bar = stack.enter_context(progress_bar(max_steps, initial=step, description="train", is_main=is_main))
        yield stack.enter_context(
            MetricsLog(
                run.metrics_path,
                resume_step=step or -1,
                is_main=is_main,
                trackers=objects,
                progress=bar,
                shown=shown,
            )
        )


def adamw(model: nn.Module, settings: CommonSettings) -> tuple[torch.optim.AdamW, LearningRateSchedule]:
    """AdamW (arXiv 1711.05101) on what of ``model`` is trained, and its schedule: warmup, then a cosine."""
    optimizer = torch.optim.AdamW(
        optimizer_groups(model, weight_decay=settings.weight_decay),
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
    )
    schedule = LearningRateSchedule(
        optimizer,
        kind="cosine",
        warmup_steps=settings.warmup_steps,
        total_steps=settings.max_steps,
        final_scale=settings.final_learning_rate,
    )
    return optimizer, schedule


@contextlib.contextmanager
def own_settings(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Loading a state inside leaves the groups' settings (learning rate, decay) those of this run."""
    own = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    yield
    for group, values in zip(optimizer.param_groups, own, strict=True):
        group.update(values)


@typed
def check_goes_on(
    checkpoint: Checkpoint, *, trainer: str, arguments: Mapping[str, Any], names: Sequence[str] | None = None
) -> None:
    """Raises ``CheckpointError`` unless a run of this trainer, with this model, can go on from ``checkpoint``.

    Args:
        checkpoint: the one to go on from.
        trainer: name of the trainer's class.
        arguments: that the model at hand was constructed with.
        names: those of them that change what its weights mean; by default all.
    """
    where, written_by = checkpoint.path, checkpoint.trainer_state.get("trainer")
    if written_by != trainer:
        raise CheckpointError(f"{where} was not written by {trainer}, got {written_by!r}")
    stored = checkpoint.config.get("arguments", {})
    changed = [name for name in (names or arguments) if stored.get(name) != arguments[name]]
    if changed:
        what = ", ".join(f"{name} is {arguments[name]}, but was {stored.get(name)}" for name in changed)
        raise CheckpointError(f"{where} is of another architecture: {what}")


def draw_curves(run: RunDirectory, names: Sequence[str]) -> Path | None:
    """``curves.png`` of those ``names`` that the run has at two updates or more, drawn by rank 0.

    None, for every process, where there is nothing to draw or matplotlib is not installed.
    """

    def draw() -> Path | None:
        rows = read_metrics(run.metrics_path)
        present = [name for name in names if sum(row.get(name) is not None for row in rows) > 1]
        with contextlib.suppress(ImportError):
            return plot_curves(run.metrics_path, run.curves_path, names=present) if present else None
        return None

    drawn: Path | None = on_main_process(draw)
    return drawn
