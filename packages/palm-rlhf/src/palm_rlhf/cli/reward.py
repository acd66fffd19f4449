"""The command ``reward``: trains a reward model on preferences or labels."""

from typing import Any, Literal

import torch

from lm_core.checkpoints.checkpoint import checkpoint_folder
from lm_core.cli.main import report, report_run
from lm_core.cli.parser import Command, Group
from lm_core.data.corpora import load_corpus
from lm_core.tokenizers import load_tokenizer
from lm_core.training.run_directory import Result
from palm_rlhf.cli.sources import BASE, REWARD
from palm_rlhf.data.corrupted_pairs import corrupted_pairs
from palm_rlhf.model.palm import PaLM
from palm_rlhf.reward.model import RewardModel
from palm_rlhf.reward.trainer import RewardModelTrainer, RewardSettings


def reward(
    *,
    model: dict[str, Any],
    settings: RewardSettings,
    checkpoint: str = BASE,
    pairs: str = "stdlib",
    validation_pairs: str | None = None,
    tokenizer: str | None = None,
    stdlib_pairs: int = 1600,
    checkpoint_dir: str = REWARD,
    resume: bool | Literal["auto"] = "auto",
    trackers: list[str] | None = None,
) -> int:
    """Trains a reward model on pairs; by default, real continuations of Python source against corrupted ones.

    Args:
        model: arguments of ``RewardModel``.
        settings: optimizer, batches, logging and checkpoints.
        checkpoint: folder of a PaLM or of the run that trained it.
        pairs: "stdlib", or rows (a file, a folder, a glob) with prompt, chosen, rejected (and margin), or with prompt,
            response, label.
        validation_pairs: held-out rows of the same form; by default a tenth of the pairs.
        tokenizer: tokenizer to use instead of the one in the checkpoint.
        stdlib_pairs: number of pairs cut from Python's library.
        checkpoint_dir: folder of the run.
        resume: auto resumes if the folder has a checkpoint, true demands one, false demands a folder without a run.
        trackers: names of trackers that accelerate knows, such as tensorboard.
    """
    folder = checkpoint_folder(checkpoint)
    encoder = load_tokenizer(tokenizer or folder)
    # pairs from Python's library, or the user's rows
    examples: Any = pairs
    held_out: Any = validation_pairs
    if pairs == "stdlib":
        corpus = load_corpus("stdlib", tokenizer=encoder)
        examples = corrupted_pairs(corpus.train, count=stdlib_pairs, seed=0)
        held_out = held_out or corrupted_pairs(corpus.validation, count=256, seed=1)
    torch.manual_seed(settings.seed)
    trainer = RewardModelTrainer(
        reward_model=RewardModel(PaLM.from_pretrained(folder), **model),
        pairs=examples,
        validation_pairs=held_out,
        tokenizer=encoder,
        checkpoint_dir=checkpoint_dir,
        resume=resume,
        trackers=trackers or (),
        settings=settings,
    )
    # train, then report the accuracy on held-out pairs
    report("model", f"reward model on {folder}")
    report("pairs", f"{len(trainer.examples)} to learn from, {len(trainer.held_out)} held out")
    result = trainer.train()
    first, last = result.first_accuracy, result.last_accuracy
    return report_run(
        "palm-rlhf",
        result,
        checkpoint_dir,
        max_steps=settings.max_steps,
        lines=[("held out", f"accuracy {first:.3f} before training, {last:.3f} now")],
        results=[Result("held-out accuracy of the reward", last, first, "higher")],
    )


MODEL = Group(RewardModel, skip=("palm", "reward_lora_scope"), defaults={"dropout": 0.05}, as_dict=True)
SETTINGS = Group(
    RewardSettings, skip=("precision",), defaults={"max_steps": 80, "learning_rate": 3e-3, "validate_every": 80}
)
COMMAND = Command(reward, {"model": MODEL, "settings": SETTINGS})
