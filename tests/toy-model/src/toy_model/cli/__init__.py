"""The command ``toy-model``."""

from collections.abc import Sequence
from typing import Literal

from lm_core.cli.corpus import TextCorpus
from lm_core.cli.main import report_run, run_command
from lm_core.cli.parser import Command, CommandParser, Group, command_parser
from lm_core.training.config import CommonSettings
from toy_model.model.bigram import ToyModel
from toy_model.training.trainer import ToyTrainer


def train(
    *,
    text: TextCorpus,
    settings: CommonSettings,
    batch_size: int = 4,
    checkpoint_dir: str = "runs/toy",
    resume: bool | Literal["auto"] = "auto",
) -> int:
    """Trains a bigram model on text."""
    encoder, corpus = text.load()
    trainer = ToyTrainer(
        ToyModel(encoder.vocab_size), corpus.train, settings, batch_size, checkpoint_dir=checkpoint_dir, resume=resume
    )
    return report_run("toy-model", trainer.train(), checkpoint_dir, max_steps=settings.max_steps)


def build_parser() -> CommandParser:
    """The parser of the whole command."""
    groups = {"text": Group(TextCorpus), "settings": Group(CommonSettings, defaults={"max_steps": 20})}
    return command_parser("toy-model", "A bigram model.", {"train": Command(train, groups)}, package="toy_model")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status."""
    return run_command(build_parser(), argv)
