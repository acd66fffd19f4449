"""The command ``spin-trainer``: ``train``, ``generate`` and ``eval``."""

import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import lm_core
from spin_trainer.cli.commands import INTERRUPTED, command_line, evaluate_model, generate, train
from spin_trainer.cli.quickstart import DEFAULTS
from spin_trainer.self_play_settings import SelfPlaySettings

if TYPE_CHECKING:
    from lm_core.command_parser import CommandParser

TRAIN = """Fine-tunes a language model by self-play; without a model, a small one on a toy (two minutes on two cores).

  spin-trainer train                                       the quickstart, into runs/spin-quickstart
  spin-trainer train --config run.yaml                     model, data and settings from a file
  spin-trainer train --model FOLDER --data sft.jsonl --max_seq_len 1024 --lora_r 16 --checkpoint_dir runs/mine
  torchrun --nproc_per_node 8 -m spin_trainer train --config run.yaml

The quickstart has values of its own for what is not given. Flags win over the YAML file, which wins over the defaults.
Ctrl-C saves a checkpoint; the same command goes on from it, as it does after a kill."""

MAX_SEQ_LEN = 512
COMMANDS: dict[str, Callable[..., int]] = {"generate": generate, "eval": evaluate_model}


def build_parser() -> "CommandParser":
    """The parser of the whole command."""
    from lm_core.command_parser import CommandParser

    parser = CommandParser(prog="spin-trainer", description="Self-play fine-tuning: train, generate, eval.")
    training = parser.add_command("train", TRAIN)
    training.add_function(train, skip=("settings",))
    training.add_class(SelfPlaySettings, defaults={"max_seq_len": MAX_SEQ_LEN})
    for name, function in COMMANDS.items():
        parser.add_command(name, (function.__doc__ or "").split("\n", 1)[0]).add_function(function)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status, 1 for an error that is the input's, 130 after Ctrl-C."""
    chosen = build_parser().parse(sys.argv[1:] if argv is None else list(argv))
    arguments = {name: value for name, value in chosen[chosen.command].items() if name != "config"}
    try:
        if chosen.command == "train":
            settings = {one.name: arguments.pop(one.name) for one in fields(SelfPlaySettings)}
            if arguments["model"] is None:
                usual = {"max_seq_len": MAX_SEQ_LEN, **{one.name: one.default for one in fields(SelfPlaySettings)[1:]}}
                settings |= {name: value for name, value in DEFAULTS.items() if settings[name] == usual[name]}
            return train(settings=SelfPlaySettings(**settings), **arguments)
        return COMMANDS[chosen.command](**arguments)
    except Exception as error:
        if not _is_expected(error):
            raise
        print(f"spin-trainer {chosen.command}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nStopped at once. A run goes on from its newest checkpoint:\n  {command_line()}", file=sys.stderr)
        return INTERRUPTED
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _is_expected(error: Exception) -> bool:
    """Whether the message says all: the system's own errors, and those that our code raises."""
    if isinstance(error, OSError | ImportError):
        return True
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return raised_in.is_relative_to(Path(__file__).parents[1]) or raised_in.is_relative_to(
        Path(lm_core.__file__).parent
    )
