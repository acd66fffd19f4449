"""Sizes of new models and the settings that fit them, for ``coca train``.

Flags and ``--config`` win over a preset. A run that starts from a model takes that model's sizes instead.
"""

from collections.abc import Mapping
from typing import Any, Literal

from coca.model.preprocessing import ImagePreprocessing
from lm_core.checkpoints.checkpoint import checkpoint_folder
from lm_core.checkpoints.manifest import read_json
from lm_core.checkpoints.pretrained import CONFIG_FILE
from lm_core.cli.parser import preset_name

Preset = Literal["quickstart", "small", "base", "large", "2b"]

# Weight of the captioning loss: arXiv 2205.01917, section 4.1.
_PAPER = {"caption_loss_weight": 2.0}
# Section 3.2: a pooler for each task, one after the other. Section 4.1: images of 288 pixels in patches of 18, and the
# optimizer: rate 8e-4 (for batches of 65,536), warmup over 2 % of the updates, decay 0.01, second moments 0.999.
_LARGE_SCALE = {
    **_PAPER,
    "pooling": "cascade",
    "num_img_queries": 256,
    "image_size": 288,
    "patch_size": 18,
    "learning_rate": 8e-4,
    "warmup": 0.02,
    "weight_decay": 0.01,
    "beta2": 0.999,
}
PRESETS: dict[str, dict[str, Any]] = {
    # 0.2 million parameters for digits of 8 x 8 pixels: under 90 s on two CPU cores
    "quickstart": {
        **_PAPER,
        "dim": 64,
        "unimodal_depth": 1,
        "multimodal_depth": 1,
        "num_img_queries": 16,
        "dim_head": 16,
        "heads": 4,
        "vit_dim": 64,
        "vit_depth": 2,
        "vit_heads": 4,
        "batch_size": 64,
        "shift": 1,
        "max_steps": 1000,
        "learning_rate": 3e-3,
        "validate_every": 200,
        "checkpoint_every": 200,
        "checkpoint_dir": "runs/coca-quickstart",
    },
    # For one GPU of 24 GB: the text width of open_clip's coca_ViT-B-32 (512, 8 heads) at the paper's depth of CoCa-Base
    # (6 + 6), on a ViT-S/16 (384, 12 blocks, 6 heads). Rate: CLIP's for its ViT-B/32 (arXiv 2103.00020, table 20).
    "small": {**_PAPER, "dim": 512, "unimodal_depth": 6, "multimodal_depth": 6, "pooling": "cascade"},
    # arXiv 2205.01917, table 1: CoCa-Base, CoCa-Large and CoCa, with feed-forwards of 4 dim. The original code's SwiGLU
    # and its feed-forward in the cross-attention add parameters: 0.3, 1.0 and 2.7 billion with 64,000 tokens.
    "base": {
        **_LARGE_SCALE,
        "dim": 768,
        "unimodal_depth": 6,
        "multimodal_depth": 6,
        "heads": 12,
        "vit_dim": 768,
        "vit_depth": 12,
        "vit_heads": 12,
    },
    "large": {
        **_LARGE_SCALE,
        "dim": 1024,
        "unimodal_depth": 12,
        "multimodal_depth": 12,
        "heads": 16,
        "vit_dim": 1024,
        "vit_depth": 24,
        "vit_heads": 16,
    },
    "2b": {
        **_LARGE_SCALE,
        "dim": 1408,
        "unimodal_depth": 18,
        "multimodal_depth": 18,
        "dim_head": 88,
        "heads": 16,
        "vit_dim": 1408,
        "vit_depth": 40,
        "vit_heads": 16,
    },
}
# open_clip's rate for fine-tuning coca_ViT-L-14 on captions (its README, "Fine tuning CoCa")
FINE_TUNING = {"learning_rate": 1e-5, "checkpoint_dir": "runs/coca-tuned"}


def presets(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults of a run with these arguments."""
    if chosen["model"] is not None:
        settings = {**FINE_TUNING, **settings_of(chosen["model"])}
        return {name: value for name, value in settings.items() if name in chosen}
    name = preset_name(chosen, "data", builtin="digits")
    preset = {"preset": name, **PRESETS[name]}
    if chosen["encoder"] is not None:
        preset.pop("image_size", None)  # the encoder has its own
    return preset


def settings_of(model: str) -> dict[str, Any]:
    """Sizes and image settings of a stored model, by flag; empty if they cannot be read, which ``train`` reports."""
    try:
        folder = checkpoint_folder(model)
        arguments = dict(read_json(folder / CONFIG_FILE)["arguments"])
        preprocessing = ImagePreprocessing.load_if_present(folder)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError):
        return {}
    settings = {name: value for name, value in arguments.items() if not isinstance(value, dict)}
    settings["freeze_encoder"] = settings.pop("freeze_img_encoder", False)
    if preprocessing is not None:
        settings |= {"image_size": preprocessing.image_size, "channels": preprocessing.channels}
    return settings
