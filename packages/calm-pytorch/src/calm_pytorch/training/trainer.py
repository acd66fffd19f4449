"""Training of the cross-attentions of a composition, resumed bit for bit.

Each update takes ``gradient_accumulation`` micro-batches on every process and divides their summed loss by the number
of tokens they count TOGETHER, so that an update is the same however its examples are sharded. A checkpoint holds the
learned part only, with optimizer, schedule and random states; the frozen models are not written.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from calm_pytorch.model.calm import CALM
from calm_pytorch.model.inputs import IGNORED, labels_of
from calm_pytorch.training.data import Batches
from calm_pytorch.training.state_cache import StateCache
from lm_core.causal_lm import eval_mode
from lm_core.checks import check_positive, either, typed
from lm_core.data.epochs import UpdateOrder
from lm_core.distributed import all_reduce_sum, loss_normalizer, rank, world_size
from lm_core.training.accelerator import autocast
from lm_core.training.config import CommonSettings
from lm_core.training.optimization import LearningRateSchedule, optimizer_groups
from lm_core.training.session import TrainingResult, TrainingSession


class SummedLoss(nn.Module):
    """The composition with its loss over one micro-batch, as DistributedDataParallel needs it: one forward."""

    def __init__(self, calm: CALM, precision: Any) -> None:
        super().__init__()
        self.calm = calm
        self.precision = precision

    def forward(self, batch: dict[str, Any], normalizer: Tensor) -> Tensor:
        """Summed cross-entropy over ``normalizer``."""
        seq: Tensor = batch["seq"]
        with autocast(self.precision, seq.device):
            total: Tensor = self.calm(**batch, reduction="sum")
        # a batch without a label to count has no loss, not 0 / 0
        return total / normalizer.to(total.dtype).clamp(min=torch.finfo(total.dtype).tiny)

    def count(self, batch: Mapping[str, Any]) -> int:
        """Tokens that the loss of a batch counts."""
        return int((labels_of(batch["seq"], batch.get("mask"), self.calm.pad_id) != IGNORED).sum())


class FineTuner:
    """Trains the learned part of a CALM.

    Args:
        calm: trained in place, on its device.
        learning_rate: peak learning rate.
        weight_decay: weight decay of matrices; norms, gains and biases do not decay.
        batch_size: examples in a micro-batch on each process.
        max_steps: optimizer updates of the whole run.
        num_train_steps: the original's name of ``max_steps``.
        dataset: with ``len`` and ``dataset[i]``: dicts of arguments of ``CALM.forward``, or tuples of them.
        data_kwarg_names: names of the entries of a tuple.
        accelerate_kwargs: "log_with": names of trackers.
        checkpoint_every: updates between checkpoints; there is always one at the end.
        checkpoint_dir: folder of the run (``lm_core.training.run_directory.RunDirectory``); by default "./checkpoints".
        checkpoint_path: the original's name of ``checkpoint_dir``.
        scheduler: a torch scheduler class; None keeps the peak after the warmup.
        scheduler_kwargs: arguments of the scheduler.
        warmup: fraction of the updates over which the learning rate rises.
        warmup_steps: the same as a number of updates, as the original has it; 1000 if neither is given.
        max_grad_norm: bound of the gradients' global norm; None only measures it.
        gradient_accumulation: micro-batches of an update; by default 1.
        grad_accum_steps: the original's name of ``gradient_accumulation``.
        valid_dataset: held-out examples.
        validate_every: updates between validations; there is one before and one after training too.
        collate_fn: makes a batch of examples; torch's default stacks tensors.
        cache_augment_states: reads each example's static prompt once and keeps its states in memory.
        gradient_checkpointing: the anchor's blocks compute their activations again in the backward pass.
        precision: "auto" is bf16 on a GPU that has it and fp32 elsewhere.
        seed: seed of the order of examples and of dropout.
        resume: "auto" resumes if the folder has a checkpoint, True demands one, False demands a folder without a run.
        keep_checkpoints: newest checkpoints that are kept; None for all.
        trackers: names of trackers that ``accelerate`` knows, and objects with ``log(values, step=...)``.

    Attributes:
        session: the run (``lm_core.training.session.TrainingSession``).
        optimizer: AdamW on the learned part.
        order: which examples make up which update.
        cache: states of the prompts seen so far; None without ``cache_augment_states``.

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
        # one value for each argument that has two names
        steps = either(None, max_steps=max_steps, num_train_steps=num_train_steps)
        if steps is None:
            raise ValueError("max_steps (or num_train_steps) must be given, got None")
        accumulation = either(None, gradient_accumulation=gradient_accumulation, grad_accum_steps=grad_accum_steps)
        accumulation = 1 if accumulation is None else accumulation
        for name, value in (("num_train_steps", steps), ("batch_size", batch_size), ("grad_accum_steps", accumulation)):
            check_positive(value, name)
        if warmup is not None and warmup_steps is not None:
            raise ValueError(f"warmup and warmup_steps are one argument, got {warmup} and {warmup_steps}")
        # check what neither the settings nor the session check
        for name, data in (("dataset", dataset), ("valid_dataset", valid_dataset)):
            if data is not None or name == "dataset":
                _check_dataset(data, name)
        unknown = sorted(set(accelerate_kwargs or {}) - {"log_with"})
        if unknown:
            raise ValueError(f"accelerate_kwargs may hold log_with, got {unknown}: the trainer sets all others")
        # the session: folder, seeds, trackers
        device = next(calm.trainable_parameters()).device
        settings = CommonSettings(
            max_steps=steps,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            warmup=0.0 if warmup is None else warmup,
            validate_every=validate_every,
            max_grad_norm=max_grad_norm,
            precision=precision,
            seed=seed,
            device=str(device),
            checkpoint_every=checkpoint_every,
            keep_checkpoints=keep_checkpoints,
        )
        if warmup is not None:
            warmup_steps = settings.warmup_steps
        elif warmup_steps is None:
            warmup_steps = 1000
        log_with = (accelerate_kwargs or {}).get("log_with") or []
        self.checkpoint_path = Path(
            either(None, checkpoint_dir=checkpoint_dir, checkpoint_path=checkpoint_path) or "./checkpoints"
        )
        self.session = TrainingSession(
            type(self).__name__,
            config=settings,
            checkpoint_dir=self.checkpoint_path,
            resume=resume,
            trackers=[*([log_with] if isinstance(log_with, str) else log_with), *trackers],
            packages=("calm-pytorch", "x-transformers"),
        )
        self.calm = calm
        self.model = calm
        self.device = device
        self.dataset = dataset
        self.valid_dataset = valid_dataset
        self.batch_size = batch_size
        self.gradient_checkpointing = gradient_checkpointing
        self.cache = StateCache(calm) if cache_augment_states else None
        self.batches = Batches(data_kwarg_names, collate_fn, device)
        self.order = UpdateOrder(
            len(dataset),
            batch_size=batch_size * accumulation * world_size(),
            micro_batches=accumulation,
            last="drop",
            seed=seed,
            rank=rank(),
            world_size=world_size(),
        )
        # what is optimized: the learned part only
        self.objective = SummedLoss(calm, precision)
        self.optimizer = torch.optim.AdamW(
            optimizer_groups(calm, weight_decay=weight_decay, parameters=list(calm.trainable_parameters())),
            lr=learning_rate,
        )
        schedule = LearningRateSchedule(
            self.optimizer,
            kind="constant",
            warmup_steps=warmup_steps,
            scheduler=scheduler,
            scheduler_kwargs=scheduler_kwargs,
        )
        self._forward_kwargs: dict[str, Any] = {}
        self.session.register(
            model=calm.cross_attns,
            objective=self.objective,
            optimizer=lambda: (self.optimizer, schedule),
            architecture=calm.wiring,
            identity=self.order.fingerprint(),
            model_config={"wiring": calm.wiring},
            validate=None if valid_dataset is None else self._validate,
            record={"warmup_steps": warmup_steps, "wiring": calm.wiring},
            curves=("loss", "validation_loss", "learning_rate", "grad_norm"),
            shown=("loss", "validation_loss"),
        )

    @property
    def step(self) -> int:
        """Optimizer updates done."""
        return self.session.step

    @property
    def is_main(self) -> bool:
        """True in the first process."""
        return rank() == 0

    def print(self, message: Any) -> None:
        """Prints in the first process only."""
        if self.is_main:
            print(message)

    def __call__(self, forward_kwargs: Mapping[str, Any] | None = None) -> None:
        """``train``, as the original has it."""
        self.train(forward_kwargs)

    def train(self, forward_kwargs: Mapping[str, Any] | None = None) -> TrainingResult:
        """Trains up to ``max_steps``, or until Ctrl-C; a checkpoint is written in any case.

        Args:
            forward_kwargs: further arguments of every ``CALM.forward``.

        Raises:
            CheckpointError: the folder's checkpoint is of another wiring, other data or another number of processes.
            FileNotFoundError, FileExistsError: the folder does not suit ``resume``.
            RuntimeError: another run is using the folder, or the loss was not finite too often in a row.
        """
        self._forward_kwargs = dict(forward_kwargs or {})
        kept = self.calm.gradient_checkpointing
        self.calm.gradient_checkpointing = self.gradient_checkpointing
        try:
            with self.session.run() as session:
                for step in session.steps():
                    session.log(self._update(session, step), epoch=step // self.order.updates_per_epoch)
        finally:
            self.calm.gradient_checkpointing = kept
        return session.result(TrainingResult)

    def _update(self, session: TrainingSession, step: int) -> dict[str, float]:
        started = time.monotonic()
        batches = [self.batches.of(self.dataset, part, self.cache) for part in self.order.micro_batches(step)]
        labels, normalizer = loss_normalizer(sum(self.objective.count(batch) for batch in batches), self.device)
        for batch in session.micro_batches(batches):
            session.backward(session.module({**batch, **self._forward_kwargs}, normalizer))
        values = session.optimizer_step()
        return {**values, "tokens_per_second": round(labels / max(time.monotonic() - started, 1e-9))}

    @torch.no_grad()
    def validate(self, forward_kwargs: Mapping[str, Any] | None = None) -> float:
        """Mean loss a token over ``valid_dataset``; every process calls it and gets the result of all."""
        unit = torch.ones((), device=self.device)
        totals = torch.zeros(2, device=self.device)
        with eval_mode(self.calm):
            count = len(self.valid_dataset)
            for start in range(rank() * self.batch_size, count, self.batch_size * world_size()):
                batch = self.batches.of(self.valid_dataset, range(start, min(start + self.batch_size, count)))
                totals[0] += self.objective({**batch, **dict(forward_kwargs or {})}, unit)
                totals[1] += self.objective.count(batch)
        total, labels = all_reduce_sum(totals).tolist()
        return total / max(labels, 1.0)

    def _validate(self) -> dict[str, float]:
        return {"validation_loss": self.validate(self._forward_kwargs)}

    def save(self, filename: str, overwrite: bool = True) -> Path:
        """Writes all that training depends on into the folder ``checkpoint_path / filename``; all processes call it.

        Raises:
            FileExistsError: there is one and ``overwrite`` is False.
        """
        target = self.checkpoint_path / filename
        if target.exists() and not overwrite:
            raise FileExistsError(f"filename must be new unless overwrite=True, got {target}")
        saved = self.session.save(target, keep=1)
        assert saved is not None
        return saved

    def load(self, filename: str) -> None:
        """Resumes from what ``save`` wrote, before the first call.

        Raises:
            FileNotFoundError: there is nothing of this name.
            CheckpointError: it is of another wiring, other data or another number of processes.
        """
        self.session.load(self.checkpoint_path / filename)


def _check_dataset(data: Any, name: str) -> None:
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise TypeError(f"{name} must have a length and items, got {type(data).__name__}")
    if len(data) == 0:
        raise ValueError(f"{name} must hold at least one example, got none")
