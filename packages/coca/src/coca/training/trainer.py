"""Training on image-text pairs.

An update shards ``batch_size`` pairs over the processes, and both losses are those of the whole batch, so the update is
the same on any number of processes.
"""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from coca.data.captioned_images import CaptionedImages
from coca.data.pair_batches import PairBatches
from coca.evaluation.evaluation import caption_images, evaluate
from coca.evaluation.grid import draw_grid
from coca.model.coca import CoCa
from coca.model.preprocessing import ImagePreprocessing
from coca.training.config import TrainingSettings
from coca.training.objective import CoCaObjective, accumulate
from lm_core.checkpoints.checkpoint import on_main_process
from lm_core.checkpoints.pretrained import check_vocabulary
from lm_core.checks import typed
from lm_core.distributed import rank, world_size
from lm_core.tokenizers import ByteTokenizer, as_tokenizer
from lm_core.training.accelerator import autocast
from lm_core.training.blocks import blocks_of
from lm_core.training.session import TrainingResult as SessionResult
from lm_core.training.session import TrainingSession, adamw

T = TypeVar("T")
CURVES = (
    *("caption_loss", "validation_caption_loss", "contrastive_loss", "validation_contrastive_loss"),
    *("validation_zero_shot_accuracy", "validation_caption_accuracy"),
    *("validation_image_to_text_r@1", "validation_text_to_image_r@1"),
    *("logit_scale", "learning_rate", "grad_norm"),
)


@dataclass(frozen=True, kw_only=True)
class TrainingResult(SessionResult):
    """Outcome of a run; see also ``lm_core.training.session.TrainingResult``.

    Attributes:
        first_metrics: metrics of the validation before training; see ``coca.evaluation.evaluation.evaluate``.
        metrics: metrics of the last validation.
        grid: picture of held-out images with their generated captions and nearest texts.
    """

    first_metrics: dict[str, float]
    metrics: dict[str, float]
    checkpoints: Path
    grid: Path


