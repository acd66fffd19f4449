"""The command ``calm-pytorch``: ``train``, ``generate`` and ``describe``."""

from collections.abc import Callable, Sequence
from typing import Any

from calm_pytorch.cli.commands import describe, generate, settings_names, train
from calm_pytorch.quickstart.quickstart import QuickstartSettings
from lm_core.cli.main import run_command, summary_of

TRAIN = """Composes frozen models; without arguments, the key-value arithmetic of the paper.

  calm-pytorch train                                     the quickstart, into runs/calm-quickstart
  calm-pytorch train --config run.yaml                   two local folders, named in the file
  calm-pytorch train --anchor big --augments '[small]' --data texts.jsonl --checkpoint_dir runs/mine

Flags win over the YAML file, which wins over the defaults. Over named models Ctrl-C saves a checkpoint, from which the
same command goes on; the quickstart has one at its end."""
SHARED = ("max_steps", "batch_size", "learning_rate")  # the function has them, for the quickstart and for models
COMMANDS: dict[str, Callable[..., int]] = {"generate": generate, "describe": describe}


def build_parser() -> Any:
    """The parser of the whole command."""
    from lm_core.cli.parser import CommandParser

    parser = CommandParser(
        prog="calm-pytorch", description="Compose frozen language models: train, generate, describe."
    )
    training = parser.add_command("train", TRAIN)
    training.add_function(train, skip=("settings",))
    training.add_class(QuickstartSettings, skip=SHARED)
    for name, function in COMMANDS.items():
        parser.add_command(name, summary_of(function)).add_function(function)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status (see ``lm_core.cli.main``)."""
    return run_command(build_parser(), argv, {"train": _train, **COMMANDS}, package="calm_pytorch")


def _train(**arguments: Any) -> int:
    own = {name: arguments.pop(name) for name in settings_names() if name not in SHARED}
    if arguments["anchor"] is None:
        own |= {name: arguments[name] for name in SHARED if arguments[name] is not None}
    return train(settings=QuickstartSettings(**own), **arguments)
