"""The command ``palm-rlhf``: language models (``train`` ...) and reinforcement learning (``reward``, ``ppo`` ...)."""

import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import lm_core
from palm_rlhf.cli.commands import INTERRUPTED, command_line, convert, evaluate_checkpoint, generate, train
from palm_rlhf.cli.policies import grpo, ppo
from palm_rlhf.cli.reward import reward
from palm_rlhf.cli.sample import sample
from palm_rlhf.palm import PaLM
from palm_rlhf.training_settings import TrainingSettings

if TYPE_CHECKING:
    from lm_core.command_parser import CommandParser

# The quickstart's model: what two CPU cores can teach something in about two minutes.
QUICKSTART_MODEL = {"dim": 192, "depth": 4, "dim_head": 32, "heads": 6}
# Arguments of PaLM that the commands settle themselves.
SETTLED = ("num_tokens", "causal", "lora_r", "finetune_scopes", "flash_attn", "cross_entropy_ignore_index")

TRAIN = """Pretrains a PaLM on text; without arguments, on Python's own library (about two minutes on two CPU cores).

  palm-rlhf train                                          the quickstart, into runs/palm-quickstart
  palm-rlhf train --corpus texts.jsonl.gz --dim 512 --depth 8 --max_steps 20000 --checkpoint_dir runs/mine
  palm-rlhf train --print_config > run.yaml; palm-rlhf train --config run.yaml --seed 1
  torchrun --nproc_per_node 8 -m palm_rlhf train --fsdp --compile

Flags win over the YAML file, which wins over the defaults. Ctrl-C saves a checkpoint; the same command goes on from it,
as it does after a kill."""


COMMANDS: dict[str, Callable[..., int]] = {
    "generate": generate,
    "eval": evaluate_checkpoint,
    "convert": convert,
    "reward": reward,
    "ppo": ppo,
    "grpo": grpo,
    "sample": sample,
}


def build_parser() -> "CommandParser":
    """The parser of the whole command."""
    from lm_core.command_parser import CommandParser

    description = "PaLM language models: training, generation, and reinforcement learning from human feedback."
    parser = CommandParser(prog="palm-rlhf", description=description)
    training = parser.add_command("train", TRAIN)
    training.add_function(train, skip=("model", "settings"))
    training.add_class(PaLM, skip=SETTLED, defaults=QUICKSTART_MODEL)
    training.add_class(TrainingSettings)
    for name, function in COMMANDS.items():
        parser.add_command(name, (function.__doc__ or "").split("\n", 1)[0]).add_function(function)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status, 1 for an error that is the input's, 130 after Ctrl-C."""
    chosen = build_parser().parse(sys.argv[1:] if argv is None else list(argv))
    arguments = {name: value for name, value in chosen[chosen.command].items() if name != "config"}
    try:
        if chosen.command == "train":
            settings = {one.name: arguments.pop(one.name) for one in fields(TrainingSettings)}
            model = {name: arguments.pop(name) for name in inspect.signature(PaLM).parameters if name in arguments}
            return train(model=model, settings=TrainingSettings(**settings), **arguments)
        return COMMANDS[chosen.command](**arguments)
    except Exception as error:
        if not _is_expected(error):
            raise
        print(f"palm-rlhf {chosen.command}: error: {error}", file=sys.stderr)
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
    return Path(raised_in).is_relative_to(Path(__file__).parents[1]) or Path(raised_in).is_relative_to(
        Path(lm_core.__file__).parent
    )
