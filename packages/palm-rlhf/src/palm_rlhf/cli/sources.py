"""Sources of models, prompts and rewards for the commands of reinforcement learning.

Without arguments each command uses the output of the previous one: ``train``, then ``reward``, then ``ppo``.
"""

import os
import sys
from pathlib import Path
from typing import Any, Literal

from lm_core.checkpoints.checkpoint import checkpoint_folder
from lm_core.checkpoints.manifest import read_json
from lm_core.data.corpora import load_corpus
from lm_core.data.rows import load_rows
from lm_core.tokenizers import load_tokenizer

BASE = "runs/palm-quickstart"
REWARD = "runs/palm-reward"
VALIDATION_PROMPTS = 128


def find_reward(reward: str) -> tuple[Any, Path | None]:
    """A reward, and the folder of its ``RewardModel``; None for a ``module:function``."""
    from palm_rlhf.reward.model import RewardModel

    if ":" in reward and not Path(reward).exists():
        # an installed command does not import modules from the current folder; `python -m` does
        if not {"", os.getcwd()} & set(sys.path):
            sys.path.insert(0, os.getcwd())
        return reward, None
    folder = checkpoint_folder(reward)
    if read_json(folder / "config.json").get("class") != "RewardModel":
        raise ValueError(f"reward must be the folder of a RewardModel or module:function, got {reward}")
    return RewardModel.from_pretrained(folder), folder


def find_sources(
    checkpoint: str | None, base: Path | None, tokenizer: str | None, prompts: str, validation_prompts: str | None
) -> tuple[Path, Any, Any, Any]:
    """The policy's folder, its tokenizer, prompts to learn from and prompts to compare on."""
    folder = base if checkpoint is None and base is not None else checkpoint_folder(checkpoint or BASE)
    encoder = load_tokenizer(tokenizer or folder)
    train_prompts = _prompts(prompts, encoder, "train", count=512, seed=2)
    held_out = validation_prompts or ("stdlib" if prompts == "stdlib" else prompts)
    validation = _prompts(held_out, encoder, "validation", count=VALIDATION_PROMPTS, seed=3)
    return folder, encoder, train_prompts, validation


def _prompts(prompts: str, encoder: Any, side: Literal["train", "validation"], *, count: int, seed: int) -> Any:
    from palm_rlhf.data.corrupted_pairs import document_prompts

    if prompts == "stdlib":
        corpus = load_corpus("stdlib", tokenizer=encoder)
        return document_prompts(getattr(corpus, side), count=count, seed=seed)
    return load_rows(prompts, text_rows="line", name="prompts")
