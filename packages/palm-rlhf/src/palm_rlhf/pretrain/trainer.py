"""Pretraining of a language model on packed documents: one loop over ``accelerate``.

Each update takes ``gradient_accumulation`` micro-batches on every process and divides their summed loss by the number
of labels they hold TOGETHER, so that an update is the same however its rows are spread over micro-batches and
processes.

A checkpoint holds all that the next update depends on: a run that was killed and resumed ends with the weights, bit
for bit, of one that was not (with equal settings, device, torch and number of processes). At step N come first the
row of metrics, then a validation, then the checkpoint; a resumed run drops rows after its checkpoint, so
``metrics.jsonl`` tells of every update once.
"""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from lm_core.checkpoints.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from lm_core.checkpoints.weights import load_weights
from lm_core.checks import check_ids, typed
from lm_core.data.corpora import Corpus
from lm_core.data.packing import PackedBatches, ValidationBatches, bits_per_byte
from lm_core.distributed import all_reduce_sum, loss_normalizer, rank, world_size
from lm_core.rng import restore_rng, seed_everything
from lm_core.tokenizers import ByteTokenizer, Tokenizer
from lm_core.training import fsdp as sharding
from lm_core.training.accelerator import InterruptHandler, pick_device, pick_precision
from lm_core.training.launching import check_compilable, start_accelerator
from lm_core.training.metrics import MetricsLog
from lm_core.training.optimization import NonFiniteGuard, finish_update
from lm_core.training.run_directory import RunDirectory
from lm_core.training.session import Outcome, Stopping, adamw, draw_curves, open_metrics, own_settings, split_trackers
from palm_rlhf.model.palm import PaLM
from palm_rlhf.pretrain.config import TrainingSettings
from palm_rlhf.pretrain.evaluation import score
from palm_rlhf.pretrain.loss import NextTokenLoss
from palm_rlhf.pretrain.training_checks import check_same_run, check_trainable

