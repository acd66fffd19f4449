"""The command ``palm-rlhf``: language models (``train`` ...) and reinforcement learning (``reward``, ``ppo`` ...)."""

from collections.abc import Callable, Sequence
from functools import partial

from lm_core.cli.corpus import TextCorpus
from lm_core.cli.main import run_command
from lm_core.cli.parser import Command, Group, command_parser
from lm_core.cli.text_generation import TextGeneration
from palm_rlhf.cli import reward
from palm_rlhf.cli.commands import convert, evaluate_checkpoint, generate, sample
from palm_rlhf.cli.rl import command_of
from palm_rlhf.cli.train import train
from palm_rlhf.model.palm import PaLM
from palm_rlhf.pretrain.config import TrainingSettings
from palm_rlhf.rl.objectives import OBJECTIVES

# The quickstart's model, sized for a minute and a half on two CPU cores. Normalised queries and keys allow a higher
# learning rate: 4e-3 reached 2.54 bits/byte after 480 updates, 3e-3 without them 2.62.
QUICKSTART_MODEL = {"dim": 192, "depth": 4, "dim_head": 32, "heads": 6, "qk_rmsnorm": True}
QUICKSTART_TRAINING = {"max_steps": 440, "learning_rate": 4e-3}
# Arguments of PaLM that the commands set themselves.
SETTLED = ("num_tokens", "causal", "lora_r", "finetune_scopes", "flash_attn", "cross_entropy_ignore_index")

TRAIN = """Pretrains a PaLM on text; without arguments, on Python's own library (a minute and a half on two CPU cores).

  palm-rlhf train                                          the quickstart, into runs/palm-quickstart
  palm-rlhf train --data texts.jsonl.gz --dim 512 --depth 8 --max_steps 20000 --checkpoint_dir runs/mine
  palm-rlhf train --print_config > run.yaml; palm-rlhf train --config run.yaml --seed 1
  torchrun --nproc_per_node 8 -m palm_rlhf train --fsdp --compile

Flags win over the YAML file, which wins over the defaults. Ctrl-C saves a checkpoint; the same command resumes from it,
as it does after a kill."""

COMMANDS: dict[str, Command | Callable[..., int]] = {
    "train": Command(
        train,
        {
            "text": Group(TextCorpus),
            "model": Group(PaLM, skip=SETTLED, defaults=QUICKSTART_MODEL, as_dict=True),
            "settings": Group(TrainingSettings, defaults=QUICKSTART_TRAINING),
        },
        TRAIN,
    ),
    "generate": Command(generate, {"settings": Group(TextGeneration)}),
    "eval": evaluate_checkpoint,
    "convert": convert,
    "reward": reward.COMMAND,
    **{name: command_of(name) for name in OBJECTIVES},
    "sample": sample,
}

_DESCRIPTION = "PaLM language models: training, generation, and reinforcement learning from human feedback."
build_parser = partial(command_parser, "palm-rlhf", _DESCRIPTION, COMMANDS, package="palm_rlhf")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status (see ``lm_core.cli.main``)."""
    return run_command(build_parser(), argv)
