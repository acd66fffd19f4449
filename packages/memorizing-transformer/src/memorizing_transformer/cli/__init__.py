"""The command ``memorizing-transformer``: train, generate, eval, datastore, inspect and convert."""

from collections.abc import Callable, Sequence
from functools import partial

from lm_core.cli.corpus import TextCorpus
from lm_core.cli.main import run_command
from lm_core.cli.parser import Command, Group, command_parser
from lm_core.cli.text_generation import TextGeneration
from memorizing_transformer.cli.commands import (
    convert,
    evaluate_checkpoint,
    generate,
    inspect_checkpoint,
    make_datastore,
)
from memorizing_transformer.cli.presets import REQUIRED, train_presets
from memorizing_transformer.cli.train import train
from memorizing_transformer.model.transformer import MemorizingTransformer
from memorizing_transformer.training.config import TrainingSettings

# Arguments of the model that the commands set themselves.
SETTLED = ("num_tokens", "clear_memories_on_eos_token_id", "knn_memory_multiprocessing", "cross_entropy_ignore_index")

TRAIN = """Trains a Memorizing Transformer on documents in order.

Without arguments, it trains a small model on Python's standard library (about two minutes on two CPU cores).

  memorizing-transformer train                                   the quickstart, into runs/memorizing-quickstart
  memorizing-transformer train --data books/ --tokenizer openai-community/gpt2 --checkpoint_dir runs/books
  torchrun --nproc_per_node 8 -m memorizing_transformer train --preset paper --data books/ --checkpoint_dir runs/paper
  memorizing-transformer train --model runs/books --data more/ --max_knn_memories 65536 --checkpoint_dir runs/more
  memorizing-transformer train --print_config > run.yaml; memorizing-transformer train --config run.yaml --seed 1

Flags win over the YAML file, which wins over the preset. After Ctrl-C or a kill, the same command resumes."""


COMMANDS: dict[str, Command | Callable[..., int]] = {
    "train": Command(
        train,
        {
            "text": Group(TextCorpus),
            "architecture": Group(MemorizingTransformer, skip=SETTLED, defaults=REQUIRED, as_dict=True),
            "settings": Group(TrainingSettings),  # segment_length is the model's
        },
        TRAIN,
        train_presets,
    ),
    "generate": Command(generate, {"settings": Group(TextGeneration)}),
    "eval": evaluate_checkpoint,
    "datastore": make_datastore,
    "inspect": Command(inspect_checkpoint, {"settings": Group(TextGeneration, skip=("num_samples", "progress"))}),
    "convert": convert,
}

_TITLE = "Language models with a kNN memory."
build_parser = partial(command_parser, "memorizing-transformer", _TITLE, COMMANDS, package="memorizing_transformer")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status (see ``lm_core.cli.main``)."""
    return run_command(build_parser(), argv)
