"""The command ``memorizing-transformer``: ``train``, ``generate``, ``eval``, ``inspect`` and ``convert``."""

import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import lm_core
from memorizing_transformer.commands import (
    INTERRUPTED,
    command_line,
    convert,
    evaluate_checkpoint,
    generate,
    inspect_checkpoint,
    train,
)
from memorizing_transformer.training_settings import TrainingSettings
from memorizing_transformer.transformer import MemorizingTransformer

if TYPE_CHECKING:
    from lm_core.command_parser import CommandParser

# The quickstart's model: what two CPU cores can teach something in about two minutes.
QUICKSTART_MODEL = {
    "dim": 128,
    "depth": 3,
    "dim_head": 32,
    "heads": 4,
    "memorizing_layers": 2,
    "max_knn_memories": 8192,
    "xl_max_memories": 128,
    "segment_length": 128,
}
# Arguments of the model that the commands settle themselves.
SETTLED = ("num_tokens", "clear_memories_on_eos_token_id", "knn_memory_multiprocessing", "cross_entropy_ignore_index")

TRAIN = """Trains a Memorizing Transformer on documents in order.

Without arguments, on Python's own library (about two minutes on two CPU cores).

  memorizing-transformer train                                          the quickstart, into runs/memorizing-quickstart
  memorizing-transformer train --corpus texts.jsonl.gz --dim 512 --depth 8 --max_steps 20000 --checkpoint_dir runs/mine
  memorizing-transformer train --print_config > run.yaml; memorizing-transformer train --config run.yaml --seed 1
  torchrun --nproc_per_node 8 -m memorizing_transformer train

Flags win over the YAML file, which wins over the defaults. Ctrl-C saves a checkpoint; the same command goes on from it,
as it does after a kill."""


COMMANDS: dict[str, Callable[..., int]] = {
    "generate": generate,
    "eval": evaluate_checkpoint,
    "inspect": inspect_checkpoint,
    "convert": convert,
}


def build_parser() -> "CommandParser":
    """The parser of the whole command."""
    from lm_core.command_parser import CommandParser

    parser = CommandParser(prog="memorizing-transformer", description="Language models with a kNN memory.")
    training = parser.add_command("train", TRAIN)
    training.add_function(train, skip=("model", "settings"))
    training.add_class(MemorizingTransformer, skip=SETTLED, defaults=QUICKSTART_MODEL)
    training.add_class(TrainingSettings, skip=("segment_length",))  # the model has it
    for name, function in COMMANDS.items():
        parser.add_command(name, (function.__doc__ or "").split("\n", 1)[0]).add_function(function)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status, 1 for an error that is the input's, 130 after Ctrl-C."""
    chosen = build_parser().parse(sys.argv[1:] if argv is None else list(argv))
    arguments = {name: value for name, value in chosen[chosen.command].items() if name != "config"}
    try:
        if chosen.command == "train":
            names = inspect.signature(MemorizingTransformer).parameters
            model = {name: arguments.pop(name) for name in names if name in arguments}
            settings = {one.name: arguments.pop(one.name) for one in fields(TrainingSettings) if one.name in arguments}
            settings["segment_length"] = model["segment_length"]
            return train(model=model, settings=TrainingSettings(**settings), **arguments)
        return COMMANDS[chosen.command](**arguments)
    except Exception as error:
        if not _is_expected(error):
            raise
        print(f"memorizing-transformer {chosen.command}: error: {error}", file=sys.stderr)
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
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    return Path(raised_in).is_relative_to(Path(__file__).parent) or Path(raised_in).is_relative_to(
        Path(lm_core.__file__).parent
    )
