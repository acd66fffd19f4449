"""The command ``coca``: ``train``, ``caption``, ``embed``, ``zero-shot``, ``retrieve`` and ``convert``.

Each command is a typed function, from whose signature and docstring its flags and their help are made.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from coca.cli.commands import COMMANDS, tell_unreadable
from coca.cli.model_settings import ModelSettings, build_model, encoder_preprocessing
from coca.data.captioned_images import CaptionedImages
from coca.data.digits import IMAGE_SIZE, MEAN, STD, handwritten_digits
from coca.data.image_files import load_images
from coca.model.preprocessing import ImagePreprocessing
from coca.training.config import TrainingSettings
from lm_core.cli.main import print_resume_hint, run_command, say
from lm_core.cli.parser import Command, CommandParser, Group, command_parser
from lm_core.rng import seed_everything
from lm_core.tokenizers import load_tokenizer
from lm_core.training.run_directory import Result, write_summary

if TYPE_CHECKING:
    from coca.training.trainer import TrainingResult

TRAIN = """Trains a CoCa on images with captions; without arguments, on handwritten digits (about two minutes on two CPU
cores).

  coca train                                               the quickstart, into runs/coca-quickstart
  coca train --data photos/captions.csv --dim 512 --heads 8 --dim_head 64 --vit_dim 384 --vit_depth 12 \\
      --unimodal_depth 6 --multimodal_depth 6 --num_img_queries 256 --batch_size 512 --shift 0 \\
      --max_steps 50000 --checkpoint_dir runs/photos
  coca train --data photos.tar --encoder FOLDER --freeze_encoder --checkpoint_dir runs/frozen
  coca train --print_config > run.yaml; coca train --config run.yaml --seed 1
  torchrun --nproc_per_node 8 -m coca train --compile

