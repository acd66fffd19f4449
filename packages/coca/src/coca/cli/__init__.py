"""The command ``coca``: ``train``, ``caption``, ``embed``, ``zero-shot``, ``retrieve``, ``convert`` and ``export``."""

from collections.abc import Callable, Sequence
from functools import partial

from coca.cli.commands import Captioning, caption, convert, embed, export, retrieve, zero_shot
from coca.cli.presets import PRESETS, presets
from coca.cli.train import EncoderSettings, train
from coca.data.image_files import load_images
from coca.model.coca import CoCa
from coca.training.config import TrainingSettings
from lm_core.cli.main import run_command
from lm_core.cli.parser import Command, Group, command_parser

TRAIN = """Trains a CoCa on images with captions, by default on handwritten digits (under 90 s on two CPU cores).

  coca train                                               the quickstart, into runs/coca-quickstart
  coca train --data coco/captions.csv --tokenizer openai/clip-vit-base-patch32 --checkpoint_dir runs/coco
  coca train --data coco/captions.csv --tokenizer openai/clip-vit-base-patch32 --max_steps 20000 \\
      --encoder openai/clip-vit-base-patch32 --freeze_encoder --checkpoint_dir runs/frozen
  torchrun --nproc_per_node 8 -m coca train --data "cc3m/{00000..00331}.tar" --preset base --batch_size 4096 \\
      --tokenizer openai/clip-vit-base-patch32 --max_steps 20000 --compile --checkpoint_dir runs/cc3m
  coca train --model runs/cc3m --data coco/captions.csv --max_steps 2000 --checkpoint_dir runs/tuned
  coca train --print_config > run.yaml; coca train --config run.yaml --seed 1

A preset has the sizes of a new model and the settings that fit them: quickstart without data, else small, or base,
large and 2b (CoCa's paper, table 1). Flags win over the YAML file, which wins over the preset. Ctrl-C saves a
checkpoint; the same command resumes from it, as it does after a kill."""

# Flags of the model, without what tokenizer and encoder determine.
SIZES = Group(
    CoCa,
    skip=(
        *("num_tokens", "image_dim", "img_encoder", "freeze_img_encoder", "pad_id", "bos_id", "eos_id"),
        # of models with open_clip's layers, which are not trained from scratch by the command
        *("block", "max_text_length", "pool_heads", "activation", "legacy_cls_mask"),
    ),
    defaults={name: PRESETS["small"][name] for name in ("dim", "unimodal_depth", "multimodal_depth")},
    as_dict=True,
)
READING = Group(load_images, skip=("source", "preprocessing", "progress"), as_dict=True)
COMMANDS: dict[str, Command | Callable[..., int]] = {
    "train": Command(
        train,
        {
            "sizes": SIZES,
            "images": Group(EncoderSettings),
            "settings": Group(TrainingSettings),
            "reading": READING,
        },
        TRAIN,
        presets,
    ),
    "caption": Command(caption, {"settings": Group(Captioning)}),
    "embed": embed,
    "zero-shot": zero_shot,
    "retrieve": Command(retrieve, {"reading": READING}),
    "convert": convert,
    "export": export,
}

_DESCRIPTION = "CoCa image-text models: train, caption, classify, retrieve."
build_parser = partial(command_parser, "coca", _DESCRIPTION, COMMANDS, package="coca")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status (see ``lm_core.cli.main``)."""
    return run_command(build_parser(), argv)
