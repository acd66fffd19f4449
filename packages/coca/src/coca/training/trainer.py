"""Training on image-text pairs: one loop over ``accelerate``.

An update takes ``batch_size`` pairs, each process its piece of them, and both losses are those of the whole batch, so
the update is the same on any number of processes. A checkpoint holds all that the next update depends on; a run that
was killed ends with the weights, bit for bit, of one that was not (on the same device, torch and number of processes).
"""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from coca.data.captioned_images import CaptionedImages
from coca.data.pair_batches import PairBatches
from coca.evaluation.evaluation import caption_images, evaluate
from coca.evaluation.grid import draw_grid
from coca.model.coca import CoCa
from coca.model.preprocessing import ImagePreprocessing
from coca.training.config import TrainingSettings
from lm_core.checkpoints.checkpoint import load_checkpoint, on_main_process, save_checkpoint
from lm_core.checkpoints.pretrained import check_vocabulary
from lm_core.checkpoints.weights import load_weights
from lm_core.checks import typed
from lm_core.distributed import broadcast_object, rank, world_size
from lm_core.rng import restore_rng, seed_everything
from lm_core.tokenizers import ByteTokenizer
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

CURVES = (
    *("caption_loss", "validation_caption_loss", "contrastive_loss", "validation_contrastive_loss"),
    *("validation_zero_shot_accuracy", "validation_caption_accuracy"),
    *("validation_image_to_text_r@1", "validation_text_to_image_r@1"),
    *("logit_scale", "learning_rate", "grad_norm"),
)


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended.

    Attributes:
        outcome: "finished", "interrupted" (Ctrl-C or SIGTERM) or "out of time" (``max_seconds``).
        first_step: updates that were done when this call began.
        step: updates done.
        first_metrics: of the validation before training; see ``coca.evaluation.evaluation.evaluate``.
        metrics: of the last validation.
        seconds: that this call took.
        checkpoints: folder of the checkpoints; the newest one is of ``step``.
        curves: picture of the metrics; None if matplotlib is not installed.
        grid: picture of held-out images with their generated captions and nearest texts.
    """

    outcome: Outcome
    first_step: int
    step: int
    first_metrics: dict[str, float]
    metrics: dict[str, float]
    seconds: float
    checkpoints: Path
    curves: Path | None
    grid: Path


class CoCaObjective(nn.Module):
    """The model's losses under autocast, as one module to wrap.

    Args:
        model: the model.
        precision: of matrix products.
    """

    def __init__(self, model: CoCa, *, precision: Precision) -> None:
        super().__init__()
        self.model = model
        self.precision: Precision = precision

    def forward(self, text: Tensor, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Total, captioning and contrastive loss of the batch of all processes."""
        with autocast(self.precision, text.device):
            loss = self.model.loss(text, images)
        return loss.total, loss.caption, loss.contrastive


