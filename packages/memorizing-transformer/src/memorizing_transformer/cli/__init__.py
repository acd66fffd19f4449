"""The command ``memorizing-transformer``: ``train``, ``generate``, ``eval``, ``inspect`` and ``convert``."""

from collections.abc import Callable, Sequence
from functools import partial

from lm_core.cli.corpus import TextCorpus
from lm_core.cli.main import run_command
from lm_core.cli.parser import Command, Group, command_parser
from lm_core.cli.text_generation import TextGeneration
from memorizing_transformer.cli.commands import convert, evaluate_checkpoint, generate, inspect_checkpoint
from memorizing_transformer.cli.train import train
from memorizing_transformer.model.transformer import MemorizingTransformer
from memorizing_transformer.training.config import TrainingSettings

# The quickstart's model, which learns something in about two minutes on two CPU cores.
QUICKSTART_MODEL = {
    "dim": 128,
    "depth": 3,
    "dim_head": 32,
    "heads": 4,
    "knn_attn_heads": 2,
    "memorizing_layers": 2,
    "max_knn_memories": 8192,
    "xl_max_memories": 64,
    "segment_length": 64,
}
# Arguments of the model that the commands set themselves.
SETTLED = ("num_tokens", "clear_memories_on_eos_token_id", "knn_memory_multiprocessing", "cross_entropy_ignore_index")

TRAIN = """Trains a Memorizing Transformer on documents in order.

Without arguments, it trains on Python's standard library (about two minutes on two CPU cores).

  memorizing-transformer train                                          the quickstart, into runs/memorizing-quickstart
  memorizing-transformer train --data texts.jsonl.gz --dim 512 --depth 8 --max_steps 20000 --checkpoint_dir runs/mine
  memorizing-transformer train --print_config > run.yaml; memorizing-transformer train --config run.yaml --seed 1
  torchrun --nproc_per_node 8 -m memorizing_transformer train

Flags win over the YAML file, which wins over the defaults. After Ctrl-C or a kill, the same command resumes."""


COMMANDS: dict[str, Command | Callable[..., int]] = {
    "train": Command(
        train,
        {
            "text": Group(TextCorpus),
            "model": Group(MemorizingTransformer, skip=SETTLED, defaults=QUICKSTART_MODEL, as_dict=True),
            "settings": Group(TrainingSettings),  # segment_length is the model's
        },
        TRAIN,
    ),
    "generate": Command(generate, {"settings": Group(TextGeneration)}),
    "eval": evaluate_checkpoint,
    "inspect": inspect_checkpoint,
    "convert": convert,
}

_TITLE = "Language models with a kNN memory."
build_parser = partial(command_parser, "memorizing-transformer", _TITLE, COMMANDS, package="memorizing_transformer")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status (see ``lm_core.cli.main``)."""
    return run_command(build_parser(), argv)
