"""Sources of models, prompts and rewards for the commands of reinforcement learning.

Without arguments each command uses the output of the previous one: ``train``, then ``reward``, then ``ppo``.
"""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from lm_core.adapters.loading import DType, load_causal_lm, torch_dtype
from lm_core.checkpoints.checkpoint import checkpoint_folder
from lm_core.checkpoints.manifest import read_json
from lm_core.checkpoints.pretrained import CONFIG_FILE
from lm_core.checks import check_probability
from lm_core.data.corpora import load_corpus
from lm_core.data.epochs import held_out_split
from lm_core.tokenizers import Tokenizer, load_tokenizer
from palm_rlhf.data.prompts import Prompt, PromptFiles, load_prompts
from palm_rlhf.model.palm import PaLM
from palm_rlhf.reward.classifier import is_classifier, load_classifier

QUICKSTART = "runs/palm-quickstart"
REWARD = "runs/palm-reward"
VALIDATION_PROMPTS = 128


@dataclass(frozen=True)
class OpenedPolicy:
    """A language model with its tokenizer.

    Attributes:
        model: a PaLM or a Hugging Face model.
        tokenizer: its tokenizer.
        arguments: arguments of its forward, such as the LoRA scope of a policy.
        description: text for a report: folder and scope.
    """

    model: nn.Module
    tokenizer: Tokenizer
    arguments: dict[str, Any]
    description: str


def open_policy(
    model: str, *, tokenizer: str | None = None, scope: str | None = "actor", dtype: DType = "auto"
) -> OpenedPolicy:
    """A language model as it was trained: a policy of ``ppo`` or ``grpo`` with its LoRA scope.

    Args:
        model: folder of a PaLM, of a run, of a Hugging Face model or adapter; or organisation/name on the hub.
        tokenizer: tokenizer to use instead of the model's.
        scope: LoRA scope of a PaLM, used if it has one of this name; None for the base alone.
        dtype: dtype of a Hugging Face model's weights; "auto" keeps the stored one.
    """
    folder = checkpoint_folder(model)
    network = load_causal_lm(folder, dtype=torch_dtype(dtype))
    encoder = load_tokenizer(tokenizer or folder)
    if isinstance(network, PaLM) and scope is not None and scope in network.finetune_modules:
        return OpenedPolicy(network, encoder, {"finetune_scope": scope}, f"{folder}, trained policy (scope {scope!r})")
    if hasattr(network, "peft_config"):
        return OpenedPolicy(network, encoder, {}, f"{folder}, trained adapter on its base model")
    return OpenedPolicy(network, encoder, {}, str(folder))


def find_reward(reward: str) -> tuple[Any, Path | None]:
    """A reward, and the folder of its ``RewardModel``; None for a classifier and for a ``module:function``."""
    from palm_rlhf.reward.model import RewardModel

    if ":" in reward and not Path(reward).exists():
        # an installed command does not import modules from the current folder; `python -m` does
        if not {"", os.getcwd()} & set(sys.path):
            sys.path.insert(0, os.getcwd())
        return reward, None
    folder = checkpoint_folder(reward)
    if is_classifier(folder):
        return load_classifier(folder), None
    if not (folder / CONFIG_FILE).is_file() or read_json(folder / CONFIG_FILE).get("class") != "RewardModel":
        raise ValueError(
            "reward must be the folder of a RewardModel or of a Hugging Face classifier, or module:function, got "
            f"{reward}"
        )
    return RewardModel.from_pretrained(folder), folder


def find_rewards(names: list[str], weights: list[float] | None = None) -> tuple[Any, Any, Path | None]:
    """A reward, or the weighted sum of several; network and folder of the first that is a ``RewardModel``, or None.

    Raises:
        ValueError: another number of weights, or a reward that cannot be found.
    """
    if weights is not None and len(weights) != len(names):
        raise ValueError(f"reward_weights must be one number for each of {len(names)} rewards, got {weights}")
    found = [find_reward(name) for name in names]
    network, base = next(((each.palm, folder) for each, folder in found if folder is not None), (None, None))
    if len(found) == 1 and weights is None:
        return found[0][0], network, base
    return (
        [(weight, each) for weight, (each, _) in zip(weights or [1.0] * len(found), found, strict=True)],
        network,
        base,
    )


def find_prompts(
    data: str,
    validation_data: str | None,
    fraction: float,
    encoder: Any,
    template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to learn from and held-out prompts: from other documents, or a fraction of the rows.

    Raises:
        ValueError: ``fraction`` is outside [0, 1), or a row cannot be read.
    """
    check_probability(fraction, "validation_fraction")
    prompts = _prompts(data, encoder, template_kwargs, "train", count=512, seed=2)
    if validation_data is not None or data == "stdlib":
        other = validation_data or data
        return prompts, _prompts(other, encoder, template_kwargs, "validation", count=VALIDATION_PROMPTS, seed=3)
    if len(prompts) < 2 or not fraction:
        return prompts, prompts  # nothing to hold out
    return held_out_split(prompts, max(1, int(fraction * len(prompts))), 0, "validation")


def _prompts(
    data: str,
    encoder: Any,
    template_kwargs: Mapping[str, Any] | None,
    side: Literal["train", "validation"],
    *,
    count: int,
    seed: int,
) -> list[Prompt]:
    from palm_rlhf.data.corrupted_pairs import document_prompts

    source: Any = PromptFiles((data,), name="data" if side == "train" else "validation_data")
    if data == "stdlib":
        corpus = load_corpus("stdlib", tokenizer=encoder)
        source = document_prompts(getattr(corpus, side), count=count, seed=seed)
    return load_prompts(source, tokenizer=encoder, template_kwargs=template_kwargs)
