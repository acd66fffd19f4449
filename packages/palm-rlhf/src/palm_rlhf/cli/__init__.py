"""The command ``palm-rlhf``: language models (``train`` ...) and reinforcement learning (``reward``, ``ppo`` ...)."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from lm_core.cli.main import run_command
from lm_core.cli.parser import Command, CommandParser, Group, command_parser
from lm_core.cli.text_generation import SamplingFlags, TextGeneration
from palm_rlhf.cli import reward, train
from palm_rlhf.cli.commands import convert, evaluate_model, generate, sample
from palm_rlhf.cli.rl import command_of
from palm_rlhf.rl.objectives import OBJECTIVES

# Objectives with a command of their own; `rl` has them all.
FAMILIAR = ("ppo", "grpo", "rloo", "reinforce")
COMMANDS: dict[str, Command | Callable[..., int]] = {
    "train": train.COMMAND,
    "generate": Command(generate, {"settings": Group(TextGeneration)}),
    "eval": evaluate_model,
    "convert": convert,
    "reward": reward.COMMAND,
    "rl": command_of("grpo"),
    **{name: command_of(name) for name in FAMILIAR},
    "sample": Command(sample, {"sampling": Group(SamplingFlags)}),
}

_DESCRIPTION = "PaLM language models: training, generation, and reinforcement learning from human feedback."


def build_parser(argv: Sequence[str] = ()) -> CommandParser:
    """The parser of all commands; a command that trains a policy has the flags of the objective that ``argv`` names."""
    commands = dict(COMMANDS)
    objective = _objective_of(argv)
    if objective in OBJECTIVES and argv[0] in ("rl", *FAMILIAR):
        commands[argv[0]] = command_of(objective)
    return command_parser("palm-rlhf", _DESCRIPTION, commands, package="palm_rlhf")


def _objective_of(argv: Sequence[str]) -> str:
    """The value of ``--objective``, of the command line or of its configuration file; "" without one."""
    values = {"--objective": "", "--config": ""}
    for index, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name in values:
            values[name] = value if equals else "".join(argv[index + 1 : index + 2])
    if not values["--objective"] and Path(values["--config"]).is_file():
        try:
            settings = yaml.safe_load(Path(values["--config"]).read_text("utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            return ""  # the parser explains what is wrong
        return str(settings.get("objective") or "") if isinstance(settings, dict) else ""
    return values["--objective"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status (see ``lm_core.cli.main``)."""
    return run_command(build_parser(sys.argv[1:] if argv is None else argv), argv)
