"""The command ``spin-trainer``: ``train``, ``generate`` and ``eval``."""

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lm_core.cli.main import run_command, summary_of, taken_out
from spin_trainer.cli.commands import evaluate_model, generate, train
from spin_trainer.quickstart.quickstart import DEFAULTS
from spin_trainer.training.config import SelfPlaySettings

if TYPE_CHECKING:
    from lm_core.cli.parser import CommandParser

TRAIN = """Fine-tunes a language model by self-play; without a model, a small one on a toy (two minutes on two cores).

  spin-trainer train                                       the quickstart, into runs/spin-quickstart
  spin-trainer train --config run.yaml                     model, data and settings from a file
  spin-trainer train --model FOLDER --data sft.jsonl --max_seq_len 1024 --lora_r 16 --checkpoint_dir runs/mine
  torchrun --nproc_per_node 8 -m spin_trainer train --config run.yaml

The quickstart has values of its own for what is not given. Flags win over the YAML file, which wins over the defaults.
Ctrl-C saves a checkpoint; the same command goes on from it, as it does after a kill."""

MAX_SEQ_LEN = 512
COMMANDS: dict[str, Callable[..., int]] = {"generate": generate, "eval": evaluate_model}


def build_parser(**settings: Any) -> "CommandParser":
    """The parser of the whole command, with other defaults for these settings."""
    from lm_core.cli.parser import CommandParser

    parser = CommandParser(prog="spin-trainer", description="Self-play fine-tuning: train, generate, eval.")
    training = parser.add_command("train", TRAIN)
    training.add_function(train, skip=("settings",))
    training.add_class(SelfPlaySettings, defaults={"max_seq_len": MAX_SEQ_LEN, **settings})
    for name, function in COMMANDS.items():
        parser.add_command(name, summary_of(function)).add_function(function)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status (see ``lm_core.cli.main``)."""
    given = sys.argv[1:] if argv is None else list(argv)
    parser = build_parser()
    chosen = parser.parse(given)
    if chosen.command == "train" and chosen.train.model is None:
        parser = build_parser(**DEFAULTS)
    return run_command(parser, given, {"train": _train, **COMMANDS}, package="spin_trainer")


def _train(**arguments: Any) -> int:
    settings = taken_out(arguments, SelfPlaySettings)
    return train(settings=settings, **arguments)
