"""The command ``coca``: ``train``, ``caption``, ``embed``, ``zero-shot``, ``retrieve`` and ``convert``."""

from collections.abc import Callable, Sequence
from functools import partial

from coca.cli.commands import caption, convert, embed, retrieve, zero_shot
from coca.cli.train import EncoderSettings, train
from coca.data.image_files import load_images
from coca.model.coca import CoCa
from coca.training.config import TrainingSettings
from lm_core.cli.main import run_command
from lm_core.cli.parser import Command, Group, command_parser

TRAIN = """Trains a CoCa on images with captions, by default on handwritten digits (under 90 s on two CPU cores).

  coca train                                               the quickstart, into runs/coca-quickstart
  coca train --data photos/captions.csv --dim 512 --heads 8 --dim_head 64 --vit_dim 384 --vit_depth 12 \\
      --unimodal_depth 6 --multimodal_depth 6 --num_img_queries 256 --batch_size 512 --shift 0 \\
      --max_steps 50000 --checkpoint_dir runs/photos
  coca train --data photos.tar --encoder FOLDER --freeze_encoder --checkpoint_dir runs/frozen
  coca train --print_config > run.yaml; coca train --config run.yaml --seed 1
  torchrun --nproc_per_node 8 -m coca train --compile

Flags win over the YAML file, which wins over the defaults. Ctrl-C saves a checkpoint; the same command resumes from it,
as it does after a kill."""

# Flags of the model, without what tokenizer and encoder determine; the default sizes are the quickstart's.
MODEL = Group(
    CoCa,
    skip=("num_tokens", "image_dim", "img_encoder", "freeze_img_encoder", "pad_id", "bos_id", "eos_id"),
    defaults={
        "dim": 64,
        "unimodal_depth": 1,
        "multimodal_depth": 1,
        "num_img_queries": 16,
        "dim_head": 16,
        "heads": 4,
        "caption_loss_weight": 2.0,  # the paper's, section 4.1
    },
    as_dict=True,
)
COMMANDS: dict[str, Command | Callable[..., int]] = {
    "train": Command(
        train,
        {
            "model": MODEL,
            "images": Group(EncoderSettings),
            "settings": Group(TrainingSettings),
            "reading": Group(load_images, skip=("source", "preprocessing", "progress"), as_dict=True),
        },
        TRAIN,
    ),
    "caption": caption,
    "embed": embed,
    "zero-shot": zero_shot,
    "retrieve": retrieve,
    "convert": convert,
}

_DESCRIPTION = "CoCa image-text models: train, caption, classify, retrieve."
build_parser = partial(command_parser, "coca", _DESCRIPTION, COMMANDS, package="coca")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status (see ``lm_core.cli.main``)."""
    return run_command(build_parser(), argv)
