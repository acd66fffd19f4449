"""The command ``palm-rlhf``: language models (``train`` ...) and reinforcement learning (``reward``, ``ppo`` ...)."""

from collections.abc import Callable, Sequence
from functools import partial

from lm_core.cli.main import run_command
from lm_core.cli.parser import Command, Group, command_parser
from lm_core.cli.text_generation import SamplingFlags, TextGeneration
from palm_rlhf.cli import reward, train
from palm_rlhf.cli.commands import convert, evaluate_model, generate, sample
from palm_rlhf.cli.rl import command_of
from palm_rlhf.rl.objectives import OBJECTIVES

COMMANDS: dict[str, Command | Callable[..., int]] = {
    "train": train.COMMAND,
    "generate": Command(generate, {"settings": Group(TextGeneration)}),
    "eval": evaluate_model,
    "convert": convert,
    "reward": reward.COMMAND,
    **{name: command_of(name) for name in OBJECTIVES},
    "sample": Command(sample, {"sampling": Group(SamplingFlags)}),
}

_DESCRIPTION = "PaLM language models: training, generation, and reinforcement learning from human feedback."
build_parser = partial(command_parser, "palm-rlhf", _DESCRIPTION, COMMANDS, package="palm_rlhf")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status (see ``lm_core.cli.main``)."""
    return run_command(build_parser(), argv)