Flags win over the YAML file, which wins over the defaults. Ctrl-C saves a checkpoint; the same command goes on from it,
as it does after a kill."""


def train(
    *,
    model: ModelSettings,
    settings: TrainingSettings,
    data: str = "digits",
    validation_data: str | None = None,
    validation_fraction: float = 0.2,
    image_column: str = "image",
    caption_column: str = "caption",
    label_column: str = "label",
    templates: list[str] | None = None,
    max_unreadable: float = 0.05,
    tokenizer: str = "bytes",
    checkpoint_dir: str = "runs/coca-quickstart",
    resume: bool | Literal["auto"] = "auto",
    trackers: list[str] | None = None,
) -> int:
    """Trains a CoCa on images with captions.

    Args:
        model: sizes of the model.
        settings: of the training.
        data: digits, a folder, a .csv, .tsv or .jsonl table, or a .tar of images with captions.
        validation_data: the same, held out.
        validation_fraction: how much of data is held out where validation_data is not given.
        image_column: of a table, the path of an image.
        caption_column: of a table, a caption.
        label_column: of a table, the class of an image, if it has one; held-out images are then classified.
        templates: captions with one {} for a class name.
        max_unreadable: part of the images that may be unreadable; they are named and counted.
        tokenizer: bytes, a folder with a Hugging Face tokenizer, or organisation/name on the hub.
        checkpoint_dir: folder of the run, for checkpoints, metrics.jsonl, curves.png and grid.png.
        resume: auto goes on if the folder has a checkpoint, true demands one, false demands a folder without a run.
        trackers: of accelerate, such as [tensorboard].

    Returns:
        The exit status.
    """
    from coca.training.trainer import CoCaTrainer
    from lm_core.distributed import rank, world_size

    encoder = load_tokenizer(tokenizer)
    preprocessing = _preprocessing(model, data)
    columns = {"image_column": image_column, "caption_column": caption_column, "label_column": label_column}
    reading: dict[str, Any] = {"templates": tuple(templates or ()), "max_unreadable": max_unreadable, **columns}
    train_data, held_out_data = _data(data, validation_data or validation_fraction, preprocessing, reading)
    seed_everything(settings.seed)
    coca = build_model(model, encoder, preprocessing)
    trainer = CoCaTrainer(
        model=coca,
        data=train_data,
        held_out=held_out_data,
        preprocessing=preprocessing,
        tokenizer=encoder,
        checkpoint_dir=checkpoint_dir,
        settings=settings,
        resume=resume,
        trackers=trackers or (),
    )
    millions = sum(parameter.numel() for parameter in coca.parameters()) / 1e6
    say(f"model       CoCa, {millions:.2f} million parameters, {encoder.vocab_size} tokens")
    say(f"data        {data}: {len(train_data):,} images to learn from, {len(held_out_data):,} held out")
    tell_unreadable(train_data, say)
    say(f"run         {checkpoint_dir}, {settings.max_steps} updates, {trainer.device}, {world_size()} process(es)")
    result = trainer.train()
    if result.first_step == settings.max_steps:
        say("            finished before; another --checkpoint_dir trains anew")
    for name, value in result.metrics.items():
        say(f"held out    {name:22} {value:.3f}")
    say(f"checkpoint  {result.checkpoints / f'step-{result.step}'}")
    say(f"metrics     {Path(checkpoint_dir) / 'metrics.jsonl'}")
    say(f"curves      {result.curves or 'not drawn: pip install matplotlib, then run the same command again'}")
    say(f"grid        {result.grid}: held-out images, their generated captions and the nearest texts")
    if result.outcome != "finished":
        return print_resume_hint("coca", result.outcome, result.step, settings.max_steps)
    if rank() == 0:
        write_summary(checkpoint_dir, _results(result, data), steps=result.step, seconds=result.seconds)
    return 0


def _results(result: "TrainingResult", data: str) -> list[Result]:
    """What the run came to: at most three numbers, accuracies where classes are known, else recall, else losses."""
    names = {
        "zero_shot_accuracy": "zero-shot accuracy",
        "caption_accuracy": "captions that name the class",
        "image_to_text_r@1": "recall at 1, image to text",
        "text_to_image_r@1": "recall at 1, text to image",
        "caption_loss": "caption loss, nats/token",
        "contrastive_loss": "contrastive loss, nats",
    }
    what = "held-out digits" if data == "digits" else "held-out images"
    found = [
        Result(f"{words}, {what}", result.metrics[name], result.first_metrics.get(name), _better(name))
        for name, words in names.items()
        if name in result.metrics
    ]
    return found[:3]


def _better(metric: str) -> Literal["lower", "higher"]:
    return "lower" if metric.endswith("loss") else "higher"


def _preprocessing(model: ModelSettings, data: str) -> ImagePreprocessing:
    if data == "digits":
        size, channels = model.image_size or IMAGE_SIZE, model.channels or 1
        if (size, channels) != (IMAGE_SIZE, 1):
            raise ValueError(f"the digits have image_size 8 and channels 1, got {size} and {channels}")
        return ImagePreprocessing(image_size=size, channels=1, mean=(MEAN,), std=(STD,))
    if model.encoder is not None:
        return encoder_preprocessing(model.encoder, model.image_size, model.channels)
    return ImagePreprocessing(image_size=model.image_size or 224, channels=model.channels or 3)


def _data(
    source: str, held_out: float | str, preprocessing: ImagePreprocessing, reading: dict[str, Any]
) -> tuple[CaptionedImages, CaptionedImages]:
    images = (
        handwritten_digits() if source == "digits" else load_images(source, preprocessing, progress=True, **reading)
    )
    if isinstance(held_out, str):
        return images, load_images(held_out, preprocessing, progress=True, **reading)
    return images.split(held_out)


def build_parser() -> CommandParser:
    """The parser of the whole command."""
    description = "CoCa image-text models: train, caption, classify, retrieve."
    training = Command(train, {"model": Group(ModelSettings), "settings": Group(TrainingSettings)}, TRAIN)
    return command_parser("coca", description, {"train": training, **COMMANDS}, package="coca")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status (see ``lm_core.cli.main``)."""
    return run_command(build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
