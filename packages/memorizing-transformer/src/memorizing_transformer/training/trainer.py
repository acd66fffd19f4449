"""Training on documents in order: one loop over ``accelerate``.

Each batch row reads one document after another, a segment an update (or several with gradient accumulation); the XL
window and the memories go on from segment to segment and are emptied where a document ends. An update divides the
summed loss by the labels of ALL processes together, so it does not depend on how rows are spread over them.

A checkpoint holds all that the next update depends on, of each process: memories, XL window, place in the documents,
random states. A run that was killed and resumed ends with the weights, bit for bit, of one that was not (with equal
settings, device, torch and number of processes).
"""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lm_core.checkpoints.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from lm_core.checkpoints.manifest import CheckpointError
from lm_core.checkpoints.pretrained import check_config, check_vocabulary
from lm_core.checkpoints.weights import load_weights
from lm_core.checks import check_ids, typed
from lm_core.data.corpora import Corpus
from lm_core.data.packing import bits_per_byte
from lm_core.distributed import all_reduce_sum, loss_normalizer, rank, world_size
from lm_core.rng import capture_rng, restore_rng, seed_everything
from lm_core.tokenizers import ByteTokenizer, Tokenizer
from lm_core.training.accelerator import (
    InterruptHandler,
    Precision,
    autocast,
    pick_device,
    pick_precision,
    start_accelerator,
)
from lm_core.training.metrics import MetricsLog
from lm_core.training.optimization import NonFiniteGuard, finish_update
from lm_core.training.run_directory import RunDirectory
from lm_core.training.session import (
    Outcome,
    Stopping,
    adamw,
    check_goes_on,
    draw_curves,
    open_metrics,
    own_settings,
    split_trackers,
)
from memorizing_transformer.memory.memory_list import KNNMemoryList
from memorizing_transformer.model.segment import XLMemories
from memorizing_transformer.model.transformer import MemorizingTransformer
from memorizing_transformer.training.config import TrainingSettings
from memorizing_transformer.training.documents import DocumentSegments, DocumentStreams
from memorizing_transformer.training.evaluation import Evaluation, score

