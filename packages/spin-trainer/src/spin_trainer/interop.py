"""Loading models from a folder or the hub, adding LoRA adapters, reading the original's checkpoints."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lm_core.checkpoints.manifest import CheckpointError, load_tensors, read_json
from lm_core.checkpoints.module_specs import registered_class
from lm_core.checkpoints.pretrained import CONFIG_FILE


def load_model(source: str, name: str = "model") -> nn.Module:
    """Loads a causal language model from a folder or the hub.

    Args:
        source: folder with a saved language model of these packages, a transformers causal language model or a peft
            adapter of one; or ``organisation/name`` on the hub. Code from the hub is never run.
        name: argument name in error messages.

    Raises:
        CheckpointError: the folder was written by a package that is not installed.
        FileNotFoundError: ``source`` is neither a folder nor a hub name.
        ValueError: the folder holds no causal language model.
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
        raise ImportError("Hugging Face models need transformers and peft: pip install transformers peft") from error
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
        r: rank of the adapters.
        alpha: scale times rank; adapters are scaled by alpha / r. Twice the rank by default.
        dropout: dropout probability in front of the adapters.
        targets: names of the linear layers that get an adapter; all but the output layer by default.

    Raises:
        ValueError: the rank is below 1.
        TypeError: the model is not a transformers model.
        ImportError: peft is not installed.
    """
    if r < 1:
        raise ValueError(f"lora_r must be at least 1, got {r}")
    if not hasattr(model, "config") or not hasattr(model, "get_input_embeddings"):
        raise TypeError(f"LoRA adapters need a transformers model, got {type(model).__name__}")
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("LoRA needs peft: pip install peft") from error
    target_modules: Any = "all-linear" if targets is None else targets if isinstance(targets, str) else list(targets)
    config = LoraConfig(
        r=r, lora_alpha=alpha or 2 * r, lora_dropout=dropout, target_modules=target_modules, task_type="CAUSAL_LM"
    )
    adapted: nn.Module = get_peft_model(model, config)
    return adapted


def load_original_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Reads the policy's state dict from a checkpoint of self-rewarding-lm-pytorch's ``SPINTrainer``.

    Raises:
        FileNotFoundError: the file does not exist.
        CheckpointError: the file is damaged, holds more than tensors, or is not such a checkpoint.
    """
    content = load_tensors(path)
    state = content.get("model") if isinstance(content, dict) else None
    prefix = "policy_model."
    if not isinstance(state, dict) or not any(name.startswith(prefix) for name in state):
        raise CheckpointError(f"{path} is no SPIN checkpoint: it has no model with {prefix}* weights")
    return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
