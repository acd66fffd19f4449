"""Training of the cross-attentions of a composition, resumed bit for bit.

Each update takes ``gradient_accumulation`` micro-batches on every process and divides their summed loss by the number
of tokens they count TOGETHER, so that an update is the same however its examples are sharded. A checkpoint holds the
learned part only, with optimizer, schedule and random states; the frozen models are not written.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from calm_pytorch.model.calm import CALM
from calm_pytorch.model.inputs import IGNORED, labels_of
from calm_pytorch.training.data import Batches, fingerprint_of
from calm_pytorch.training.evaluation import sums_over
from calm_pytorch.training.settings import FineTunerSettings
from calm_pytorch.training.state_cache import StateCache
from lm_core.causal_lm import eval_mode
from lm_core.checks import either, typed
from lm_core.data.epochs import UpdateOrder
from lm_core.distributed import loss_normalizer, rank, world_size
from lm_core.training.accelerator import autocast
from lm_core.training.blocks import blocks_of
from lm_core.training.optimization import LearningRateSchedule, optimizer_groups
from lm_core.training.precision import float32_masters
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
        calm: trained in place, on its device; with ``fsdp``, which shards the frozen models too, on the settings' one.
        dataset: with ``len`` and ``dataset[i]``: dicts of arguments of ``CALM.forward``, or tuples of them.
        valid_dataset: held-out examples.
        data_kwarg_names: names of the entries of a tuple.
        collate_fn: makes a batch of examples; torch's default stacks tensors.
        accelerate_kwargs: "log_with": names of trackers.
        checkpoint_dir: folder of the run (``lm_core.training.run_directory.RunDirectory``); by default "./checkpoints".
        checkpoint_path: the original's name of ``checkpoint_dir``.
        resume: "auto" resumes if the folder has a checkpoint, True demands one, False demands a folder without a run.
        trackers: names of trackers that ``accelerate`` knows, and objects with ``log(values, step=...)``.
        scheduler: a torch scheduler class, in place of ``final_learning_rate``.
        scheduler_kwargs: arguments of the scheduler.
        cache_augment_states: reads each example's static prompt once and keeps its states in memory.
        config: settings of the run.
        settings: fields of ``FineTunerSettings``, instead of ``config``; the original's ``num_train_steps``,
            ``grad_accum_steps`` and ``warmup_steps`` (``warmup`` as a number of updates) are accepted too.

    Attributes:
        session: the run (``lm_core.training.session.TrainingSession``).
        settings: the settings.
        optimizer: AdamW on the learned part; with ``fsdp``, None before the first run.
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
        dataset: Any,
        valid_dataset: Any = None,
        data_kwarg_names: Sequence[str] = ("seq", "mask", "prompt"),
        collate_fn: Callable[[list[Any]], Any] | None = None,
        accelerate_kwargs: dict[str, Any] | None = None,
        checkpoint_dir: str | Path | None = None,
        checkpoint_path: str | Path | None = None,
        resume: bool | Literal["auto"] = "auto",
        trackers: Sequence[Any] = (),
        scheduler: type[LRScheduler] | None = None,
        scheduler_kwargs: dict[str, Any] | None = None,
        cache_augment_states: bool = False,
        config: FineTunerSettings | None = None,
        **settings: Any,
    ) -> None:
        if config is not None and settings:
            raise ValueError(f"with config, settings must be passed in it, got {sorted(settings)} outside")
        warmup_steps: int | None = settings.pop("warmup_steps", None)
        if warmup_steps is not None and settings.get("warmup") is not None:
            raise ValueError(f"warmup and warmup_steps are one argument, got {settings['warmup']} and {warmup_steps}")
        config = FineTunerSettings.of(settings) if config is None else config
        if not config.fsdp:  # which moves the models to config's device block by block
            config = replace(config, device=str(next(calm.trainable_parameters()).device))
        elif cache_augment_states:
            raise ValueError("cache_augment_states must be false with fsdp, which shards the augments, got true")
        # check what neither the settings nor the session check
        for name, data in (("dataset", dataset), ("valid_dataset", valid_dataset)):
            if data is not None or name == "dataset":
                _check_dataset(data, name)
        unknown = sorted(set(accelerate_kwargs or {}) - {"log_with"})
        if unknown:
            raise ValueError(f"accelerate_kwargs may hold log_with, got {unknown}: the trainer sets all others")
        # the session: folder, seeds, trackers
        log_with = (accelerate_kwargs or {}).get("log_with") or []
        self.checkpoint_path = Path(
            either(None, checkpoint_dir=checkpoint_dir, checkpoint_path=checkpoint_path) or "./checkpoints"
        ).expanduser()
        self.session = TrainingSession(
            type(self).__name__,
            config=config,
            checkpoint_dir=self.checkpoint_path,
            resume=resume,
            trackers=[*([log_with] if isinstance(log_with, str) else log_with), *trackers],
            packages=("calm-pytorch", "x-transformers"),
        )
        self.settings = config
        self.calm = calm
        self.model = calm
        self.device = self.session.device
        self.dataset = dataset
        self.valid_dataset = valid_dataset
        self.cache = StateCache(calm, len(dataset)) if cache_augment_states else None
        self.batches = Batches(data_kwarg_names, collate_fn, self.device)
        self.order = UpdateOrder(
            len(dataset),
            batch_size=config.batch_size * config.gradient_accumulation * world_size(),
            micro_batches=config.gradient_accumulation,
            last="drop",
            seed=config.seed,
            rank=rank(),
            world_size=world_size(),
        )
        # what is optimized: the learned part only, in float32
        if float32_masters(calm.cross_attns).promoted:
            self.print("the cross-attentions are trained in float32")
        self.objective = SummedLoss(calm, config.precision)
        if warmup_steps is None:
            warmup_steps = config.warmup_steps

        self.optimizer: Any = None

        def make_optimizer() -> tuple[torch.optim.Optimizer, LearningRateSchedule]:
            self.optimizer = torch.optim.AdamW(
                optimizer_groups(calm, weight_decay=config.weight_decay, parameters=list(calm.trainable_parameters())),
                lr=config.learning_rate,
                betas=(config.beta1, config.beta2),
            )
            schedule = LearningRateSchedule(
                self.optimizer,
                kind="constant" if config.final_learning_rate == 1 else "cosine",
                warmup_steps=warmup_steps,
                total_steps=config.max_steps,
                final_scale=config.final_learning_rate,
                scheduler=scheduler,
                scheduler_kwargs=scheduler_kwargs,
            )
            return self.optimizer, schedule

        made = None if config.fsdp else make_optimizer()
        self._forward_kwargs: dict[str, Any] = {}
        self.session.register(
            model=calm.cross_attns,
            objective=self.objective,
            optimizer=lambda: made or make_optimizer(),
            # not the connections: their keys and values are computed outside of their forwards
            blocks=lambda: [block for model in (calm.anchor_llm, *calm.augment_llms) for block in blocks_of(model)],
            architecture=calm.wiring,
            identity={
                **self.order.fingerprint(),
                "data": fingerprint_of(dataset),
                "validation_data": None if valid_dataset is None else fingerprint_of(valid_dataset),
            },
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
        self.calm.gradient_checkpointing = self.settings.gradient_checkpointing
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

        def values(batch: dict[str, Any]) -> tuple[Tensor, int]:
            return self.objective({**batch, **dict(forward_kwargs or {})}, unit), self.objective.count(batch)

        # the processes may have different numbers of batches
        with eval_mode(self.calm), self.session.gathered():
            total, labels = sums_over(self.valid_dataset, self.batches, self.settings.batch_size, 2, values)
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
