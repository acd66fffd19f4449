"""Models and tokenizers by name, as the command line takes them; LoRA adapters on top."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lm_core.checkpoints.manifest import read_json
from lm_core.checkpoints.module_specs import package_of
from lm_core.checkpoints.pretrained import CONFIG_FILE
from spin_trainer.quickstart.small_decoder import SmallDecoder


def load_model(source: str, name: str = "model") -> nn.Module:
    """A model from a folder or the hub.

    Args:
        source: a folder that ``SmallDecoder`` or a transformers causal language model (or a peft adapter of one) was
            saved to, or ``organisation/name`` on the hub. Code from the hub is never run.
        name: what errors call it.

    Raises:
        ValueError: the folder holds something else.
        ImportError: transformers or peft is needed and not installed.
    """
    folder = Path(source)
    if not folder.is_dir() and (source.count("/") != 1 or folder.exists() or source.startswith((".", "/"))):
        raise FileNotFoundError(f"{name} must be a folder or organisation/name on the hub, got {source!r}")
    config = folder / CONFIG_FILE
    stored = read_json(config) if config.is_file() else {}
    if stored.get("class") == "SmallDecoder" and stored.get("package") == package_of(SmallDecoder):
        return SmallDecoder.from_pretrained(folder)
    if "class" in stored:
        raise ValueError(
            f"{name} {source} is a {stored['class']} of {stored.get('package')}, which this command cannot open: "
            "call spin_trainer.SPINTrainer(model, ...) with it"
        )
    local = folder.is_dir()
    try:
        if (folder / "adapter_config.json").is_file():
            from peft import AutoPeftModelForCausalLM

            return AutoPeftModelForCausalLM.from_pretrained(source, is_trainable=True)
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise ImportError('Hugging Face models need the extra "hf": pip install "spin-trainer[hf]"') from error
    try:
        return AutoModelForCausalLM.from_pretrained(source, local_files_only=local, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{name} {source!r} could not be loaded by transformers: {error}") from error


def with_lora(
    model: nn.Module,
    *,
    r: int,
    alpha: int | None = None,
    dropout: float = 0.0,
    targets: Sequence[str] | str | None = None,
) -> nn.Module:
    """Freezes a transformers model and adds LoRA adapters (arXiv 2106.09685) with peft.

    Args:
        model: a transformers causal language model.
        r: rank.
        alpha: scale is alpha / r; twice the rank by default.
        dropout: in front of the adapters.
        targets: names of linear layers; all but the output layer by default.

    Raises:
        ValueError: the rank is below 1.
        TypeError: the model is no transformers model.
        ImportError: peft is not installed.
    """
    if r < 1:
        raise ValueError(f"lora_r must be at least 1, got {r}")
    if not hasattr(model, "config") or not hasattr(model, "get_input_embeddings"):
        raise TypeError(f"LoRA adapters need a transformers model, got {type(model).__name__}")
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError('LoRA needs the extra "hf": pip install "spin-trainer[hf]"') from error
    chosen: Any = "all-linear" if targets is None else targets if isinstance(targets, str) else list(targets)
    config = LoraConfig(
        r=r, lora_alpha=alpha or 2 * r, lora_dropout=dropout, target_modules=chosen, task_type="CAUSAL_LM"
    )
    adapted: nn.Module = get_peft_model(model, config)
    return adapted
