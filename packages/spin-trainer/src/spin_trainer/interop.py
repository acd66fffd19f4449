"""Models of other libraries and files of the original: opening a folder or hub name, LoRA, the original's weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lm_core.checkpoints.manifest import CheckpointError, load_tensors, read_json
from lm_core.checkpoints.module_specs import registered_class
from lm_core.checkpoints.pretrained import CONFIG_FILE


def load_model(source: str, name: str = "model") -> nn.Module:
    """A model from a folder or the hub.

    Args:
        source: a folder that a language model of these packages or a transformers causal language model (or a peft
            adapter of one) was saved to, or ``organisation/name`` on the hub. Code from the hub is never run.
        name: what errors call it.

    Raises:
        CheckpointError: the folder is of a package that is not installed.
        FileNotFoundError: ``source`` is neither a folder nor a hub name.
        ValueError: the folder holds something else.
        ImportError: transformers or peft is needed and not installed.
    """
    folder = Path(source)
    if not folder.is_dir() and (source.count("/") != 1 or folder.exists() or source.startswith((".", "/"))):
        raise FileNotFoundError(f"{name} must be a folder or organisation/name on the hub, got {source!r}")
    config = folder / CONFIG_FILE
    stored = read_json(config) if config.is_file() else {}
    if "class" in stored:
        cls: Any = registered_class(str(stored.get("package")), str(stored["class"]))
        if not hasattr(cls, "init_cache"):
            raise ValueError(f"{name} must be a language model, {source} holds a {stored['class']}")
        return cls.from_pretrained(folder)
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


def load_original_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The policy's state dict from a checkpoint of self-rewarding-lm-pytorch's ``SPINTrainer``.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is damaged, holds more than tensors, or is no such checkpoint.
    """
    content = load_tensors(path)
    state = content.get("model") if isinstance(content, dict) else None
    prefix = "policy_model."
    if not isinstance(state, dict) or not any(name.startswith(prefix) for name in state):
        raise CheckpointError(f"{path} is no SPIN checkpoint: it has no model with {prefix}* weights")
    return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
