"""Training the cross-attentions of a composition: one loop over ``accelerate``, resumed bit for bit.

Each update takes ``grad_accum_steps`` micro-batches on every process and divides their summed loss by the number of
tokens they count TOGETHER, so that an update is the same however its examples are spread. A checkpoint holds the
learned part only, beside optimizer, schedule and random states; the frozen models are not written again.
"""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from calm_pytorch.model.adapter_files import check_wiring
from calm_pytorch.model.calm import CALM
from calm_pytorch.training.data import Batches
from calm_pytorch.training.example_order import ExampleOrder
from calm_pytorch.training.objective import SummedLoss, check_settings, updates_of_warmup
from calm_pytorch.training.state_cache import StateCache
from calm_pytorch.training.warmup_schedule import WarmupSchedule
from lm_core.causal_lm import eval_mode
from lm_core.checkpoints.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from lm_core.checkpoints.manifest import CheckpointError
from lm_core.checkpoints.weights import load_weights
from lm_core.checks import either, typed
from lm_core.distributed import all_reduce_sum, loss_normalizer, rank, world_size
from lm_core.rng import restore_rng, seed_everything
from lm_core.training.accelerator import InterruptHandler, pick_precision, start_accelerator
from lm_core.training.metrics import MetricsLog, plot_curves, progress_bar
from lm_core.training.optimization import LearningRateSchedule, NonFiniteGuard, finish_update, optimizer_groups
from lm_core.training.run_directory import RunDirectory


