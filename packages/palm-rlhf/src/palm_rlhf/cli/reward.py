"""The command ``reward``: trains a reward model on preferences or labels."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from lm_core.adapters.loading import DType, torch_dtype
from lm_core.checkpoints.checkpoint import checkpoint_folder
from lm_core.checkpoints.manifest import read_json
from lm_core.checkpoints.pretrained import CONFIG_FILE
from lm_core.cli.main import report, report_run
from lm_core.cli.parser import Command, Group, preset_name
from lm_core.data.corpora import load_corpus
from lm_core.rng import seed_everything
from lm_core.tokenizers import load_tokenizer
from lm_core.training.run_directory import Result
from palm_rlhf.cli.sources import QUICKSTART, REWARD
from palm_rlhf.data.corrupted_pairs import corrupted_pairs
from palm_rlhf.model.palm import PaLM
from palm_rlhf.reward.classifier import Classifier, new_classifier
from palm_rlhf.reward.model import RewardModel
from palm_rlhf.reward.trainer import RewardModelTrainer, RewardSettings

# Settings of the quickstart: a LoRA scope on a small model allows a high learning rate.
QUICK = {"max_steps": 80, "learning_rate": 3e-3, "validate_every": 80, "dropout": 0.05}


def reward(
    *,
    head: dict[str, Any],
    settings: RewardSettings,
    model: str | None = None,
    data: str = "stdlib",
    validation_data: str | None = None,
    tokenizer: str | None = None,
    template_kwargs: dict[str, Any] | None = None,
    dtype: DType = "auto",
    lora_targets: list[str] | None = None,
    gradient_checkpointing: bool = False,
    stdlib_pairs: int = 1600,
    checkpoint_dir: str = REWARD,
    resume: bool | Literal["auto"] = "auto",
    trackers: list[str] | None = None,
) -> int:
    """Trains a reward model on pairs; by default, real continuations of Python source against corrupted ones.

    Args:
        head: arguments of ``RewardModel``.
        settings: optimizer, batches, logging and checkpoints.
        model: model to start from: a PaLM's folder or run, or a Hugging Face model (folder, or organisation/name on the
            hub), which becomes a sequence classifier; by default the quickstart of train.
        data: "stdlib", or rows (a file, a folder, a glob) with prompt, chosen, rejected (and margin), or with prompt,
            response, label.
        template_kwargs: further arguments of the chat template in JSON, such as '{"enable_thinking": false}'.
        dtype: dtype of a Hugging Face model's frozen weights; auto keeps the stored one.
        lora_targets: names of the layers of a Hugging Face model that get an adapter; all linear layers by default.
        gradient_checkpointing: recomputes blocks in the backward to save memory.
        stdlib_pairs: number of pairs cut from Python's library.
    """
    folder = checkpoint_folder(model or QUICKSTART)
    encoder = load_tokenizer(tokenizer or folder)
    # pairs from Python's library, or the user's rows
    pairs: Any = data
    held_out: Any = validation_data
    if data == "stdlib":
        corpus = load_corpus("stdlib", tokenizer=encoder)
        pairs = corrupted_pairs(corpus.train, count=stdlib_pairs, seed=0)
        held_out = held_out or corrupted_pairs(corpus.validation, count=256, seed=1)
    seed_everything(settings.seed)
    trainer = RewardModelTrainer(
        reward_model=_reward_model(folder, encoder, head, dtype, lora_targets, gradient_checkpointing),
        pairs=pairs,
        validation_pairs=held_out,
        tokenizer=encoder,
        template_kwargs=template_kwargs,
        checkpoint_dir=checkpoint_dir,
        resume=resume,
        trackers=trackers or (),
        settings=settings,
    )
    # train, then report the accuracy on held-out pairs
    report("model", f"reward model on {folder}")
    report("data", f"{len(trainer.examples)} pairs for training, {len(trainer.held_out)} held out")
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


def _reward_model(
    folder: Path,
    encoder: Any,
    head: dict[str, Any],
    dtype: DType,
    lora_targets: list[str] | None,
    gradient_checkpointing: bool,
) -> RewardModel | Classifier:
    """A reward model on a PaLM, or a classifier of a Hugging Face model."""
    if read_json(folder / CONFIG_FILE).get("class") is not None:
        if lora_targets is not None:
            raise ValueError("lora_targets are for Hugging Face models, got a PaLM")
        palm = PaLM.from_pretrained(folder)
        palm.gradient_checkpointing = palm.gradient_checkpointing or gradient_checkpointing
        return RewardModel(palm, **head)
    if head["num_binned_output"] or head["pooling"] != "response":
        raise ValueError("num_binned_output and pooling are for a PaLM, got a Hugging Face model")
    return new_classifier(
        folder,
        pad_id=encoder.pad_id,
        dtype=torch_dtype(dtype),
        lora_targets=lora_targets,
        gradient_checkpointing=gradient_checkpointing,
        **{name: head[name] for name in ("use_lora", "lora_r", "dropout")},
    )


def _presets(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the quickstart, without own model and data."""
    return QUICK if preset_name(chosen, "model", "data") == "quickstart" else {}


HEAD = Group(RewardModel, skip=("palm", "reward_lora_scope"), as_dict=True)
COMMAND = Command(reward, {"head": HEAD, "settings": Group(RewardSettings)}, presets=_presets)
