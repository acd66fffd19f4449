"""The command ``calm-pytorch``: ``train``, ``generate`` and ``describe``."""

import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import lm_core
from calm_pytorch.cli.commands import INTERRUPTED, describe, generate, settings_names, train
from calm_pytorch.quickstart import QuickstartSettings

TRAIN = """Composes frozen models; without arguments, the key-value arithmetic of the paper.

  calm-pytorch train                                     the quickstart, into runs/calm-quickstart
  calm-pytorch train --config run.yaml                   two local folders, named in the file
  calm-pytorch train --anchor big --augments '[small]' --data texts.jsonl --checkpoint_dir runs/mine

Flags win over the YAML file, which wins over the defaults. Ctrl-C saves a checkpoint; the same command goes on."""
COMMANDS: dict[str, Callable[..., int]] = {"generate": generate, "describe": describe}


def build_parser() -> Any:
    """The parser of the whole command."""
    from lm_core.command_parser import CommandParser

    parser = CommandParser(
        prog="calm-pytorch", description="Compose frozen language models: train, generate, describe."
    )
    training = parser.add_command("train", TRAIN)
    training.add_function(train, skip=("settings",))
    training.add_class(QuickstartSettings)
    for name, function in COMMANDS.items():
        parser.add_command(name, (function.__doc__ or "").split("\n", 1)[0]).add_function(function)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status, 1 for an error that is the input's, 130 after Ctrl-C."""
    chosen = build_parser().parse(sys.argv[1:] if argv is None else list(argv))
    arguments = {name: value for name, value in chosen[chosen.command].items() if name != "config"}
    try:
        if chosen.command == "train":
            settings = QuickstartSettings(**{name: arguments.pop(name) for name in settings_names()})
            return train(settings=settings, **arguments)
        return COMMANDS[chosen.command](**arguments)
    except Exception as error:
        if not _is_expected(error):
            raise
        print(f"calm-pytorch {chosen.command}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped at once. The same command goes on from the newest checkpoint.", file=sys.stderr)
        return INTERRUPTED
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _is_expected(error: Exception) -> bool:
    """Whether the message says all: the system's own errors, and those that our code raises."""
    if isinstance(error, (OSError, ImportError)):
        return True
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return any(
        raised_in.is_relative_to(folder) for folder in (Path(__file__).parents[1], Path(lm_core.__file__).parent)
    )
