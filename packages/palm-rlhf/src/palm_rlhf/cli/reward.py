"""The command ``reward``: a reward model on preferences or labels."""

from typing import Any, Literal

import torch

from lm_core.checkpoints.checkpoint import checkpoint_folder
from lm_core.cli.main import report, report_run
from lm_core.data.corpora import load_corpus
from lm_core.tokenizers import load_tokenizer
from lm_core.training.run_directory import Result
from palm_rlhf.cli.sources import BASE, REWARD
from palm_rlhf.model.palm import PaLM


def reward(
    *,
    checkpoint: str = BASE,
    pairs: str = "stdlib",
    validation_pairs: str | None = None,
    tokenizer: str | None = None,
    num_binned_output: int = 0,
    lora_r: int = 8,
    dropout: float = 0.05,
    stdlib_pairs: int = 1600,
    max_steps: int = 80,
    batch_size: int = 16,
    learning_rate: float = 3e-3,
    normalize: bool = True,
    seed: int = 0,
    device: str = "auto",
    checkpoint_dir: str = REWARD,
    checkpoint_every: int = 100,
    resume: bool | Literal["auto"] = "auto",
) -> int:
    """Trains a reward model on pairs; by default, real continuations of Python source against spoilt ones.

    Args:
        checkpoint: folder of a PaLM or of the run that trained it.
        pairs: "stdlib", or rows (a file, a folder, a glob) with prompt, chosen, rejected (and margin), or with prompt,
            response, label.
        validation_pairs: held-out rows of the same form; by default a tenth of the pairs.
        tokenizer: tokenizer to use instead of the one in the checkpoint.
        num_binned_output: bins of labels; 0 for pairs and numbers.
        lora_r: rank of the reward scope.
        dropout: dropout of the reward scope.
        stdlib_pairs: pairs that are cut out of the library.
        max_steps: optimizer updates of the whole run.
        batch_size: examples an update.
        learning_rate: peak learning rate.
        normalize: gives held-out chosen responses mean reward 0, and all held-out responses deviation 1.
        seed: seed of order and dropout.
        device: auto takes CUDA, then MPS, then the CPU.
        checkpoint_dir: folder of the run.
        checkpoint_every: updates between checkpoints.
        resume: auto resumes if the folder has a checkpoint, true demands one, false demands a folder without a run.

    Returns:
        The exit status.
    """
    from palm_rlhf.data.corrupted_pairs import corrupted_pairs
    from palm_rlhf.reward.model import RewardModel
    from palm_rlhf.reward.trainer import RewardModelTrainer

    folder = checkpoint_folder(checkpoint)
    encoder = load_tokenizer(tokenizer or folder)
    examples: Any = pairs
    held_out: Any = validation_pairs
    if pairs == "stdlib":
        corpus = load_corpus("stdlib", tokenizer=encoder)
        examples = corrupted_pairs(corpus.train, count=stdlib_pairs, seed=0)
        held_out = held_out or corrupted_pairs(corpus.validation, count=256, seed=1)
    torch.manual_seed(seed)
    model = RewardModel(
        PaLM.from_pretrained(folder), num_binned_output=num_binned_output, lora_r=lora_r, dropout=dropout
    )
    trainer = RewardModelTrainer(
        reward_model=model,
        pairs=examples,
        validation_pairs=held_out,
        tokenizer=encoder,
        max_steps=max_steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        normalize=normalize,
        validate_every=max_steps,
        checkpoint_dir=checkpoint_dir,
        checkpoint_every=checkpoint_every,
        resume=resume,
        seed=seed,
        device=device,
    )
    report("model", f"reward model on {folder}")
    report("pairs", f"{len(trainer.examples)} to learn from, {len(trainer.held_out)} held out")
    result = trainer.train()
    first, last = result.first_accuracy, result.last_accuracy
    return report_run(
        "palm-rlhf",
        result,
        checkpoint_dir,
        max_steps=max_steps,
        lines=[("held out", f"accuracy {first:.3f} before training, {last:.3f} now")],
        results=[Result("held-out accuracy of the reward", last, first, "higher")],
    )
