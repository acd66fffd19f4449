"""``coca train``: builds data, image encoder, model and trainer from flags."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from coca.cli.presets import Preset, settings_of
from coca.data.captioned_images import CaptionedImages
from coca.data.digits import IMAGE_SIZE, MEAN, STD, handwritten_digits
from coca.data.image_files import load_images
from coca.model.coca import CoCa
from coca.model.image_encoders import load_encoder
from coca.model.preprocessing import ImagePreprocessing
from coca.model.vit import VisionTransformer
from coca.training.config import TrainingSettings
from coca.training.trainer import CoCaTrainer
from lm_core.checkpoints.checkpoint import checkpoint_folder
from lm_core.checks import typed
from lm_core.cli.main import report, report_run
from lm_core.distributed import world_size
from lm_core.rng import seed_everything
from lm_core.tokenizers import load_tokenizer
from lm_core.training.run_directory import Result

# Results of a run, most important first: accuracies where classes are known, else recall, else losses.
_RESULTS = {
    "zero_shot_accuracy": "zero-shot accuracy",
    "caption_accuracy": "captions that name the class",
    "image_to_text_r@1": "recall at 1, image to text",
    "text_to_image_r@1": "recall at 1, text to image",
    "caption_loss": "caption loss, nats/token",
    "contrastive_loss": "contrastive loss, nats",
}


@typed
@dataclass(frozen=True, kw_only=True)
class EncoderSettings:
    """Image encoder and preprocessing.

    Args:
        encoder: folder or organisation/name on the hub of a Hugging Face vision model to use instead of a new ViT.
        freeze_encoder: trains everything but the encoder.
        image_size: pixels to resize and crop a side to; 0 takes 8 for the digits, the encoder's own size, else 224.
        channels: channels of the images, 1 (grey) or 3 (RGB); 0 takes 1 for the digits, 3 for others.
        patch_size: patch size of the ViT; 0 takes image_size / 14 from 56 pixels on (16 for 224), image_size / 4 below.
        vit_dim: features of a token of the ViT.
        vit_depth: blocks of the ViT.
        vit_heads: query heads of the ViT.

    Raises:
        TypeError: a value is of another type.
    """

    encoder: str | None = None
    freeze_encoder: bool = False
    image_size: int = 0
    channels: int = 0
    patch_size: int = 0
    vit_dim: int = 384
    vit_depth: int = 12
    vit_heads: int = 6

    def preprocessing(self, *, digits: bool) -> ImagePreprocessing:
        """Preprocessing of the images.

        Raises:
            ValueError: the digits have another size or number of channels than requested.
        """
        if digits:
            size, channels = self.image_size or IMAGE_SIZE, self.channels or 1
            if (size, channels) != (IMAGE_SIZE, 1):
                raise ValueError(f"the digits have image_size 8 and channels 1, got {size} and {channels}")
            return ImagePreprocessing(image_size=size, channels=1, mean=(MEAN,), std=(STD,))
        if self.encoder is not None:
            return ImagePreprocessing.from_hugging_face(
                self.encoder, image_size=self.image_size, channels=self.channels
            )
        return ImagePreprocessing(image_size=self.image_size or 224, channels=self.channels or 3)

    def build(self, preprocessing: ImagePreprocessing, *, gradient_checkpointing: bool) -> nn.Module:
        """The image encoder for images that ``preprocessing`` has prepared.

        Raises:
            ValueError, ImportError: sizes do not fit, or the encoder is not available.
        """
        if self.encoder is not None:
            return load_encoder(self.encoder)
        size = preprocessing.image_size
        return VisionTransformer(
            image_size=size,
            patch_size=self.patch_size or max(1, size // (14 if size >= 56 else 4)),
            dim=self.vit_dim,
            depth=self.vit_depth,
            channels=preprocessing.channels,
            dim_head=max(2, self.vit_dim // self.vit_heads),
            heads=self.vit_heads,
            gradient_checkpointing=gradient_checkpointing,
        )


def train(
    *,
    sizes: dict[str, Any],
    images: EncoderSettings,
    settings: TrainingSettings,
    reading: dict[str, Any],
    data: str | None = None,
    model: str | None = None,
    preset: Preset | None = None,
    validation_data: str | None = None,
    validation_fraction: float = 0.2,
    tokenizer: str | None = None,
    checkpoint_dir: str = "runs/coca",
    resume: bool | Literal["auto"] = "auto",
    trackers: list[str] | None = None,
) -> int:
    """Trains a CoCa on images with captions; returns the exit status.

    Args:
        sizes: arguments of ``CoCa``.
        images: settings of the images and their encoder.
        settings: settings of the training.
        reading: arguments of ``load_images``.
        data: images with captions: a folder, a .csv, .tsv or .jsonl table, a .tar or a folder of them, or a pattern as
            a-{000..127}.tar; null takes scikit-learn's handwritten digits.
        model: CoCa to start from, with its sizes and its image settings: a folder of a run, of a checkpoint or of
            save_pretrained, or organisation/name on the hub; null starts from random weights.
        tokenizer: bytes, a folder with a Hugging Face tokenizer, or organisation/name on the hub; null takes the
            model's, or bytes.
        checkpoint_dir: folder of the run, for checkpoints, metrics.jsonl, curves.png and grid.png.
    """
    # data: the tokenizer decides the vocabulary, the image settings what is read
    folder = None if model is None else checkpoint_folder(model)
    text_tokenizer = load_tokenizer(tokenizer or folder or "bytes")
    if text_tokenizer.pad_id is None:
        raise ValueError(f"tokenizer must have a padding or an EOS id, got {text_tokenizer!r} without")
    is_digits = data in (None, "digits")
    if folder is None:
        preprocessing = images.preprocessing(digits=is_digits)
    else:
        if preset is not None:
            raise ValueError(f"preset must be left out for a run that starts from a model, got {preset}")
        coca = _started_from(folder, sizes, images)
        preprocessing = preprocessing_of(coca, folder)

    is_first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun started

    def load(path: str | None) -> CaptionedImages:
        if path is None or path == "digits":
            return handwritten_digits()
        return load_images(path, preprocessing, progress=is_first, **reading)

    if validation_data is None:
        train_data, held_out = load(data).split(validation_fraction)
    else:
        train_data, held_out = load(data), load(validation_data)
    # model, initialised from the seed
    seed_everything(settings.seed)
    if folder is None:
        coca = CoCa(
            **sizes,
            num_tokens=text_tokenizer.vocab_size,
            img_encoder=images.build(preprocessing, gradient_checkpointing=sizes["gradient_checkpointing"]),
            freeze_img_encoder=images.freeze_encoder,
            pad_id=text_tokenizer.pad_id,
            bos_id=getattr(text_tokenizer, "bos_id", None),
            eos_id=text_tokenizer.eos_id,
        )
    trainer = CoCaTrainer(
        model=coca,
        data=train_data,
        validation_data=held_out,
        preprocessing=preprocessing,
        tokenizer=text_tokenizer,
        checkpoint_dir=checkpoint_dir,
        settings=settings,
        resume=resume,
        trackers=trackers or (),
    )
    # report before and after training
    millions = sum(parameter.numel() for parameter in coca.parameters()) / 1e6
    origin = f"preset {preset}" if folder is None else f"from {folder}"
    report("model", f"CoCa ({origin}), {millions:.2f} million parameters, {text_tokenizer.vocab_size} tokens")
    report("data", f"{data or 'digits'}: {len(train_data):,} images for training, {len(held_out):,} held out")
    for line in train_data.unreadable_report():
        report("unreadable", line)
    report("run", f"{checkpoint_dir}, {settings.max_steps} updates, {trainer.device}, {world_size()} process(es)")
    result = trainer.train()
    lines = [("held out", f"{name:22} {value:.3f}") for name, value in result.metrics.items()]
    grid = ("grid", f"{result.grid}: held-out images, their true and generated captions, and the nearest texts")
    subject = "held-out digits" if is_digits else "held-out images"
    results = [
        Result(
            f"{label}, {subject}",
            result.metrics[name],
            result.first_metrics.get(name),
            "lower" if name.endswith("loss") else "higher",
        )
        for name, label in _RESULTS.items()
        if name in result.metrics
    ]
    return report_run(
        "coca", result, checkpoint_dir, max_steps=settings.max_steps, lines=[*lines, grid], results=results[:3]
    )


def _started_from(folder: Path, sizes: Mapping[str, Any], images: EncoderSettings) -> CoCa:
    """The stored model, with those arguments replaced that are not part of its architecture.

    Raises:
        ValueError: another flag differs from what is stored.
    """
    stored = settings_of(str(folder))
    free = {name: sizes[name] for name in ("caption_loss_weight", "contrastive_loss_weight", "gradient_checkpointing")}
    expected = {**EncoderSettings().__dict__, "freeze_encoder": images.freeze_encoder, **stored}
    for name, value in {**sizes, **images.__dict__}.items():
        if name not in free and name != "freeze_encoder" and value != expected.get(name, value):
            raise ValueError(f"{name} must be that of the model in {folder}, {expected[name]}, got {value}")
    return CoCa.from_pretrained(folder, freeze_img_encoder=images.freeze_encoder, **free)


def preprocessing_of(model: CoCa, folder: Path) -> ImagePreprocessing:
    """Image preprocessing of a stored model.

    Raises:
        ValueError: none is stored with it.
    """
    if model.preprocessing is None:
        raise ValueError(f"{folder} has no preprocess.json, so its image preprocessing is unknown")
    return model.preprocessing