class CoCaTrainer:
    """Trains a ``CoCa`` on images with captions, resumably.

    Args:
        model: model to train, in place; moved to the device, or sharded over the processes with ``settings.fsdp``.
        data: images to train on.
        validation_data: held-out images.
        preprocessing: normalisation of the pixels; stored with the checkpoints.
        checkpoint_dir: folder of the run; see ``lm_core.training.run_directory.RunDirectory``.
        tokenizer: caption tokenizer, stored with the checkpoints; bytes by default.
        settings: all other settings.
        resume: "auto" resumes if the folder has a checkpoint, True demands one, False demands a folder without a run.
        trackers: ``accelerate`` trackers by name ("tensorboard", "wandb"), and objects with ``log(values, step=...)``.

    Raises:
        ValueError: the model has no image encoder, or other special ids or fewer tokens than the tokenizer; the batch
            is larger than the data; the device or the precision is not available; a tracker is unknown.
        TypeError: an argument is of another type.
    """

    @typed
    def __init__(
        self,
        *,
        model: CoCa,
        data: CaptionedImages,
        validation_data: CaptionedImages,
        preprocessing: ImagePreprocessing,
        checkpoint_dir: str | Path,
        tokenizer: Any = None,
        settings: TrainingSettings | None = None,
        resume: bool | Literal["auto"] = "auto",
        trackers: Sequence[Any] = (),
    ) -> None:
        self.settings = settings = TrainingSettings() if settings is None else settings
        self.tokenizer: Any = ByteTokenizer() if tokenizer is None else as_tokenizer(tokenizer)
        _check_tokens(model, self.tokenizer)
        if model.img_encoder is None:
            raise ValueError("model must have an img_encoder to be trained on images, got img_encoder=None")
        if model.max_length is not None and settings.max_length > model.max_length:
            raise ValueError(f"max_length must be at most {model.max_length}, the model's, got {settings.max_length}")
        self.data = data
        self.validation_data = validation_data
        self.preprocessing = preprocessing
        self.session = TrainingSession(
            type(self).__name__,
            config=settings,
            checkpoint_dir=checkpoint_dir,
            resume=resume,
            trackers=trackers,
            packages=("coca",),
        )
        self.device = self.session.device
        if settings.batch_size // world_size() < settings.micro_batches:
            raise ValueError(
                f"micro_batches must be at most the pairs of a process, {settings.batch_size // world_size()}, "
                f"got {settings.micro_batches}"
            )
        self.batches = PairBatches(
            data=data,
            tokenizer=self.tokenizer,
            preprocessing=preprocessing,
            batch_size=settings.batch_size,
            pad_id=model.pad_id,
            max_length=settings.max_length,
            shift=settings.shift,
            seed=settings.seed,
            rank=rank(),
            world_size=world_size(),
            workers=settings.workers,
        )
        # what a checkpoint, the record of the run and its curves contain
        self.model = self.session.place(model)
        self.model.preprocessing = preprocessing
        arguments = model.config["arguments"]
        self.session.register(
            model=model,
            objective=CoCaObjective(model),
            optimizer=lambda: adamw(model, settings),
            blocks=lambda: blocks_of(model),
            state={"batches": self.batches},
            architecture={name: value for name, value in arguments.items() if name != "gradient_checkpointing"},
            identity={
                "tokenizer": getattr(self.tokenizer, "fingerprint", type(self.tokenizer).__name__),
                "preprocessing": asdict(preprocessing),
            },
            tokenizer=self.tokenizer,
            assets=model.write_assets,  # a sharded model is saved as a state dict, without its files
            validate=lambda: self._alone(self._validate),
            record={
                "model": arguments,
                "images": len(data),
                "validation_images": len(validation_data),
                "unreadable_images": list(data.unreadable),
            },
            curves=CURVES,
            shown=("caption_loss", "contrastive_loss", "validation_zero_shot_accuracy"),
        )

    def train(self) -> TrainingResult:
        """Trains up to ``max_steps``, or until Ctrl-C or ``max_seconds``; a checkpoint is written in any case.

        Seeds python's, numpy's and torch's generators, or restores them from the checkpoint.

        Raises:
            RuntimeError: too many losses in a row were not finite (``lm_core.training.session.TrainingSession.run``).
            ValueError: the checkpoint belongs to other data.
            OSError: a checkpoint could not be written; earlier ones are intact.
        """
        with self.session.run() as session, contextlib.closing(self.batches):
            for _ in session.steps():
                started = time.monotonic()
                batch = next(self.batches).to(self.device)
                if self.settings.micro_batches == 1:
                    with autocast(self.settings.precision, self.device):
                        total, caption, contrastive = session.module(batch.text, batch.images)
                    session.backward(total)
                else:
                    parts = batch.split(self.settings.micro_batches)
                    caption, contrastive = accumulate(session, parts, self.settings.precision)
                update = session.optimizer_step()
                self.model.clamp_logit_scale_()
                session.log(
                    update,
                    caption_loss=caption,
                    contrastive_loss=contrastive,
                    logit_scale=self.model.logit_scale.detach(),
                    pairs_per_second=round(self.settings.batch_size / (time.monotonic() - started)),
                    epoch=self.batches.epoch,
                )
            grid = self._alone(self._draw)
        return session.result(
            TrainingResult,
            first_metrics=_evaluated(session.first_validation),
            metrics=_evaluated(session.last_validation),
            grid=grid,
        )

    def _alone(self, function: Callable[[], T]) -> T:
        """The result of ``function`` on the main process, with all weights; every process calls it."""
        with self.session.gathered():
            return on_main_process(function)

    def _validate(self) -> dict[str, Any]:
        """Metrics of the held-out images, and a generated caption of the first."""
        settings, inputs = self.settings, (self.tokenizer, self.preprocessing)
        length = settings.max_length
        captions = None if self.session.step >= settings.max_steps else settings.validation_captions
        with autocast(settings.precision, self.device):
            metrics = evaluate(
                self.model, self.validation_data, *inputs, max_length=length, max_new_tokens=length, captions=captions
            )
            (sample,) = caption_images(self.model, self.validation_data.select([0]), *inputs, max_new_tokens=length)
        values = {f"validation_{name}": value for name, value in metrics.items()}
        return {**values, "sample_caption": sample, "unreadable_images": len(self.data.unreadable)}

    def _draw(self) -> Path:
        assert self.session.folder is not None
        return draw_grid(
            self.session.folder.path / "grid.png",
            self.model,
            self.validation_data,
            self.tokenizer,
            self.preprocessing,
            max_length=self.settings.max_length,
            title=f"Held-out images after {self.session.step} updates: true and generated caption, nearest texts",
        )


def _evaluated(validation: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of ``evaluate`` from a row of metrics."""
    prefix = "validation_"
    return {name.removeprefix(prefix): value for name, value in validation.items() if name.startswith(prefix)}


def _check_tokens(model: CoCa, tokenizer: Any) -> None:
    """Raises ``ValueError`` unless vocabulary size and special ids of ``model`` fit ``tokenizer``."""
    check_vocabulary(tokenizer, model.num_tokens)
    for name in ("pad_id", "eos_id", "bos_id"):
        expected, actual = getattr(tokenizer, name, None), getattr(model, name)
        # a tokenizer that pads with EOS has no padding id of its own: the model's is used (CLIP's BPE in open_clip: 0)
        if name == "pad_id" and expected == tokenizer.eos_id:
            continue
        if expected is not None and expected != actual:
            raise ValueError(f"model must have the tokenizer's {name}, {expected}, got {actual}")
