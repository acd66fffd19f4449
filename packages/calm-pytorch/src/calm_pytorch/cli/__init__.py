"""The command ``calm-pytorch``: ``train``, ``generate``, ``eval`` and ``describe``."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from calm_pytorch.cli.commands import describe, evaluate_composition, generate
from calm_pytorch.cli.models import Models
from calm_pytorch.cli.train import train
from calm_pytorch.quickstart.quickstart import QuickstartSettings
from calm_pytorch.training.settings import FineTunerSettings
from lm_core.cli.main import run_command
from lm_core.cli.parser import Command, Group, command_parser
from lm_core.cli.text_generation import TextGeneration

TRAIN = """Composes frozen models; without arguments, the key-value arithmetic of the paper.

  calm-pytorch train                                     the quickstart, into runs/calm-quickstart
  calm-pytorch train --config run.yaml                   two models, named in the file
  calm-pytorch train --anchor big --augments small --data texts.jsonl --checkpoint_dir runs/mine

Flags win over the YAML file, which wins over the defaults. Ctrl-C saves a checkpoint, from which the same command
resumes."""


def _presets(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults of the quickstart, which runs where no anchor is named."""
    return asdict(QuickstartSettings()) if chosen["anchor"] is None else {}


COMMANDS = {
    "train": Command(
        train,
        {"composition": Group(Models), "settings": Group(FineTunerSettings), "quickstart": Group(QuickstartSettings)},
        TRAIN,
        _presets,
    ),
    "generate": Command(generate, {"composition": Group(Models), "settings": Group(TextGeneration)}),
    "eval": Command(evaluate_composition, {"composition": Group(Models)}),
    "describe": Command(describe, {"composition": Group(Models)}),
}

_DESCRIPTION = "Compose frozen language models: train, generate, eval, describe."
build_parser = partial(command_parser, "calm-pytorch", _DESCRIPTION, COMMANDS, package="calm_pytorch")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status (see ``lm_core.cli.main``)."""
    return run_command(build_parser(), argv)
