"""The command ``toy-model``."""

from collections.abc import Sequence
from typing import Literal

from lm_core.checkpoints.checkpoint import checkpoint_folder
from lm_core.cli.corpus import TextCorpus
from lm_core.cli.main import report_run, run_command
from lm_core.cli.parser import Command, CommandParser, Group, command_parser, preset_name
from lm_core.training.config import CommonSettings
from toy_model.model.bigram import ToyModel
from toy_model.training.trainer import ToyTrainer

GROUPS = {"text": Group(TextCorpus), "settings": Group(CommonSettings)}


def train(
    *,
    text: TextCorpus,
    settings: CommonSettings,
    model: str | None = None,
    batch_size: int = 4,
    checkpoint_dir: str = "runs/toy",
    resume: bool | Literal["auto"] = "auto",
    trackers: list[str] | None = None,
) -> int:
    """Trains a bigram model on text."""
    encoder, corpus = text.load()
    bigram = ToyModel(encoder.vocab_size) if model is None else ToyModel.from_pretrained(checkpoint_folder(model))
    run = {"checkpoint_dir": checkpoint_dir, "resume": resume, "trackers": trackers or ()}
    trainer = ToyTrainer(bigram, corpus.train, settings, batch_size, **run)
    return report_run("toy-model", trainer.train(), checkpoint_dir, max_steps=settings.max_steps)


def build_parser() -> CommandParser:
    """The parser of the whole command."""
    steps = {"quickstart": {"max_steps": 20}}
    command = Command(train, GROUPS, presets=lambda chosen: steps.get(preset_name(chosen, "data", "model"), {}))
    return command_parser("toy-model", "A bigram model.", {"train": command}, package="toy_model")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status."""
    return run_command(build_parser(), argv)
