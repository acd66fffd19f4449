"""The lifecycle of a training run, around a loop that stays in the trainer.

A session owns the run's folder and its lock, resuming and its checks, seeds, progress bar, metrics, trackers, curves,
validation and checkpoints on schedule, the time limit, the guard against losses that are not finite, Ctrl-C and
other signals to stop, the wrapping for several processes, and the release of all of these at the end::

    class Trainer:
        def __init__(self, model, data, checkpoint_dir, settings):
            self.session = TrainingSession("Trainer", config=settings, checkpoint_dir=checkpoint_dir)
            self.objective = Loss(self.session.place(model))
            self.batches = Batches(data, rank=rank(), world_size=world_size())
            self.session.register(
                model=model,
                objective=self.objective,
                optimizer=lambda: adamw(model, settings),
                state={"batches": self.batches},
                validate=self._validate,
            )

        def train(self):
            with self.session.run() as session:
                for _ in session.steps():
                    batches = [next(self.batches) for _ in range(4)]
                    labels, normalizer = loss_normalizer(sum(batch.num_labels for batch in batches), session.device)
                    for batch in session.micro_batches(batches):
                        session.backward(session.module(batch.ids, batch.labels, normalizer))
                    session.log(session.optimizer_step(), epoch=self.batches.epoch)
            return session.result(TrainingResult)

A checkpoint holds all state that the next update depends on: a run that was killed at any instant and resumed ends with
the same weights, bit for bit, as an uninterrupted one (with equal settings, device, torch and number of processes).
Step N writes its row of metrics, then validates, then saves; a resumed run drops rows after its checkpoint, so
``metrics.jsonl`` has every update once.
"""

import contextlib
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lm_core.checkpoints.checkpoint import Checkpoint, load_checkpoint, on_main_process, save_checkpoint
from lm_core.checkpoints.manifest import CheckpointError
from lm_core.checkpoints.pretrained import PretrainedMixin, check_config
from lm_core.checkpoints.tensor_files import plain
from lm_core.checkpoints.weights import load_weights
from lm_core.checks import typed
from lm_core.distributed import (
    all_reduce_gradients,
    all_reduce_sum,
    broadcast_object,
    data_parallel,
    end_process_group_at_exit,
    is_distributed,
    make_replicas_equal,
    rank,
    release,
    world_size,
)
from lm_core.rng import capture_rng, restore_rng, seed_everything
from lm_core.training import fsdp as sharding
from lm_core.training.accelerator import (
    InterruptHandler,
    check_compilable,
    pick_device,
    pick_precision,
    start_accelerator,
)
from lm_core.training.blocks import blocks_of, compiled_blocks
from lm_core.training.config import CommonSettings, RunSettings
from lm_core.training.metrics import MetricsLog, plot_curves, progress_bar, read_series
from lm_core.training.optimization import LearningRateSchedule, NonFiniteGuard, finish_update, optimizer_groups
from lm_core.training.precision import HALF, float32_masters
from lm_core.training.run_directory import RunDirectory

Outcome = Literal["finished", "stopped early", "interrupted", "out of time"]

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)
R = TypeVar("R", bound="TrainingResult")


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """Outcome of a run.

    Attributes:
        outcome: "finished", "stopped early" (no improvement), "interrupted" (by a signal) or "out of time"
            (``max_seconds``).
        first_step: updates done before this call.
        step: updates done.
        seconds: duration of this call; None if the run was already finished.
        checkpoints: folder of the checkpoints, the newest of which is of ``step``; None for a run without a folder.
        curves: plot of the metrics; None without a folder or matplotlib, or with nothing to draw.
        signal: number of the signal that interrupted the run; None if none did.
    """

    outcome: Outcome
    first_step: int
    step: int
    seconds: float | None
    checkpoints: Path | None
    curves: Path | None
    signal: int | None = None


