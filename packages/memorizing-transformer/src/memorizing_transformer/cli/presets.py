"""Presets of the command ``train``: sizes of the model with the learning rate that fits them."""

from collections.abc import Mapping
from typing import Any

from lm_core.checkpoints.checkpoint import checkpoint_folder
from lm_core.checkpoints.pretrained import TOKENIZER_FOLDER
from lm_core.cli.parser import preset_name
from memorizing_transformer.cli.models import stored_arguments, stored_class

# Memorizing Transformers (arXiv 2203.08913), section 4: segments and XL windows of 512 tokens. A memory of 8,192 has
# most of the gain: a perplexity on arXiv of 2.37, and with 65,536 of 2.31.
_READING = {"segment_length": 512, "xl_max_memories": 512, "max_knn_memories": 8192}
PRESETS: dict[str, dict[str, Any]] = {
    # learns something in about two minutes on two CPU cores
    "quickstart": {
        "dim": 128,
        "depth": 3,
        "dim_head": 32,
        "heads": 4,
        "knn_attn_heads": 2,
        "max_knn_memories": 8192,
        "xl_max_memories": 64,
        "segment_length": 64,
        "learning_rate": 3e-3,
        "max_steps": 600,
        "validate_every": 300,
        "validation_documents": 4,
        "checkpoint_every": 300,
        "checkpoint_dir": "runs/memorizing-quickstart",
    },
    # GPT-3 (arXiv 2005.14165), table 2.1: "Small", "Medium" and "XL"
    "small": {"dim": 768, "depth": 12, "dim_head": 64, "heads": 12, "learning_rate": 6e-4} | _READING,
    "base": {"dim": 1024, "depth": 24, "dim_head": 64, "heads": 16, "learning_rate": 3e-4} | _READING,
    "large": {"dim": 2048, "depth": 24, "dim_head": 128, "heads": 16, "learning_rate": 2e-4} | _READING,
    # The model of section 4; its rate is that of Adafactor, so this is GPT-3's for the same width.
    "paper": {"dim": 1024, "depth": 12, "dim_head": 128, "heads": 8, "learning_rate": 3e-4}
    | {"gate": "sigmoid", "multi_head_keys": True, "knn_storage": "bfloat16"}
    | _READING,
}
# Sizes without a default in the class.
REQUIRED = {"dim": 768, "depth": 12}
# Trained weights continue at a lower rate than new ones begin with.
CONTINUED_LEARNING_RATE = 1e-4
# A memory for a transformers model: gates and temperatures, which are few and start far from where they end.
AUGMENTED = {
    "learning_rate": 3e-2,
    "batch_size": 4,
    "segment_length": 256,
    "xl_max_memories": 256,
    "max_knn_memories": 32_768,
    "max_steps": 200,
    "validate_every": 100,
    "validation_documents": 8,
}


def train_presets(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults of a run: those of its preset, or with ``model`` the sizes and the tokenizer of that model."""
    if chosen["model"] is None:
        name = preset_name(chosen, "data")
        return {"preset": name, **PRESETS[name]}
    try:
        folder = checkpoint_folder(chosen["model"])
    except (OSError, ValueError, ImportError):
        return {}  # the command itself reports it
    if stored_class(folder) is None:
        rate = {"learning_rate": CONTINUED_LEARNING_RATE} if chosen["lora_r"] else {}
        return {**AUGMENTED, **rate, "tokenizer": str(chosen["model"])}
    sizes = {name: value for name, value in stored_arguments(folder).items() if name in chosen}
    tokenizer = {"tokenizer": str(folder)} if (folder / TOKENIZER_FOLDER).is_dir() else {}
    return {"learning_rate": CONTINUED_LEARNING_RATE, **sizes, **tokenizer}