CURVES = ("train_bits_per_byte", "validation_bits_per_byte", "learning_rate", "grad_norm")


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended.

    Attributes:
        outcome: "finished", "interrupted" (Ctrl-C or SIGTERM) or "out of time" (``max_seconds``).
        first_step: updates that were done when this call began.
        step: updates done.
        first_bits_per_byte: of held-out text, before training.
        last_bits_per_byte: of held-out text, at the last validation.
        seconds: that this call trained; None where nothing was left to do.
        checkpoints: folder of the checkpoints; the newest one is of ``step``.
        curves: picture of the metrics; None if matplotlib is not installed.
    """

    outcome: Outcome
    first_step: int
    step: int
    first_bits_per_byte: float
    last_bits_per_byte: float
    seconds: float | None
    checkpoints: Path
    curves: Path | None


class PretrainTrainer:
    """Trains a PaLM on a corpus, resumably.

    Args:
        model: trained in place; moved to the device.
        corpus: documents in the ids of ``tokenizer``; see ``lm_core.data.corpora``.
        checkpoint_dir: folder of the run; see ``lm_core.training.accelerator.RunDirectory``.
        tokenizer: says which ids end and pad documents, and travels with the checkpoints; bytes by default.
        settings: everything else.
        resume: "auto" goes on if the folder has a checkpoint, True demands one, False demands a folder without a run.
        trackers: names of trackers that ``accelerate`` knows ("tensorboard", "wandb"), and objects with
            ``log(values, step=...)``.

    Raises:
        ValueError: the model is not causal, has LoRA scopes, or fewer tokens than the tokenizer; the device or the
            precision is not to be had; a side of the corpus is too small; a tracker is unknown; see also
            ``lm_core.training.launching``.
        TypeError: an argument is of another type.
    """

    @typed
    def __init__(
        self,
        *,
        model: PaLM,
        corpus: Corpus,
        checkpoint_dir: str | Path,
        tokenizer: Any = None,
        settings: TrainingSettings | None = None,
        resume: bool | Literal["auto"] = "auto",
        trackers: Sequence[Any] = (),
    ) -> None:
        self.settings = TrainingSettings() if settings is None else settings
        self.tokenizer: Tokenizer = ByteTokenizer() if tokenizer is None else tokenizer
        self.corpus, self.checkpoint_dir, self.resume = corpus, Path(checkpoint_dir), resume
        check_trainable(model, self.tokenizer)
        self.device = pick_device(self.settings.device)
        pick_precision(self.settings.precision, self.device)  # refuses what the device cannot do
        self.trackers = list(trackers)
        names, _ = split_trackers(trackers)
        self.accelerator = start_accelerator(self.device, tracker_names=names, folder=self.checkpoint_dir)
        if self.settings.compile:
            check_compilable(self.device)
        if self.settings.fsdp:
            sharding.check_shardable(self.device)
        packing: dict[str, Any] = {
            "sequence_length": self.settings.sequence_length,
            "batch_size": self.settings.batch_size,
            "eos_id": self.tokenizer.eos_id,
            "pad_id": self.tokenizer.pad_id or 0,
            "rank": rank(),
            "world_size": world_size(),
        }
        self.batches = PackedBatches(documents=corpus.train, seed=self.settings.seed, **packing)
        self.validation_batches = ValidationBatches(
            documents=corpus.validation, max_tokens=self.settings.validation_tokens, **packing
        )
        self.model = model.to(self.device)
        self.objective = NextTokenLoss(model, precision=self.settings.precision)
        self.guard = NonFiniteGuard()
        self.step = 0
        self.first_bits_per_byte = self.last_bits_per_byte = float("nan")
        self._parallel: Any = None  # the objective as it is called in training, once `_prepare` has made it

    def train(self) -> TrainingResult:
        """Trains up to ``max_steps``, or until Ctrl-C or ``max_seconds``; a checkpoint is written in any case.

        Seeds python's, numpy's and torch's generators, or puts them where the checkpoint had them.

        Raises:
            RuntimeError: another run is using the folder, or the loss was not finite too often in a row.
            CheckpointError: the checkpoint is of another model or another number of processes, or damaged.
            ValueError: the checkpoint is of other data, another seed or another sequence length.
            FileNotFoundError, FileExistsError: the folder does not suit ``resume``.
            OSError: a checkpoint could not be written; earlier ones are untouched.
        """
        settings = self.settings
        outcome: Outcome = "finished"
        with self._run_directory() as run, contextlib.ExitStack() as stack:
            if self._parallel is None:
                self._prepare(run)
            first_step = self.step
            log = self._metrics(run, stack)
            stopping = Stopping(stack.enter_context(InterruptHandler()), settings.max_seconds)
            if self.step == 0:
                self.first_bits_per_byte = self._validate(log)
            while self.step < settings.max_steps and outcome == "finished":
                log.log(self.step + 1, self._update())
                self.step += 1
                log.progress.update()
                last = self.step == settings.max_steps
                outcome = stopping.outcome(last=last)
                if self.step % settings.validate_every == 0 or last or outcome == "out of time":
                    self._validate(log)
                if self.step % settings.checkpoint_every == 0 or last or outcome != "finished":
                    log.sync()
                    self._save(run)
            curves = draw_curves(run, CURVES)
            return TrainingResult(
                outcome=outcome,
                first_step=first_step,
                step=self.step,
                first_bits_per_byte=self.first_bits_per_byte,
                last_bits_per_byte=self.last_bits_per_byte,
                seconds=None if self.step == first_step else round(stopping.seconds, 1),
                checkpoints=run.checkpoints,
                curves=curves,
            )

    def _update(self) -> dict[str, float]:
        """One optimizer update; its metrics."""
        started = time.monotonic()
        micro_batches = [next(self.batches) for _ in range(self.settings.gradient_accumulation)]
        for batch in micro_batches:
            check_ids(batch.ids, self.model.num_tokens, "corpus")
        labels, normalizer = loss_normalizer(sum(batch.num_labels for batch in micro_batches), self.device)
        loss = torch.zeros((), device=self.device)
        for number, batch in enumerate(micro_batches, start=1):
            rows = batch.to(self.device)
            with self._synchronising(number == len(micro_batches)):
                part = self._parallel(rows.ids, rows.labels, rows.document_ids, normalizer)
                self.accelerator.backward(part)
            loss += part.detach() / world_size()
        loss = all_reduce_sum(loss)
        finished = finish_update(
            self.step + 1,
            loss,
            self.objective.parameters(),
            optimizer=self.optimizer,
            schedule=self.schedule,
            guard=self.guard,
            max_grad_norm=self.settings.max_grad_norm,
        )
        return {
            "loss": float(loss),
            "train_bits_per_byte": bits_per_byte(float(loss) * labels, max(1, round(labels)), self.corpus.train),
            **finished,
            "tokens_per_second": round(labels / (time.monotonic() - started)),
            "epoch": self.batches.epoch,
        }

    def _synchronising(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Processes exchange gradients in the last micro-batch of an update only."""
        if self.settings.fsdp:
            self.objective.set_requires_gradient_sync(last)  # type: ignore[operator]
        return contextlib.nullcontext() if last else self.accelerator.no_sync(self._parallel)

    def _validate(self, log: MetricsLog) -> float:
        held_out = score(self.objective, self.validation_batches)
        self.last_bits_per_byte = held_out.bits_per_byte
        log.log(self.step, validation_bits_per_byte=held_out.bits_per_byte, validation_loss=held_out.loss)
        return held_out.bits_per_byte

    def _run_directory(self) -> RunDirectory:
        return RunDirectory(
            self.checkpoint_dir,
            resume=self.resume if self._parallel is None else "auto",
            seed=self.settings.seed,
            device=self.device,
            settings={**asdict(self.settings), "model": self.model.config["arguments"]},
            packages=("palm-rlhf", "accelerate"),
        )

    def _metrics(self, run: RunDirectory, stack: contextlib.ExitStack) -> MetricsLog:
        """The open log, closed with ``stack``, which restores the model's mode as well."""
        if self.settings.fsdp:
            stack.enter_context(sharding.quiet())
        metrics = open_metrics(
            run,
            objective=self.objective,
            accelerator=self.accelerator,
            trackers=self.trackers,
            project="palm-rlhf",
            settings=asdict(self.settings),
            step=self.step,
            max_steps=self.settings.max_steps,
        )
        return stack.enter_context(metrics)

    def _prepare(self, run: RunDirectory) -> None:
        """Spreads the model over processes and makes the optimizer, anew or as the newest checkpoint has them."""
        settings = self.settings
        checkpoint = self._read(run) if run.resumes else None
        if settings.fsdp:
            sharding.shard(self.objective, self.model.blocks())
        # only training runs often enough to be worth compiling for: validation stays as it is
        self._parallel = torch.compile(self.objective) if settings.compile else self.objective
        if not settings.fsdp:
            self._parallel = self.accelerator.prepare_model(self._parallel, device_placement=False)
        self.optimizer, self.schedule = adamw(self.model, settings)
        if checkpoint is None:
            seed_everything((settings.seed + rank()) % 2**32)
        else:
            self._restore(checkpoint)

    def _read(self, run: RunDirectory) -> Checkpoint:
        """The newest checkpoint, its weights and data cursor put in place; refused before anything is changed."""
        checkpoint = load_checkpoint(run.checkpoints)
        check_same_run(checkpoint, self.model, trainer=type(self).__name__, fsdp=self.settings.fsdp)
        self.batches.load_state_dict(checkpoint.trainer_state["batches"])
        load_weights(self.model, checkpoint.model_state or {}, where=str(checkpoint.path))
        return checkpoint

    def _restore(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.trainer_state
        with own_settings(self.optimizer):
            if self.settings.fsdp:
                sharding.load_full_optimizer_state(self.objective, self.optimizer, state["optimizer"])
            else:
                self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.guard.load_state_dict(state["guard"])
        self.first_bits_per_byte, self.last_bits_per_byte = state["bits_per_byte"]
        self.step = checkpoint.step
        restore_rng(checkpoint.rng)

    def _save(self, run: RunDirectory) -> None:
        weights: Any = self.model
        optimizer_state = self.optimizer.state_dict()
        if self.settings.fsdp:
            weights = sharding.full_weights(self.model)
            optimizer_state = sharding.full_optimizer_state(self.objective, self.optimizer)
        save_checkpoint(
            run.checkpoints,
            self.step,
            model=weights,
            config=self.model.config,
            trainer_state={
                "trainer": type(self).__name__,
                "fsdp": self.settings.fsdp,
                "optimizer": optimizer_state,
                "schedule": self.schedule.state_dict(),
                "guard": self.guard.state_dict(),
                "batches": self.batches.state_dict(),
                "bits_per_byte": (self.first_bits_per_byte, self.last_bits_per_byte),
            },
            tokenizer=self.tokenizer,
            keep=self.settings.keep_checkpoints,
        )
