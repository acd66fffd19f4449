"""Command line ``spin-trainer`` with the commands ``train``, ``generate`` and ``eval``."""

from collections.abc import Callable, Sequence
from functools import partial

from lm_core.cli.main import run_command
from lm_core.cli.parser import Command, Group, command_parser
from spin_trainer.cli.commands import Answering, evaluate_model, generate
from spin_trainer.cli.train import train
from spin_trainer.quickstart.quickstart import DEFAULTS
from spin_trainer.training.config import SelfPlaySettings

TRAIN = """Fine-tunes a language model by self-play; without --model, runs the quickstart (2 minutes on two CPU cores).

  spin-trainer train                                       the quickstart, into runs/spin-quickstart
  spin-trainer train --config run.yaml                     model, data and settings from a file
  spin-trainer train --model FOLDER --data sft.jsonl --max_seq_len 1024 --lora_r 16 --checkpoint_dir runs/mine
  torchrun --nproc_per_node 8 -m spin_trainer train --config run.yaml

Flags override the YAML file, which overrides the defaults; those of the quickstart are its own.
Ctrl-C saves a checkpoint; the same command resumes from it, as it does after a kill."""

COMMANDS: dict[str, Command | Callable[..., int]] = {
    "train": Command(
        train,
        {"settings": Group(SelfPlaySettings, defaults={"max_seq_len": Answering.max_seq_len})},
        TRAIN,
        lambda chosen: {**DEFAULTS, "checkpoint_dir": "runs/spin-quickstart"} if chosen["model"] is None else {},
    ),
    "generate": Command(generate, {"answering": Group(Answering)}),
    "eval": Command(evaluate_model, {"answering": Group(Answering)}),
}

_DESCRIPTION = "Self-play fine-tuning (SPIN) of causal language models: train, generate answers, evaluate."
build_parser = partial(command_parser, "spin-trainer", _DESCRIPTION, COMMANDS, package="spin_trainer")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status (see ``lm_core.cli.main``)."""
    return run_command(build_parser(), argv)
