"""Command line ``spin-trainer`` with its commands."""

from collections.abc import Callable, Sequence
from functools import partial

from lm_core.cli.main import run_command
from lm_core.cli.parser import Command, Group, command_parser
from spin_trainer.cli.commands import Answering, evaluate_model, generate, prompts
from spin_trainer.cli.train import PolicyRun, dpo, self_reward, sft, train
from spin_trainer.quickstart.quickstart import DEFAULTS
from spin_trainer.training.config import SelfPlaySettings
from spin_trainer.training.dpo import DPOSettings
from spin_trainer.training.self_reward import SelfRewardingSettings
from spin_trainer.training.sft import SFTSettings

TRAIN = """Fine-tunes a language model by self-play; without --model, runs the quickstart (2 minutes on two CPU cores).

  spin-trainer train                                       the quickstart, into runs/spin-quickstart
  spin-trainer train --config run.yaml                     model, data and settings from a file
  spin-trainer train --model FOLDER --data sft.jsonl --max_seq_len 1024 --lora_r 16 --checkpoint_dir runs/mine
  torchrun --nproc_per_node 8 -m spin_trainer train --config run.yaml

Flags override the YAML file, which overrides the defaults; those of the quickstart are its own.
Ctrl-C saves a checkpoint; the same command resumes from it, as it does after a kill."""

DPO = """Trains a language model on pairs of a chosen and a rejected answer (DPO and its successors).

  spin-trainer dpo --model FOLDER --data pairs.jsonl --max_seq_len 1024 --lora_r 16 --learning_rate 5e-6
  spin-trainer dpo --model FOLDER --data pairs.jsonl --loss simpo --beta 2 --simpo_margin 1

Rows have the columns prompt, chosen and rejected, as texts or messages. The reference is the model at the start, or
--reference_model; its log-probabilities are computed once."""

SFT = """Fine-tunes a language model on prompts with answers; only answer tokens count.

  spin-trainer sft --model FOLDER --data sft.jsonl --max_seq_len 1024 --lora_r 16 --learning_rate 2e-4"""

SELF_REWARD = """Fine-tunes a language model on the best and the worst of its own answers (self-rewarding).

  spin-trainer self-reward --model FOLDER --data prompts.jsonl --max_seq_len 1024 --iterations 2 --lora_r 16
  spin-trainer self-reward --model FOLDER --data prompts.jsonl --reward module:function

Several answers to each prompt are drawn and rated by the model itself, or scored by a function in TRL's form; best and
worst are a pair for a preference loss. Rows have a prompt or messages; answers in them are left out."""


def _groups(settings: type, folder: str) -> dict[str, Group]:
    """Flags of a training command: the run, and its settings."""
    return {
        "run": Group(PolicyRun, defaults={"checkpoint_dir": folder}),
        "settings": Group(settings, defaults={"max_seq_len": Answering.max_seq_len}),
    }


COMMANDS: dict[str, Command | Callable[..., int]] = {
    "train": Command(
        train,
        _groups(SelfPlaySettings, "runs/spin"),
        TRAIN,
        lambda chosen: {**DEFAULTS, "checkpoint_dir": "runs/spin-quickstart"} if chosen["model"] is None else {},
    ),
    "dpo": Command(
        dpo,
        _groups(DPOSettings, "runs/dpo"),
        DPO,
    ),
    "sft": Command(
        sft,
        _groups(SFTSettings, "runs/sft"),
        SFT,
    ),
    "self-reward": Command(self_reward, _groups(SelfRewardingSettings, "runs/self-reward"), SELF_REWARD),
    "prompts": Command(prompts, {"answering": Group(Answering)}),
    "generate": Command(generate, {"answering": Group(Answering)}),
    "eval": Command(evaluate_model, {"answering": Group(Answering)}),
}

_DESCRIPTION = "Fine-tuning of causal language models: self-play (SPIN), preferences (DPO), supervised; evaluation."
build_parser = partial(command_parser, "spin-trainer", _DESCRIPTION, COMMANDS, package="spin_trainer")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status (see ``lm_core.cli.main``)."""
    return run_command(build_parser(), argv)