CURVES = (
    "train_bits_per_byte",
    "validation_bits_per_byte",
    "validation_bits_per_byte_without_memory",
    "memory_gain_far",
    "learning_rate",
    "grad_norm",
    "memories",
)
# Memory is worth most where a document is long: the gain of tokens with so many before them has a curve of its own.
FAR = 2048
# What may differ when a run goes on.
_FREE = ("attn_dropout", "ff_dropout", "segment_length", "knn_memories_directory")


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended.

    Attributes:
        outcome: "finished", "interrupted" (Ctrl-C or SIGTERM) or "out of time" (``max_seconds``).
        first_step: updates that were done when this call began.
        step: updates done.
        seconds: that this call took.
        first_bits_per_byte: of held-out documents, before training.
        last: of held-out documents, at the last validation of this call; None if there was none.
        without_memory: of the same weights without kNN memories.
        checkpoints: folder of the checkpoints; the newest one is of ``step``.
        curves: picture of the metrics; None if matplotlib is not installed.
    """

    outcome: Outcome
    first_step: int
    step: int
    seconds: float
    first_bits_per_byte: float
    last: Evaluation | None
    without_memory: Evaluation | None
    checkpoints: Path
    curves: Path | None


class SegmentLoss(nn.Module):
    """The model with its loss and what it remembers between segments.

    Args:
        model: the model.
        precision: that it computes in.
    """

    def __init__(self, model: MemorizingTransformer, *, precision: Precision) -> None:
        super().__init__()
        self.model, self.precision = model, precision
        # not arguments of forward: DDP would rebuild them as plain lists
        self.memories: KNNMemoryList | None = None
        self.window: XLMemories | None = None

    def forward(self, ids: Tensor, labels: Tensor, normalizer: Tensor) -> Tensor:
        """Summed loss of a segment over ``normalizer``; memories and window then go on behind it."""
        with autocast(self.precision, ids.device):
            result = self.model(ids, self.memories, self.window, labels, loss_normalizer=normalizer)
        loss, self.window = result if isinstance(result, tuple) else (result, None)
        return loss


class MemoryTrainer:
    """Trains a MemorizingTransformer on documents in order, resumably.

    Args:
        model: trained in place; moved to the device.
        corpus: documents in the ids of ``tokenizer``; see ``lm_core.data.corpora``.
        checkpoint_dir: folder of the run; see ``lm_core.training.run_directory.RunDirectory``.
        tokenizer: says which id ends documents, and travels with the checkpoints; bytes by default.
        settings: everything else.
        resume: "auto" goes on if the folder has a checkpoint, True demands one, False demands a folder without a run.
        trackers: names of trackers that ``accelerate`` knows, and objects with ``log(values, step=...)``.

    Raises:
        ValueError: the model does not clear its memories at the tokenizer's EOS, or has fewer tokens than the
            tokenizer; the device or the precision is not to be had; a side of the corpus is too small.
        TypeError: an argument is of another type.
    """

    @typed
    def __init__(
        self,
        *,
        model: MemorizingTransformer,
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
        eos_id = _check_trainable(model, self.tokenizer)
        self.device = pick_device(self.settings.device)
        pick_precision(self.settings.precision, self.device)  # refuses what the device cannot do
        self.trackers = list(trackers)
        names, _ = split_trackers(trackers)
        self.accelerator = start_accelerator(self.device, tracker_names=names, folder=self.checkpoint_dir)
        reading: dict[str, Any] = {
            "segment_length": self.settings.segment_length,
            "batch_size": self.settings.batch_size,
            "eos_id": eos_id,
            "rank": rank(),
            "world_size": world_size(),
        }
        self.streams = DocumentStreams(documents=corpus.train, seed=self.settings.seed, **reading)
        self.held_out = DocumentSegments(
            documents=corpus.validation, max_documents=self.settings.validation_documents, **reading
        )
        self.model = model.to(self.device)
        self.objective = SegmentLoss(model, precision=self.settings.precision)
        self.guard = NonFiniteGuard()
        self.step = 0
        self.first_bits_per_byte = float("nan")
        self.last: Evaluation | None = None
        self.without_memory: Evaluation | None = None
        self._parallel: Any = None  # the objective as it is called in training, once `_prepare` has made it

    # --------------------------------------------------------------------------------------------------- the loop

    def train(self) -> TrainingResult:
        """Trains up to ``max_steps``, or until Ctrl-C or ``max_seconds``; a checkpoint is written in any case.

        Raises:
            RuntimeError: another run is using the folder, or the loss was not finite too often in a row.
            CheckpointError: the checkpoint is of another model or another number of processes, or damaged.
            ValueError: the checkpoint is of other data, another seed or another segment length.
            FileNotFoundError, FileExistsError: the folder does not suit ``resume``.
            OSError: a checkpoint could not be written; earlier ones are untouched.
        """
        settings, started = self.settings, time.monotonic()
        outcome: Outcome = "finished"
        with self._run_directory() as run, contextlib.ExitStack() as stack:
            if self._parallel is None:
                self._prepare(run)
            log = self._metrics(run, stack)
            stopping = Stopping(stack.enter_context(InterruptHandler()), settings.max_seconds)
            first_step = self.step
            if self.step == 0:
                self.first_bits_per_byte = self._validate(log).bits_per_byte
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
                seconds=time.monotonic() - started,
                first_bits_per_byte=self.first_bits_per_byte,
                last=self.last,
                without_memory=self.without_memory,
                checkpoints=run.checkpoints,
                curves=curves,
            )

    def _update(self) -> dict[str, float]:
        """One optimizer update; its metrics."""
        started = time.monotonic()
        segments = [next(self.streams) for _ in range(self.settings.gradient_accumulation)]
        for segment in segments:
            check_ids(segment.ids, self.model.num_tokens, "corpus")
        labels, normalizer = loss_normalizer(sum(segment.num_labels for segment in segments), self.device)
        loss = torch.zeros((), device=self.device)
        for number, segment in enumerate(segments, start=1):
            last = number == len(segments)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self._parallel):
                part = self._parallel(segment.ids.to(self.device), segment.labels.to(self.device), normalizer)
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
        held = self.objective.memories
        return {
            "loss": float(loss),
            "train_bits_per_byte": bits_per_byte(float(loss) * labels, max(1, round(labels)), self.corpus.train),
            **finished,
            "memories": 0 if not held else len(held[0]) / self.settings.batch_size,
            "tokens_per_second": round(labels / (time.monotonic() - started)),
            "epoch": self.streams.epoch,
        }

    def _validate(self, log: MetricsLog) -> Evaluation:
        precision = self.settings.precision
        self.last = score(self.model, self.held_out, use_memory=self.settings.use_memory, precision=precision)
        rows: dict[str, float] = {
            "validation_bits_per_byte": self.last.bits_per_byte,
            "validation_loss": self.last.loss,
        }
        self.without_memory = None
        if self.settings.use_memory and self.model.memorizing_layers:
            self.without_memory = score(self.model, self.held_out, use_memory=False, precision=precision)
            rows["validation_bits_per_byte_without_memory"] = self.without_memory.bits_per_byte
            far = _mean_from(self.without_memory, FAR) - _mean_from(self.last, FAR)
            rows["memory_gain_far"] = far
        log.log(self.step, rows)
        return self.last

    # ------------------------------------------------------------------------------------- beginning and going on

    def _run_directory(self) -> RunDirectory:
        return RunDirectory(
            self.checkpoint_dir,
            resume=self.resume if self._parallel is None else "auto",
            seed=self.settings.seed,
            device=self.device,
            settings={
                **asdict(self.settings),
                "model": self.model.config["arguments"],
                "corpus_fingerprint": self.corpus.fingerprint,
            },
            packages=("memorizing-transformer", "accelerate"),
        )

    def _metrics(self, run: RunDirectory, stack: contextlib.ExitStack) -> MetricsLog:
        """The open log, closed with ``stack``, which restores the model's mode as well."""
        metrics = open_metrics(
            run,
            objective=self.objective,
            accelerator=self.accelerator,
            trackers=self.trackers,
            project="memorizing-transformer",
            settings=asdict(self.settings),
            step=self.step,
            max_steps=self.settings.max_steps,
        )
        return stack.enter_context(metrics)

    def _prepare(self, run: RunDirectory) -> None:
        settings = self.settings
        if settings.use_memory and self.model.memorizing_layers:
            self.objective.memories = self.model.create_knn_memories(batch_size=settings.batch_size)
        checkpoint = self._read(run) if run.resumes else None
        self._parallel = self.accelerator.prepare_model(self.objective, device_placement=False)
        self.optimizer, self.schedule = adamw(self.model, settings)
        if checkpoint is None:
            seed_everything((settings.seed + rank()) % 2**32)
        else:
            self._restore(checkpoint)

    def _read(self, run: RunDirectory) -> Checkpoint:
        """The newest checkpoint, its weights put in place; refused before anything is changed."""
        checkpoint = load_checkpoint(run.checkpoints)
        where, own = checkpoint.path, checkpoint.rng
        check_config(type(self.model), checkpoint.config, where / "config.json")
        mine = self.model.config["arguments"]
        names = [name for name in mine if name not in _FREE]
        check_goes_on(checkpoint, trainer=type(self).__name__, arguments=mine, names=names)
        memories = self.objective.memories
        if (memories is None) != (own["memories"] is None):
            raise CheckpointError(f"{where} was written with use_memory={memories is None}")
        self.streams.check_state(own["streams"])
        if memories is not None:
            memories.load_state_dict(own["memories"])
        self.streams.load_state_dict(own["streams"])
        load_weights(self.model, checkpoint.model_state or {}, where=str(where))
        return checkpoint

    def _restore(self, checkpoint: Checkpoint) -> None:
        state, own = checkpoint.trainer_state, checkpoint.rng
        with own_settings(self.optimizer):
            self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.guard.load_state_dict(state["guard"])
        self.first_bits_per_byte = state["first_bits_per_byte"]
        self.step = checkpoint.step
        if own["window"] is not None:
            self.objective.window = XLMemories(one.to(self.device) for one in own["window"]["kv"])
            mask = own["window"]["mask"]
            self.objective.window.mask = None if mask is None else mask.to(self.device)
        restore_rng(own["rng"])

    def _save(self, run: RunDirectory) -> None:
        memories, window = self.objective.memories, self.objective.window
        save_checkpoint(
            run.checkpoints,
            self.step,
            model=self.model,
            trainer_state={
                "trainer": type(self).__name__,
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "guard": self.guard.state_dict(),
                "first_bits_per_byte": self.first_bits_per_byte,
            },
            # what each process has of its own goes where the random states go
            rng={
                "rng": capture_rng(),
                "streams": self.streams.state_dict(),
                "memories": None if memories is None else memories.state_dict(),
                "window": None if window is None else {"kv": list(window), "mask": window.mask},
            },
            tokenizer=self.tokenizer,
            keep=self.settings.keep_checkpoints,
        )


def _check_trainable(model: MemorizingTransformer, tokenizer: Any) -> int:
    """The id that ends documents."""
    check_vocabulary(tokenizer, model.num_tokens)
    if tokenizer.eos_id is None or model.eos_id != tokenizer.eos_id:
        raise ValueError(
            f"model must have clear_memories_on_eos_token_id = {tokenizer.eos_id}, the tokenizer's eos_id, "
            f"got {model.eos_id}"
        )
    return tokenizer.eos_id


def _mean_from(evaluation: Evaluation, position: int) -> float:
    """Mean loss in bits of the tokens with at least ``position`` before them; NaN if there are none."""
    far = [(number, loss) for first, number, loss in evaluation.by_position if first >= position]
    total = sum(number for number, _ in far)
    return sum(number * loss for number, loss in far) / total / 0.6931471805599453 if total else float("nan")
