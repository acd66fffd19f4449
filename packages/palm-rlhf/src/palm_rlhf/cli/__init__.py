"""The command ``palm-rlhf``: language models (``train`` ...) and reinforcement learning (``reward``, ``ppo`` ...)."""

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lm_core.cli.main import run_command, summary_of, taken_out
from lm_core.cli.text_generation import TextGeneration
from palm_rlhf.cli.commands import convert, evaluate_checkpoint, generate, train
from palm_rlhf.cli.policies import grpo, ppo
from palm_rlhf.cli.reward import reward
from palm_rlhf.cli.sample import sample
from palm_rlhf.model.palm import PaLM
from palm_rlhf.pretrain.config import TrainingSettings

if TYPE_CHECKING:
    from lm_core.cli.parser import CommandParser

# The quickstart's model: what two CPU cores can teach something in a minute and a half. Normalised queries and keys
# bear a higher learning rate (4e-3: 2.54 bits/byte after 480 updates; without them 3e-3 gave 2.62, and 6e-3 less).
QUICKSTART_MODEL = {"dim": 192, "depth": 4, "dim_head": 32, "heads": 6, "qk_rmsnorm": True}
QUICKSTART_TRAINING = {"max_steps": 440, "learning_rate": 4e-3}
# Arguments of PaLM that the commands settle themselves.
SETTLED = ("num_tokens", "causal", "lora_r", "finetune_scopes", "flash_attn", "cross_entropy_ignore_index")

TRAIN = """Pretrains a PaLM on text; without arguments, on Python's own library (a minute and a half on two CPU cores).

  palm-rlhf train                                          the quickstart, into runs/palm-quickstart
  palm-rlhf train --corpus texts.jsonl.gz --dim 512 --depth 8 --max_steps 20000 --checkpoint_dir runs/mine
  palm-rlhf train --print_config > run.yaml; palm-rlhf train --config run.yaml --seed 1
  torchrun --nproc_per_node 8 -m palm_rlhf train --fsdp --compile

Flags win over the YAML file, which wins over the defaults. Ctrl-C saves a checkpoint; the same command goes on from it,
as it does after a kill."""


COMMANDS: dict[str, Callable[..., int]] = {
    "eval": evaluate_checkpoint,
    "convert": convert,
    "reward": reward,
    "ppo": ppo,
    "grpo": grpo,
    "sample": sample,
}


def build_parser() -> "CommandParser":
    """The parser of the whole command."""
    from lm_core.cli.parser import CommandParser

    description = "PaLM language models: training, generation, and reinforcement learning from human feedback."
    parser = CommandParser(prog="palm-rlhf", description=description)
    training = parser.add_command("train", TRAIN)
    training.add_function(train, skip=("model", "settings"))
    training.add_class(PaLM, skip=SETTLED, defaults=QUICKSTART_MODEL)
    training.add_class(TrainingSettings, defaults=QUICKSTART_TRAINING)
    generation = parser.add_command("generate", summary_of(generate))
    generation.add_function(generate, skip=("settings",))
    generation.add_class(TextGeneration)
    for name, function in COMMANDS.items():
        parser.add_command(name, summary_of(function)).add_function(function)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status (see ``lm_core.cli.main``)."""
    return run_command(build_parser(), argv, {"train": _train, "generate": _generate, **COMMANDS}, package="palm_rlhf")


def _generate(**arguments: Any) -> int:
    return generate(settings=taken_out(arguments, TextGeneration), **arguments)


def _train(**arguments: Any) -> int:
    settings = taken_out(arguments, TrainingSettings)
    model = {name: arguments.pop(name) for name in inspect.signature(PaLM).parameters if name in arguments}
    return train(model=model, settings=settings, **arguments)
