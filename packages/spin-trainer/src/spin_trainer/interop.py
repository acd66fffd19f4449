"""Loading models from a folder or the hub, adding LoRA adapters, reading the original's checkpoints."""

from pathlib import Path

from torch import Tensor

from lm_core.adapters.loading import load_causal_lm as load_model
from lm_core.adapters.loading import lora as with_lora
from lm_core.checkpoints.manifest import CheckpointError
from lm_core.checkpoints.tensor_files import load_tensors

__all__ = ["load_model", "load_original_checkpoint", "with_lora"]


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