class FineTuner:
    """Trains the learned part of a CALM.

    Args:
        calm: trained in place, on the device it is on.
        learning_rate: at its peak.
        weight_decay: of matrices; norms, gains and biases do not decay.
        batch_size: examples of a micro-batch on each process.
        max_steps: optimizer updates of the whole run.
        num_train_steps: the original's name of ``max_steps``.
        dataset: with ``len`` and ``dataset[i]``: dicts of arguments of ``CALM.forward``, or tuples of them.
        data_kwarg_names: names of what a tuple holds.
        accelerate_kwargs: "log_with": names of trackers.
        checkpoint_every: updates between checkpoints; there is always one at the end.
        checkpoint_dir: folder of the run (``lm_core.training.run_directory.RunDirectory``); by default "./checkpoints".
        checkpoint_path: the original's name of ``checkpoint_dir``.
        scheduler: a torch scheduler class; None keeps the peak after the warmup.
        scheduler_kwargs: of the scheduler.
        warmup: part of the updates over which the learning rate rises.
        warmup_steps: the same as a number of updates, as the original has it; 1000 if neither is given.
        max_grad_norm: bound of the gradients' global norm; None only measures it.
        gradient_accumulation: micro-batches of an update; by default 1.
        grad_accum_steps: the original's name of ``gradient_accumulation``.
        valid_dataset: held-out examples.
        validate_every: updates between validations; there is one before and one after training too.
        collate_fn: makes a batch of examples; torch's default stacks tensors.
        cache_augment_states: reads each example's static prompt once and keeps its states in memory; those of a plain
            x-transformers anchor up to its first connection, too.
        gradient_checkpointing: the anchor's blocks compute their activations again in the backward pass.
        precision: "auto" is bf16 on a GPU that has it and fp32 elsewhere.
        seed: of the order of examples and of dropout.
        resume: "auto" goes on if the folder has a checkpoint, True demands one, False demands a folder without a run.
        keep_checkpoints: how many stay; None for all.
        trackers: objects with ``log(values, step=...)``.

    Raises:
        ValueError: a number is out of range, or the dataset is smaller than an update.
        TypeError: an argument is of another type.
    """

    @typed
    def __init__(
        self,
        calm: CALM,
        *,
        learning_rate: float,
        weight_decay: float,
        batch_size: int,
        dataset: Any,
        max_steps: int | None = None,
        num_train_steps: int | None = None,
        data_kwarg_names: Sequence[str] = ("seq", "mask", "prompt"),
        accelerate_kwargs: dict[str, Any] | None = None,
        checkpoint_every: int = 1000,
        checkpoint_dir: str | Path | None = None,
        checkpoint_path: str | Path | None = None,
        scheduler: type[LRScheduler] | None = None,
        scheduler_kwargs: dict[str, Any] | None = None,
        warmup: float | None = None,
        warmup_steps: int | None = None,
        max_grad_norm: float | None = 0.5,
        gradient_accumulation: int | None = None,
        grad_accum_steps: int | None = None,
        valid_dataset: Any = None,
        validate_every: int = 100,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        cache_augment_states: bool = False,
        gradient_checkpointing: bool = False,
        precision: Literal["auto", "fp32", "bf16"] = "auto",
        seed: int = 0,
        resume: bool | Literal["auto"] = "auto",
        keep_checkpoints: int | None = 2,
        trackers: Sequence[Any] = (),
    ) -> None:
        num_train_steps = either(None, max_steps=max_steps, num_train_steps=num_train_steps)
        if num_train_steps is None:
            raise ValueError("max_steps (or num_train_steps) must be given, got None")
        accumulation = either(None, gradient_accumulation=gradient_accumulation, grad_accum_steps=grad_accum_steps)
        grad_accum_steps = 1 if accumulation is None else accumulation
        folder = either(None, checkpoint_dir=checkpoint_dir, checkpoint_path=checkpoint_path) or "./checkpoints"
        warmup_steps = updates_of_warmup(warmup, warmup_steps, num_train_steps)
        check_settings(
            counts={
                "num_train_steps": num_train_steps,
                "batch_size": batch_size,
                "checkpoint_every": checkpoint_every,
                "validate_every": validate_every,
                "grad_accum_steps": grad_accum_steps,
            },
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            warmup_steps=warmup_steps,
            max_grad_norm=max_grad_norm,
            datasets={"dataset": dataset, "valid_dataset": valid_dataset},
            accelerate_kwargs=accelerate_kwargs or {},
        )
        self.calm, self.model = calm, calm
        self.device = next(calm.trainable_parameters()).device
        pick_precision(precision, self.device)  # refuses what the device cannot do
        self.cache = StateCache(calm) if cache_augment_states else None
        self.batches = Batches(data_kwarg_names, collate_fn, self.device)
        names = (accelerate_kwargs or {}).get("log_with") or []
        self.tracker_names = [names] if isinstance(names, str) else list(names)
        self.checkpoint_path = Path(folder)
        self.accelerator = start_accelerator(self.device, tracker_names=self.tracker_names, folder=self.checkpoint_path)
        self.order = ExampleOrder(
            length=len(dataset),
            batch_size=batch_size,
            micro_batches=grad_accum_steps,
            seed=seed,
            rank=rank(),
            world_size=world_size(),
        )
        self.dataset, self.valid_dataset = dataset, valid_dataset
        self.num_train_steps, self.batch_size, self.seed = num_train_steps, batch_size, seed
        self.checkpoint_every, self.validate_every, self.keep_checkpoints = (
            checkpoint_every,
            validate_every,
            keep_checkpoints,
        )
        self.max_grad_norm, self.resume, self.trackers = max_grad_norm, resume, list(trackers)
        self.gradient_checkpointing = gradient_checkpointing
        self.objective = SummedLoss(calm, precision)
        groups = optimizer_groups(calm, weight_decay=weight_decay, parameters=list(calm.trainable_parameters()))
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate)
        self.schedule: Any
        if scheduler is None:
            self.schedule = LearningRateSchedule(self.optimizer, kind="constant", warmup_steps=warmup_steps)
        else:
            self.schedule = WarmupSchedule(self.optimizer, scheduler, scheduler_kwargs or {}, warmup_steps)
        self.guard = NonFiniteGuard()
        self.step, self.started_at, self.interrupted = 0, 0, False
        self.valid_loss = float("nan")
        self._parallel: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this is the first process."""
        return rank() == 0

    def print(self, message: Any) -> None:
        """Prints in the first process only."""
        if self.is_main:
            print(message)

    # --------------------------------------------------------------------------------------------------- the loop

    def __call__(self, forward_kwargs: Mapping[str, Any] | None = None) -> None:
        """Trains up to ``num_train_steps``, or until Ctrl-C; a checkpoint is written in any case.

        Args:
            forward_kwargs: further arguments of every ``CALM.forward``.

        Raises:
            CheckpointError: the folder's checkpoint is of another wiring, other data or another number of processes.
            FileNotFoundError, FileExistsError: the folder does not suit ``resume``.
            RuntimeError: another run is using the folder, or the loss was not finite too often in a row.
        """
        extra = dict(forward_kwargs or {})
        with self._run_directory() as run, contextlib.ExitStack() as stack:
            if self._parallel is None:
                self._start(run)
            self.started_at = self.step
            log = self._metrics(run, stack)
            interrupt = stack.enter_context(InterruptHandler())
            if self.step == 0:
                self._validate(log, extra)
            self.interrupted = False
            while self.step < self.num_train_steps and not self.interrupted:
                log.log(self.step + 1, self._update(extra))
                self.step += 1
                log.progress.update()
                last = self.step == self.num_train_steps
                self.interrupted = interrupt.should_stop() and not last
                if self.step % self.validate_every == 0 or last:
                    self._validate(log, extra)
                if self.step % self.checkpoint_every == 0 or last or self.interrupted:
                    log.sync()
                    self._write(run.checkpoints)
            if self.is_main:
                with contextlib.suppress(ImportError, ValueError):
                    plot_curves(run.metrics_path, run.curves_path)

    def _update(self, extra: dict[str, Any]) -> dict[str, float]:
        started = time.monotonic()
        micro_batches = [
            self.batches.of(self.dataset, indices, self.cache) for indices in self.order.micro_batches_of(self.step)
        ]
        counts = sum(self.objective.count(batch) for batch in micro_batches)
        labels, normalizer = loss_normalizer(counts, self.device)
        loss = torch.zeros((), device=self.device)
        for number, batch in enumerate(micro_batches, start=1):
            last = number == len(micro_batches)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self._parallel):
                part = self._parallel({**batch, **extra}, normalizer)
                self.accelerator.backward(part)
            loss += part.detach().float() / world_size()
        loss = all_reduce_sum(loss)
        finished = finish_update(
            self.step + 1,
            loss,
            self.calm.trainable_parameters(),
            optimizer=self.optimizer,
            schedule=self.schedule,
            guard=self.guard,
            max_grad_norm=self.max_grad_norm,
        )
        return {
            "loss": float(loss),
            **finished,
            "tokens_per_second": round(labels / max(time.monotonic() - started, 1e-9)),
            "epoch": self.step // self.order.updates_per_epoch,
        }

    @torch.no_grad()
    def validate(self, forward_kwargs: Mapping[str, Any] | None = None) -> float:
        """Mean loss a token over ``valid_dataset``; every process calls it and gets the result of all."""
        one, totals = torch.ones((), device=self.device), torch.zeros(2, device=self.device)
        with eval_mode(self.calm):
            count = len(self.valid_dataset)
            for start in range(rank() * self.batch_size, count, self.batch_size * world_size()):
                batch = self.batches.of(self.valid_dataset, range(start, min(start + self.batch_size, count)))
                totals[0] += self.objective({**batch, **dict(forward_kwargs or {})}, one)
                totals[1] += self.objective.count(batch)
        total, labels = all_reduce_sum(totals).tolist()
        self.valid_loss = total / max(labels, 1.0)
        return self.valid_loss

    def _validate(self, log: MetricsLog, extra: dict[str, Any]) -> None:
        if self.valid_dataset is not None:
            log.log(self.step, validation_loss=self.validate(extra))

    # ----------------------------------------------------------------------------------- beginning and going on

    def _run_directory(self) -> RunDirectory:
        return RunDirectory(
            self.checkpoint_path,
            resume=self.resume if self._parallel is None else "auto",
            seed=self.seed,
            device=self.device,
            settings={"num_train_steps": self.num_train_steps, "wiring": self.calm.wiring},
            packages=("calm-pytorch", "accelerate", "x-transformers"),
        )

    def _start(self, run: RunDirectory) -> None:
        if run.resumes:
            self._restore(load_checkpoint(run.checkpoints))
        else:
            seed_everything((self.seed + rank()) % 2**32)
        self._parallel = self.accelerator.prepare_model(self.objective, device_placement=False)

    def _metrics(self, run: RunDirectory, stack: contextlib.ExitStack) -> MetricsLog:
        modes = {module: module.training for module in self.objective.modules()}
        stack.callback(_set_modes, modes)
        checkpointing = self.calm.gradient_checkpointing
        stack.callback(setattr, self.calm, "gradient_checkpointing", checkpointing)
        self.calm.gradient_checkpointing = self.gradient_checkpointing
        self.objective.train()
        trackers = list(self.trackers)
        if self.tracker_names:
            self.accelerator.init_trackers("calm-pytorch")
            stack.callback(lambda: [tracker.finish() for tracker in self.accelerator.trackers])
            trackers.append(self.accelerator)
        bar = progress_bar(self.num_train_steps, initial=self.step, description="train", is_main=self.is_main)
        return stack.enter_context(
            MetricsLog(
                run.metrics_path,
                resume_step=self.step or -1,
                is_main=self.is_main,
                trackers=trackers,
                progress=stack.enter_context(bar),
                shown=("loss", "validation_loss"),
            )
        )

    def _restore(self, checkpoint: Checkpoint) -> None:
        state, where = checkpoint.trainer_state, str(checkpoint.path)
        check_wiring(self.calm.wiring, checkpoint.config.get("wiring", {}), where)
        if state["order"] != self.order.fingerprint():
            raise CheckpointError(f"{where} is of other data: {state['order']}, now {self.order.fingerprint()}")
        load_weights(self.calm.cross_attns, checkpoint.model_state or {}, where=where)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.guard.load_state_dict(state["guard"])
        self.step = checkpoint.step
        restore_rng(checkpoint.rng)

    def _write(self, directory: Path, keep: int | None = None) -> Path:
        return save_checkpoint(
            directory,
            self.step,
            model=dict(self.calm.cross_attns.state_dict()),
            config={"wiring": self.calm.wiring},
            trainer_state={
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "guard": self.guard.state_dict(),
                "order": self.order.fingerprint(),
            },
            keep=keep or self.keep_checkpoints,
        )

    def save(self, filename: str, overwrite: bool = True) -> Path:
        """Writes all that training depends on into the folder ``checkpoint_path / filename``; all processes call it.

        Raises:
            FileExistsError: there is one and ``overwrite`` is False.
        """
        target = self.checkpoint_path / filename
        if target.exists() and not overwrite:
            raise FileExistsError(f"filename must be new unless overwrite=True, got {target}")
        return self._write(target, keep=1)

    def load(self, filename: str) -> None:
        """Goes on from what ``save`` wrote.

        Raises:
            FileNotFoundError: there is nothing of this name.
            CheckpointError: it is of another wiring, other data or another number of processes.
        """
        self._restore(load_checkpoint(self.checkpoint_path / filename))


def _set_modes(modes: Mapping[nn.Module, bool]) -> None:
    for module, mode in modes.items():
        module.training = mode