@dataclass(frozen=True)
class SavedValue:
    """Two functions as an object with ``state_dict`` and ``load_state_dict``, for the state of a session.

    Args:
        state_dict: returns the value: nested containers of tensors, numbers and strings.
        load_state_dict: receives the value from a checkpoint.
    """

    state_dict: Callable[[], Any]
    load_state_dict: Callable[[Any], None]


class TrainingSession:
    """A training run: construct it first (it connects the processes), then ``register``, then ``run``.

    Args:
        trainer: class name of the trainer; checkpoints of another trainer are rejected.
        config: settings of the run.
        checkpoint_dir: folder of the run; None writes nothing.
        resume: "auto" resumes if the folder has a checkpoint, True requires one, False requires a folder without a run.
        trackers: names of trackers that ``accelerate`` knows ("tensorboard", "wandb"), and objects with
            ``log(values, step=...)``.
        packages: distributions whose versions are recorded; the first names the run for the trackers.
        accelerator: an ``accelerate.Accelerator`` to use instead of a new one.

    Attributes:
        device: training device.
        step: optimizer updates done.
        max_steps: optimizer updates of the whole run, by default those of ``config``; None if unknown.
        outcome: "finished" until something stops the run.
        module: objective as the loop calls it: compiled, wrapped in DDP or sharded. None outside of ``run``.
        optimizer: the optimizer; None before the first ``run``.
        schedule: its learning rate schedule.
        precisions: dtypes of the weights as stored and as trained, once registered.
        guard: guard that skips updates that are not finite.
        first_validation: metrics of the validation before training.
        last_validation: metrics of the newest validation.
        folder: the open run directory; None without ``checkpoint_dir``.

    Raises:
        ValueError: the device or the precision is not available, a tracker is unknown, or the launcher would do
            something else; or the device, torch or the number of processes cannot shard.
        TypeError: a tracker has no ``log``.
    """

    @typed
    def __init__(
        self,
        trainer: str,
        *,
        config: RunSettings,
        checkpoint_dir: str | Path | None,
        resume: bool | Literal["auto"] = "auto",
        trackers: Sequence[Any] = (),
        packages: Sequence[str] = (),
        accelerator: Any = None,
    ) -> None:
        self.trainer = trainer
        self.config = config
        self.checkpoint_dir = None if checkpoint_dir is None else Path(checkpoint_dir).expanduser()
        self.packages = tuple(packages)
        self._resume: bool | Literal["auto"] = resume
        self._tracker_names = [tracker for tracker in trackers if isinstance(tracker, str)]
        self._trackers = [tracker for tracker in trackers if not isinstance(tracker, str)]
        for tracker in self._trackers:
            if not callable(getattr(tracker, "log", None)):
                raise TypeError(f"trackers must have log(values, step=...), got {type(tracker).__name__}")
        self.device = pick_device(config.device) if accelerator is None else accelerator.device
        pick_precision(config.precision, self.device)  # raises for a precision that the device lacks
        if accelerator is None:
            accelerator = start_accelerator(
                self.device, tracker_names=self._tracker_names, folder=self.checkpoint_dir or "."
            )
        self.accelerator = accelerator
        if config.fsdp:
            sharding.check_shardable(self.device)
        if is_distributed():
            end_process_group_at_exit()  # not earlier: later sessions of this process use the group too
        # counters and results
        self.step = 0
        self.max_steps: int | None = getattr(config, "max_steps", None)
        self.outcome: Outcome = "finished"
        self.guard = NonFiniteGuard()
        self.optimizer: Any = None
        self.schedule: Any = None
        self.module: Any = None
        self.first_validation: dict[str, Any] = {}
        self.last_validation: dict[str, Any] = {}
        self.folder: RunDirectory | None = None
        self._prepared = False
        self._validation_is_due = False
        self._saved_step: int | None = None
        self._stored_optimizer: tuple[Any, Any] | None = None
        self._loss: Tensor | None = None

    # ------------------------------------------------------------------------------------ model and optimizer

    def place(self, module: M) -> M:
        """Moves a module to train to the device; with ``fsdp``, ``run`` moves it block by block as it shards them."""
        return module if self.config.fsdp else module.to(self.device)

    def gathered(self) -> AbstractContextManager[None]:
        """Context in which every process holds all weights and uses the model alone; see ``lm_core.training.fsdp``."""
        return sharding.gathered(self.objective)

    def register(
        self,
        *,
        model: nn.Module,
        objective: nn.Module | None = None,
        optimizer: Callable[[], tuple[Any, Any]] | None = None,
        gradients: Literal["average", "sum"] = "average",
        blocks: Callable[[], Iterable[nn.Module]] | None = None,
        state: Mapping[str, Any] | None = None,
        rank_state: Mapping[str, Any] | None = None,
        architecture: Mapping[str, Any] | None = None,
        identity: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None,
        upgrade: Callable[[Checkpoint], Mapping[str, Any]] | None = None,
        save_weights: Callable[[], nn.Module | Mapping[str, Tensor]] | None = None,
        load_weights: Callable[[Checkpoint], None] | None = None,
        model_config: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None,
        tokenizer: Any = None,
        assets: Callable[[Path], None] | None = None,
        validate: Callable[[], Mapping[str, Any]] | None = None,
        max_steps: int | None = None,
        record: Mapping[str, Any] | None = None,
        curves: Sequence[str] | None = None,
        shown: Sequence[str] = ("loss", "tokens_per_second"),
    ) -> None:
        """Registers the parts of a run: what is trained, saved, checked and shown.

        Trained weights stored in half precision become float32 (``lm_core.training.precision``), which is printed.

        Args:
            model: model that checkpoints hold, on the device or from ``place``.
            objective: module the loop calls (``module``), in training mode within ``run``; by default the model.
            optimizer: function that makes optimizer and schedule, once the module is sharded; None if the trainer has
                its own, or calls ``use_optimizer``.
            gradients: "average" over processes, by DDP or FSDP; "sum" adds them up in ``optimizer_step``, for
                objectives that DDP cannot wrap.
            blocks: function that returns the submodules that ``fsdp`` gathers one at a time and ``compile`` compiles
                one by one, such as ``blocks_of`` the model. By default ``fsdp`` is refused, and the blocks of the
                objective are compiled.
            state: objects with ``state_dict`` and ``load_state_dict`` that the next update depends on. Their
                ``check_state(state)``, if any, all run before the first ``load_state_dict``.
            rank_state: state objects that differ between processes.
            architecture: arguments of the model that must be equal to resume.
            identity: other values that must be equal to resume, in addition to the seed.
            upgrade: function that converts the state of a checkpoint older than sessions to the keys of ``save``.
            save_weights: function that returns the weights of checkpoints instead of ``model``.
            load_weights: function that loads the weights of a checkpoint; nothing is sharded or wrapped yet.
            model_config: ``config.json`` of checkpoints, by default the model's own.
            tokenizer: tokenizer to store with the checkpoints, if it can be saved.
            assets: function that writes further files into the folder of a checkpoint.
            validate: function that returns metrics of held-out data, logged by name; every process calls it.
            max_steps: updates of the run, by default those of ``config``.
            record: further values for ``run.json``.
            curves: names of the metrics that are drawn; by default all.
            shown: names of the metrics that the progress bar shows.

        Raises:
            ValueError: the trainer does not shard, or the device or torch cannot compile.
        """
        if self.config.fsdp and blocks is None:
            raise ValueError(f"{self.trainer} does not support fsdp=True")
        if self.config.compile:
            check_compilable(self.device)
        self.model = model
        self.objective = model if objective is None else objective
        self.precisions = float32_masters(self.objective, model)
        if self.precisions.stored_dtype in HALF and rank() == 0:
            print(f"{'precision':<12}{self.precisions}", flush=True)
        self._make_optimizer = optimizer
        self._gradients = gradients
        self._blocks = blocks or (lambda: blocks_of(self.objective))
        self._state = dict(state or {})
        self._rank_state = dict(rank_state or {})
        self._architecture = dict(architecture or {})
        self._identity = identity if callable(identity) else lambda: identity or {}
        self._upgrade = upgrade
        self._save_weights = save_weights
        self._load_weights = load_weights
        self._model_config = model_config
        self._tokenizer = tokenizer if callable(getattr(tokenizer, "save_pretrained", None)) else None
        self._assets = assets
        self._validate = validate
        self.max_steps = max_steps or self.max_steps
        self._record = dict(record or {})
        self._curves = curves
        self._shown = tuple(shown)

    def use_optimizer(self, optimizer: torch.optim.Optimizer | None, schedule: Any = None) -> None:
        """Sets the optimizer; the first one after resuming takes its state from the checkpoint."""
        self.optimizer = optimizer
        self.schedule = schedule
        stored, self._stored_optimizer = self._stored_optimizer, None
        if stored is None or optimizer is None:
            return
        # the learning rate and decay are those of this run
        settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        if self.config.fsdp:
            sharding.load_full_optimizer_state(self.objective, optimizer, stored[0])
        else:
            optimizer.load_state_dict(stored[0])
        for group, values in zip(optimizer.param_groups, settings, strict=True):
            group.update(values)
        if schedule is not None:
            schedule.load_state_dict(stored[1])

    # -------------------------------------------------------------------------------------------------- loop

    @contextlib.contextmanager
    def run(self) -> Iterator["TrainingSession"]:
        """Opens the run, new or resumed; seeds or restores the generators of python, numpy and torch.

        A second ``run`` of the same session continues with its weights and counters.

        Raises:
            RuntimeError: another run is using the folder.
            CheckpointError: the checkpoint is damaged, or of another trainer, model, data, seed or number of processes;
                nothing was changed.
            FileNotFoundError, FileExistsError: the folder does not meet ``resume``.
        """
        with contextlib.ExitStack() as stack:
            # folder and lock, then weights and state
            if self.checkpoint_dir is not None:
                self.folder = stack.enter_context(
                    RunDirectory(
                        self.checkpoint_dir,
                        resume="auto" if self._prepared else self._resume,
                        seed=self.config.seed,
                        device=self.device,
                        settings={**asdict(self.config), **self._record},
                        packages=(*self.packages, "accelerate"),
                    )
                )
            if not self._prepared:
                resumes = self.folder is not None and self.folder.resumes
                self._prepare(load_checkpoint(self.folder.checkpoints) if self.folder and resumes else None)
            self.outcome = "finished"
            self._curves_path: Path | None = None
            self._first_step = self.step
            self._started = time.monotonic()
            # wrap for several processes, then train
            stack.callback(setattr, self, "module", None)
            self.module = self._objective_to_call(stack)
            if self._gradients == "average" and not self.config.fsdp and world_size() > 1:
                handler = getattr(self.accelerator, "ddp_handler", None)
                options = {} if handler is None else handler.to_kwargs()
                self.module = data_parallel(self.module, self.device, **options)
                stack.callback(release, self.module)
                # of DDP, for a model whose every parameter is used
                stack.enter_context(warnings.catch_warnings())
                warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
            if self.config.fsdp:
                stack.enter_context(sharding.quiet())
            self._open_metrics(stack)
            self.interrupt = stack.enter_context(InterruptHandler())
            yield self
            self._seconds = time.monotonic() - self._started
            if self.folder is not None:
                self._curves_path = draw_curves(self.folder, self._curves)

    def steps(self, until: int | None = None, *, ends: bool = True) -> Iterator[int]:
        """Yields the number of updates done before each update, until the goal is reached or the run is stopped.

        Each update is followed by validation and checkpoint when they are due.

        Args:
            until: number of updates to reach; by default ``max_steps``.
            ends: True validates before the first update of the run, and validates and saves after the last of these;
                False leaves that to the caller.
        """
        goal = self.max_steps if until is None else until
        if goal is None:
            raise ValueError("until is required in a session without max_steps, got None")
        if self._validation_is_due or (ends and self.step == 0):
            self.validate()
        while self.step < goal and self.outcome == "finished":
            done = self.step
            yield done
            if self.step == done:
                raise RuntimeError("the loop must call optimizer_step, or count its own update in session.step")
            last = self.step >= goal
            self.end_update(last=last)
            if last and ends:
                self.validate()
                self.save()

    def _objective_to_call(self, stack: contextlib.ExitStack) -> Any:
        """The objective; with ``compile``, its blocks are compiled until ``stack`` closes, or all of it without any."""
        if not self.config.compile:
            return self.objective
        blocks = list(self._blocks())
        if not blocks:
            return torch.compile(self.objective)
        stack.enter_context(compiled_blocks(blocks))
        return self.objective

    def micro_batches(self, batches: Sequence[T]) -> Iterator[T]:
        """The micro-batches of one update; processes exchange gradients in the backward of the last one only."""
        for index, batch in enumerate(batches, start=1):
            last = index == len(batches)
            if self.config.fsdp:
                self.objective.set_requires_gradient_sync(last)  # type: ignore[operator]
            wrapped = isinstance(self.module, DistributedDataParallel)
            with self.module.no_sync() if wrapped and not last else contextlib.nullcontext():
                yield batch

    def backward(self, loss: Tensor) -> None:
        """Accumulates the gradients of a loss, and the loss itself for the metrics of the update.

        DDP and FSDP average gradients over processes: each passes its summed loss divided by
        ``lm_core.distributed.loss_normalizer``. With ``gradients="sum"``, each passes its share of the loss.
        """
        # FSDP averages
        (loss * world_size() if self.config.fsdp and self._gradients == "sum" else loss).backward()
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        part = loss.detach().to(dtype)
        if self._gradients == "average":
            part = part / world_size()
        self._loss = part if self._loss is None else self._loss + part

    def optimizer_step(self) -> dict[str, float]:
        """Clips the gradients, steps the optimizer unless something is not finite, and counts the update.

        Returns:
            ``loss`` over all processes, ``learning_rate``, ``grad_norm`` before clipping, ``skipped`` updates so far.

        Raises:
            RuntimeError: too many updates in a row were skipped.
        """
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        if self.step == self._first_step:
            self._print_unused(parameters)
        if self.config.fsdp:
            self._average_unsharded(parameters)
        elif self._gradients == "sum":
            all_reduce_gradients(parameters)
        loss = all_reduce_sum(torch.zeros((), device=self.device) if self._loss is None else self._loss)
        self._loss = None
        values = finish_update(
            self.step + 1,
            loss,
            parameters,
            optimizer=self.optimizer,
            schedule=self.schedule,
            guard=self.guard,
            max_grad_norm=self.config.max_grad_norm,
        )
        self.step += 1
        return {"loss": float(loss), **values}

    def _print_unused(self, parameters: Sequence[nn.Parameter]) -> None:
        """Names the parameters that have no gradient on any process after the first backward."""
        used = torch.tensor([parameter.grad is not None for parameter in parameters], device=self.device)
        used = all_reduce_sum(used.int()).bool()
        names = {id(p): name for module in (self.objective, self.model) for name, p in module.named_parameters()}
        unused = [names.get(id(p), "?") for p, is_used in zip(parameters, used.tolist(), strict=True) if not is_used]
        if unused and rank() == 0:
            more = f" and {len(unused) - 5} more" if len(unused) > 5 else ""
            counts = f"{len(unused)} of {len(parameters)} trained tensors have no gradient in the first update"
            print(f"{'unused':<12}{counts}: {', '.join(unused[:5])}{more}", flush=True)

    @staticmethod
    def _average_unsharded(parameters: Sequence[nn.Parameter]) -> None:
        """Averages the gradients of scalars, which FSDP leaves out."""
        unsharded = [parameter for parameter in parameters if not hasattr(parameter, "full_tensor")]
        all_reduce_gradients(unsharded)
        for parameter in unsharded:
            assert parameter.grad is not None
            parameter.grad /= world_size()

    def end_update(self, *, last: bool = False) -> None:
        """Updates the bar, handles stop requests, validates and saves when due; ``steps`` calls it.

        With ``last``, the caller ends its loop here, and validates and saves itself.
        """
        self.progress.update()
        interrupted = self.interrupt.should_stop()
        # rank 0's clock decides for all, or some processes would continue alone
        limit = self.config.max_seconds
        late = limit is not None and broadcast_object(time.monotonic() - self._started > limit)
        if last:
            return
        self._validation_is_due = late or _is_due(self.step, getattr(self.config, "validate_every", None))
        if self._validation_is_due and not interrupted:  # an interrupted run validates when it is resumed
            self.validate()
            interrupted = self.interrupt.should_stop()
        self.outcome = "interrupted" if interrupted else "out of time" if late else "finished"
        if self.outcome != "finished" or _is_due(self.step, self.config.checkpoint_every):
            self.save()

    @property
    def stop_requested(self) -> bool:
        """True if this process received a stop signal, for work between updates that may end at any point."""
        return self.interrupt.requested

    def interruptible(self, work: Callable[[], T]) -> T | None:
        """The result of long work between updates, such as drawing responses; None once the run is interrupted.

        A signal to stop abandons the work at once, wherever it is: it must leave nothing half changed, and hold no
        collectives. If any process was asked to stop, all save a checkpoint of the state before the work, the
        ``outcome`` is "interrupted", and the caller leaves its loop.

        Args:
            work: function of this process's share; every process calls it.
        """
        random_states = capture_rng()
        result = self.interrupt.abandonable(work)
        if not self.interrupt.should_stop():
            return result
        restore_rng(random_states)
        self.outcome = "interrupted"
        if self._saved_step != self.step:
            self.save()
        return None

    def log(self, values: Mapping[str, Any] | None = None, **more: Any) -> None:
        """Writes a row of metrics at ``step``; see ``MetricsLog.log``."""
        self.metrics.log(self.step, values, **more)

    def validate(self) -> dict[str, Any]:
        """Validates and logs; returns the metrics."""
        if self._validate is None:
            self._validation_is_due = False
            return {}
        values = dict(self._validate())
        if values:
            self.log(values)
        self._validation_is_due = False
        self.last_validation = values
        if not self.first_validation:
            self.first_validation = values
        return values

    def result(self, kind: type[R], **values: Any) -> R:
        """The result of the last ``run``, as a ``TrainingResult`` or a dataclass that extends it with ``values``."""
        common: dict[str, Any] = {
            "outcome": self.outcome,
            "first_step": self._first_step,
            "step": self.step,
            "seconds": None if self.step == self._first_step else round(self._seconds, 1),
            "checkpoints": None if self.folder is None else self.folder.checkpoints,
            "curves": self._curves_path,
            "signal": self.interrupt.received if self.outcome == "interrupted" else None,
        }
        return kind(**{**common, **values})

    # ------------------------------------------------------------------------------------------------ checkpoints

    def save(self, directory: str | Path | None = None, *, keep: int | None = None) -> Path | None:
        """Writes a checkpoint; every process calls it.

        Args:
            directory: folder of checkpoints, by default that of the run; without one, nothing is written.
            keep: number of checkpoints to keep there, by default that of ``config``.

        Returns:
            The folder of the new checkpoint.
        """
        if directory is None:
            if self.folder is None:
                return None
            directory = self.folder.checkpoints
            self.metrics.sync()
            self._saved_step = self.step
        if not self._prepared:
            self._prepare(None)
        # weights and config.json
        weights: Any = self.model
        if self._save_weights is not None:
            weights = self._save_weights()
        elif self.config.fsdp:
            weights = sharding.full_weights(self.model)
        config = self._model_config() if callable(self._model_config) else self._model_config
        if config is None and isinstance(self.model, PretrainedMixin):
            config = self.model.config
        return save_checkpoint(
            directory,
            self.step,
            model=weights,
            config=config,
            trainer_state={
                "trainer": self.trainer,
                "architecture": self._architecture,
                "identity": self._full_identity(),
                "optimizer": self._optimizer_state(),
                "schedule": None if self.schedule is None else self.schedule.state_dict(),
                "guard": self.guard.state_dict(),
                "validation": [self.first_validation, self.last_validation, self._validation_is_due],
                "state": {name: part.state_dict() for name, part in self._state.items()},
            },
            # state of a single process is stored next to its random states
            rng={**capture_rng(), "state": {name: part.state_dict() for name, part in self._rank_state.items()}},
            tokenizer=self._tokenizer,
            assets=self._assets,
            keep=keep or self.config.keep_checkpoints,
        )

    def load(self, directory: str | Path) -> None:
        """Loads the newest checkpoint in a folder, before the first ``run``.

        Raises:
            FileNotFoundError: there is none.
            CheckpointError: see ``run``.
        """
        if self._prepared:
            raise RuntimeError("load must come before training begins")
        self._prepare(load_checkpoint(directory))

    def _full_identity(self) -> dict[str, Any]:
        return {"seed": self.config.seed, "fsdp": self.config.fsdp, **self._identity()}

    def _optimizer_state(self) -> Any:
        if self.optimizer is None:
            return None
        if self.config.fsdp:
            return sharding.full_optimizer_state(self.objective, self.optimizer)
        return self.optimizer.state_dict()

    def _prepare(self, checkpoint: Checkpoint | None) -> None:
        """Loads weights and states, shards, makes the optimizer; a checkpoint is rejected before anything changes."""
        if checkpoint is not None:
            if self._upgrade is not None and "identity" not in checkpoint.trainer_state:
                checkpoint = replace(checkpoint, trainer_state=dict(self._upgrade(checkpoint)))
            self._check_resumable(checkpoint)
            self._restore(checkpoint)
        make_replicas_equal(nn.ModuleList([self.model, self.objective]), self.device)
        if self.config.fsdp:
            sharding.shard(self.objective, self._blocks(), self.device)
        if self._make_optimizer is not None:
            self.use_optimizer(*self._make_optimizer())
        if checkpoint is None:
            seed_everything((self.config.seed + rank()) % 2**32)
        else:
            restore_rng(checkpoint.rng)
        self._prepared = True

    def _check_resumable(self, checkpoint: Checkpoint) -> None:
        """Raises ``CheckpointError`` unless this run can resume from ``checkpoint``."""
        state, where = checkpoint.trainer_state, checkpoint.path
        written_by = state.get("trainer")
        if written_by != self.trainer:
            raise CheckpointError(f"{where} was not written by {self.trainer}, got {written_by!r}")
        if not {"architecture", "identity", "state"} <= set(state):
            raise CheckpointError(f"{where} was written by an earlier version; only its weights can be used")
        if isinstance(self.model, PretrainedMixin) and checkpoint.config:
            check_config(type(self.model), checkpoint.config, where / "config.json")
        for difference, current, stored in (
            ("is of another architecture", self._architecture, state["architecture"]),
            ("is of another run", self._full_identity(), state["identity"]),
        ):
            changed = [
                f"{name} is {value}, but was {stored.get(name)}"
                for name, value in plain(current).items()
                if stored.get(name) != value
            ]
            if changed:
                raise CheckpointError(f"{where} {difference}: {', '.join(changed)}; train into another folder")
        for parts, states in self._parts(checkpoint):
            if set(parts) != set(states):
                raise CheckpointError(f"{where} has the states {sorted(states)}, but this run {sorted(parts)}")
            for name, part in parts.items():
                if hasattr(part, "check_state"):
                    part.check_state(states[name])

    def _restore(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.trainer_state
        for parts, states in self._parts(checkpoint):
            for name, part in parts.items():
                part.load_state_dict(states[name])
        if self._load_weights is not None:
            self._load_weights(checkpoint)
        else:
            load_weights(self.model, checkpoint.model_state or {}, where=str(checkpoint.path))
        self.guard.load_state_dict(state["guard"])
        self.first_validation = state["validation"][0]
        self.last_validation = state["validation"][1]
        self._validation_is_due = True in state["validation"][2:]
        if state["optimizer"] is not None:
            self._stored_optimizer = state["optimizer"], state["schedule"]
        self.step = checkpoint.step
        self._saved_step = checkpoint.step

    def _parts(self, checkpoint: Checkpoint) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Objects with a state, and their states in ``checkpoint``."""
        return [(self._state, checkpoint.trainer_state["state"]), (self._rank_state, checkpoint.rng.get("state", {}))]

    # ----------------------------------------------------------------------------------------- start and end

    def _finish_trackers(self) -> None:
        for tracker in self.accelerator.trackers:
            try:
                tracker.finish()
            except Exception as error:  # the run is complete and saved
                warnings.warn(f"tracker {tracker.name} raised {type(error).__name__}: {error}", stacklevel=2)

    def _open_metrics(self, stack: contextlib.ExitStack) -> None:
        """Opens log, bar and trackers; puts the objective in training mode until ``stack`` closes."""
        for module in self.objective.modules():
            stack.callback(setattr, module, "training", module.training)
        self.objective.train()
        trackers = list(self._trackers)
        if self._tracker_names:
            fields = asdict(self.config).items()
            kept = {name: value for name, value in fields if isinstance(value, bool | int | float | str)}
            self.accelerator.init_trackers(self.packages[0] if self.packages else self.trainer, config=kept)
            stack.callback(self._finish_trackers)
            trackers.append(self.accelerator)
        is_main = rank() == 0
        self.progress = stack.enter_context(
            progress_bar(self.max_steps, initial=self.step, description="train", is_main=is_main)
        )
        self.metrics = stack.enter_context(
            MetricsLog(
                None if self.folder is None else self.folder.metrics_path,
                resume_step=self.step or -1,
                is_main=is_main,
                trackers=trackers,
                progress=self.progress,
                shown=self._shown,
            )
        )


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def adamw(
    model: nn.Module, settings: CommonSettings, *, parameters: Iterable[nn.Parameter] | None = None
) -> tuple[torch.optim.AdamW, LearningRateSchedule]:
    """AdamW (arXiv 1711.05101) and its schedule: warmup, then a cosine.

    Args:
        model: model whose trainable parameters are optimized.
        settings: learning rate, decay and schedule.
        parameters: subset of the model's parameters; None for all.
    """
    optimizer = torch.optim.AdamW(
        optimizer_groups(model, weight_decay=settings.weight_decay, parameters=parameters),
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
    )
    schedule = LearningRateSchedule(
        optimizer,
        warmup_steps=settings.warmup_steps,
        total_steps=settings.max_steps,
        final_scale=settings.final_learning_rate,
    )
    return optimizer, schedule


def draw_curves(run: RunDirectory, names: Sequence[str] | None = None) -> Path | None:
    """Plots those ``names`` (by default all) that are numbers in two rows or more to ``curves.png``, on rank 0.

    Returns None, on every process, if there is nothing to draw or matplotlib is not installed.
    """

    def draw() -> Path | None:
        if not run.metrics_path.is_file():
            return None
        series = read_series(run.metrics_path)
        present = [name for name in (series if names is None else names) if len(series.get(name, ([],))[0]) > 1]
        try:
            return plot_curves(run.metrics_path, run.curves_path, names=present) if present else None
        except ImportError:
            return None
        except OSError as error:  # the run is complete and saved
            warnings.warn(f"{run.curves_path} could not be drawn: {error}", stacklevel=2)
            return None

    drawn: Path | None = on_main_process(draw)
    return drawn