class CoCaTrainer:
    """Trains a ``CoCa`` on images with captions, resumably.

    Args:
        model: trained in place; moved to the device.
        data: images to train on.
        held_out: images to validate on.
        preprocessing: how pixels are normalised; travels with the checkpoints.
        checkpoint_dir: folder of the run; see ``lm_core.training.run_directory.RunDirectory``.
        tokenizer: of the captions; travels with the checkpoints; bytes by default.
        settings: everything else.
        resume: "auto" goes on if the folder has a checkpoint, True demands one, False demands a folder without a run.
        trackers: names of trackers that ``accelerate`` knows ("tensorboard", "wandb"), and objects with
            ``log(values, step=...)``.

    Raises:
        ValueError: the model has no image encoder, or other special ids or fewer tokens than the tokenizer; the batch
            is larger than the data; the device or the precision is not to be had; a tracker is unknown.
        TypeError: an argument is of another type.
    """

    @typed
    def __init__(
        self,
        *,
        model: CoCa,
        data: CaptionedImages,
        held_out: CaptionedImages,
        preprocessing: ImagePreprocessing,
        checkpoint_dir: str | Path,
        tokenizer: Any = None,
        settings: TrainingSettings | None = None,
        resume: bool | Literal["auto"] = "auto",
        trackers: Sequence[Any] = (),
    ) -> None:
        self.settings = TrainingSettings() if settings is None else settings
        self.tokenizer: Any = ByteTokenizer() if tokenizer is None else tokenizer
        check_tokens(model, self.tokenizer)
        if model.img_encoder is None:
            raise ValueError("model must have an img_encoder to be trained on images, got img_encoder=None")
        self.data, self.held_out, self.preprocessing = data, held_out, preprocessing
        self.checkpoint_dir, self.resume = Path(checkpoint_dir), resume
        self.device = pick_device(self.settings.device)
        pick_precision(self.settings.precision, self.device)  # refuses what the device cannot do
        self.trackers = list(trackers)
        names, _ = split_trackers(trackers)
        self.accelerator = start_accelerator(self.device, tracker_names=names, folder=self.checkpoint_dir)
        self.batches = PairBatches(
            data=data,
            tokenizer=self.tokenizer,
            preprocessing=preprocessing,
            batch_size=self.settings.batch_size,
            pad_id=model.pad_id,
            max_length=self.settings.max_length,
            shift=self.settings.shift,
            seed=self.settings.seed,
            rank=rank(),
            world_size=world_size(),
        )
        self.model = model.to(self.device)
        self.model.preprocessing = preprocessing
        self.objective = CoCaObjective(model, precision=self.settings.precision)
        self.guard = NonFiniteGuard()
        self.step = 0
        self.first_metrics: dict[str, float] = {}
        self.metrics: dict[str, float] = {}
        self._parallel: Any = None  # the objective as it is called in training, once `_prepare` has made it

    # --------------------------------------------------------------------------------------------------- the loop

    def train(self) -> TrainingResult:
        """Trains up to ``max_steps``, or until Ctrl-C or ``max_seconds``; a checkpoint is written in any case.

        Seeds python's, numpy's and torch's generators, or puts them where the checkpoint had them.

        Raises:
            RuntimeError: another run is using the folder, or the loss was not finite too often in a row.
            CheckpointError: the checkpoint is of another model or another number of processes, or damaged.
            ValueError: the checkpoint is of other data or another seed.
            FileNotFoundError, FileExistsError: the folder does not suit ``resume``.
            OSError: a checkpoint could not be written; earlier ones are untouched.
        """
        settings = self.settings
        started = time.monotonic()
        outcome: Outcome = "finished"
        with self._run_directory() as run, contextlib.ExitStack() as stack:
            if self._parallel is None:
                self._prepare(run)
            first_step = self.step
            log = self._metrics_log(run, stack)
            stopping = Stopping(stack.enter_context(InterruptHandler()), settings.max_seconds)
            if self.step == 0:
                self._validate(log)
                self.first_metrics = self.metrics
            while self.step < settings.max_steps and outcome == "finished":
                log.log(self.step + 1, self._update())
                self.step += 1
                log.progress.update()
                last = self.step == settings.max_steps
                outcome = stopping.outcome(last=last)
                stops = last or outcome != "finished"
                if last or outcome == "out of time" or self.step % settings.validate_every == 0:
                    self._validate(log)
                if stops or self.step % settings.checkpoint_every == 0:
                    log.sync()
                    self._save(run)
            grid = run.path / "grid.png"
            on_main_process(lambda: self._draw(grid))
            curves = draw_curves(run, CURVES)
        return TrainingResult(
            outcome=outcome,
            first_step=first_step,
            step=self.step,
            first_metrics=self.first_metrics,
            metrics=self.metrics,
            seconds=time.monotonic() - started,
            checkpoints=run.checkpoints,
            curves=curves,
            grid=grid,
        )

    def _update(self) -> dict[str, Any]:
        """One optimizer update; the values to log."""
        started = time.monotonic()
        batch = next(self.batches).to(self.device)
        total, caption, contrastive = self._parallel(batch.text, batch.images)
        self.accelerator.backward(total)
        finished = finish_update(
            self.step + 1,
            total,
            self.objective.parameters(),
            optimizer=self.optimizer,
            schedule=self.schedule,
            guard=self.guard,
            max_grad_norm=self.settings.max_grad_norm,
        )
        self.model.clamp_logit_scale_()
        return {
            "loss": total,
            "caption_loss": caption,
            "contrastive_loss": contrastive,
            "logit_scale": self.model.logit_scale.detach(),
            **finished,
            "pairs_per_second": round(self.settings.batch_size / (time.monotonic() - started)),
            "epoch": self.batches.epoch,
        }

    def _validate(self, log: MetricsLog) -> None:
        """Rank 0 evaluates, the others wait."""
        last = self.step >= self.settings.max_steps
        found: dict[str, float] = {}
        sample = ""
        if rank() == 0:
            with autocast(self.settings.precision, self.device):
                found = evaluate(
                    self.model,
                    self.held_out,
                    self.tokenizer,
                    self.preprocessing,
                    max_length=self.settings.max_length,
                    max_new_tokens=self.settings.max_length,
                    captions=None if last else self.settings.validation_captions,
                )
                first, length = self.held_out.select([0]), self.settings.max_length
                (sample,) = caption_images(self.model, first, self.tokenizer, self.preprocessing, max_new_tokens=length)
        self.metrics = broadcast_object(found)
        row = {f"validation_{name}": value for name, value in self.metrics.items()}
        log.log(self.step, row, sample_caption=sample, unreadable_images=len(self.data.unreadable))

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
                "images": len(self.data),
                "held_out_images": len(self.held_out),
                "unreadable_images": list(self.data.unreadable),
            },
            packages=("coca", "accelerate"),
        )

    def _metrics_log(self, run: RunDirectory, stack: contextlib.ExitStack) -> MetricsLog:
        """The open log, closed with ``stack``, which restores the model's mode as well."""
        metrics = open_metrics(
            run,
            objective=self.objective,
            accelerator=self.accelerator,
            trackers=self.trackers,
            project="coca",
            settings=asdict(self.settings),
            step=self.step,
            max_steps=self.settings.max_steps,
            shown=("caption_loss", "contrastive_loss", "validation_zero_shot_accuracy"),
        )
        return stack.enter_context(metrics)

    def _prepare(self, run: RunDirectory) -> None:
        """Spreads the model over processes and makes the optimizer, anew or as the newest checkpoint has them."""
        settings = self.settings
        checkpoint = load_checkpoint(run.checkpoints) if run.resumes else None
        if checkpoint is not None:
            own = self.model.config["arguments"]
            free = ("gradient_checkpointing",)
            names = [name for name in own if name not in free]
            check_goes_on(checkpoint, trainer=type(self).__name__, arguments=own, names=names)
            self.batches.load_state_dict(checkpoint.trainer_state["batches"])
            load_weights(self.model, checkpoint.model_state or {}, where=str(checkpoint.path))
        if settings.compile:
            self.objective.compile()
        self._parallel = self.accelerator.prepare_model(self.objective, device_placement=False)
        self.optimizer, self.schedule = adamw(self.model, settings)
        if checkpoint is None:
            seed_everything((settings.seed + rank()) % 2**32)
            return
        with own_settings(self.optimizer):
            self.optimizer.load_state_dict(checkpoint.trainer_state["optimizer"])
        self.schedule.load_state_dict(checkpoint.trainer_state["schedule"])
        self.guard.load_state_dict(checkpoint.trainer_state["guard"])
        self.first_metrics = dict(checkpoint.trainer_state["first_metrics"])
        self.metrics = dict(checkpoint.trainer_state["metrics"])
        self.step = checkpoint.step
        restore_rng(checkpoint.rng)

    def _save(self, run: RunDirectory) -> None:
        save_checkpoint(
            run.checkpoints,
            self.step,
            model=self.model,
            trainer_state={
                "trainer": type(self).__name__,
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "guard": self.guard.state_dict(),
                "batches": self.batches.state_dict(),
                "first_metrics": dict(self.first_metrics),
                "metrics": dict(self.metrics),
            },
            tokenizer=self.tokenizer,
            keep=self.settings.keep_checkpoints,
        )

    def _draw(self, grid: Path) -> None:
        title = f"Held-out images after {self.step} updates: generated caption, and the nearest texts"
        shown = (self.model, self.held_out, self.tokenizer, self.preprocessing)
        draw_grid(grid, *shown, max_length=self.settings.max_length, title=title)


def check_tokens(model: CoCa, tokenizer: Any) -> None:
    """Raises unless ``model`` was made for the tokens of ``tokenizer``.

    Raises:
        ValueError: the model has fewer tokens, or another EOS, BOS or padding id.
        TypeError: the tokenizer lacks a part of ``lm_core.tokenizers.Tokenizer``, or cannot be saved.
    """
    check_vocabulary(tokenizer, model.num_tokens)
    for name in ("pad_id", "eos_id", "bos_id"):
        wanted, own = getattr(tokenizer, name, None), getattr(model, name)
        if wanted is not None and wanted != own:
            raise ValueError(f"model must have the tokenizer's {name}, {wanted}, got {own}")
