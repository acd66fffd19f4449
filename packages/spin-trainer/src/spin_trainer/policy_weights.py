"""A policy's weights on disk: what a checkpoint keeps, and a folder that its own library opens again.

Where part of a model is frozen (LoRA), a checkpoint keeps the trained part alone, with a fingerprint of the rest.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lm_core.checkpoint import CheckpointError
from lm_core.durable import new_directory, remove_directory
from lm_core.manifest import write_manifest
from lm_core.pretrained import TOKENIZER_FOLDER, WEIGHTS_FILE, PretrainedMixin, write_model
from lm_core.tokenizers import HuggingFaceTokenizer
from lm_core.weights import load_weights, read_weights, save_weights


def is_partly_frozen(model: nn.Module) -> bool:
    """Whether some parameters do not train."""
    return any(not parameter.requires_grad for parameter in model.parameters())


def stored_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, or of a partly frozen model the parameters that train."""
    if not is_partly_frozen(model):
        return model.state_dict()
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def load_stored_weights(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Copies what ``stored_weights`` gave into ``model``, if every name and shape fits.

    Raises:
        CheckpointError: naming what does not fit.
    """
    if not is_partly_frozen(model):
        load_weights(model, dict(state), where=where)
        return
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    wrong = sorted(set(own) ^ set(state))
    wrong += sorted(name for name in set(own) & set(state) if own[name].shape != state[name].shape)
    if wrong:
        raise CheckpointError(f"{where} does not fit the parameters that train, they differ in {wrong[:8]}")
    for name, parameter in own.items():
        parameter.copy_(state[name])


def read_stored_weights(folder: Path) -> dict[str, Tensor]:
    """The weights in a folder that ``write_stored_weights`` wrote."""
    return read_weights(folder / WEIGHTS_FILE)


def write_stored_weights(folder: Path, model: nn.Module) -> None:
    """Writes ``stored_weights`` into a new folder, whole or not at all; an older folder of this name goes."""
    if folder.exists():
        remove_directory(folder)
    with new_directory(folder) as temporary:
        save_weights(temporary / WEIGHTS_FILE, stored_weights(model))
        write_manifest(temporary)


def export_policy(model: nn.Module, folder: Path, tokenizer: Any = None) -> None:
    """Writes a policy as its own library opens it: Hugging Face's or ours by ``from_pretrained``, others as weights.

    A peft model is written as its adapters.
    """
    if folder.exists():
        remove_directory(folder)
    with new_directory(folder) as temporary:
        if isinstance(model, PretrainedMixin):
            write_model(temporary, model, tokenizer=tokenizer)
            write_manifest(temporary)
            return
        native = getattr(model, "save_pretrained", None)
        if callable(native):
            native(str(temporary))
        else:
            save_weights(temporary / WEIGHTS_FILE, model)
        if tokenizer is not None:
            # transformers looks for a tokenizer beside the model
            beside = callable(native) and isinstance(tokenizer, HuggingFaceTokenizer)
            tokenizer.save_pretrained(temporary if beside else temporary / TOKENIZER_FOLDER)
        if not callable(native):
            write_manifest(temporary)


def load_original_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The policy's state dict from a checkpoint of self-rewarding-lm-pytorch's ``SPINTrainer``.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is damaged, holds more than tensors, or is no such checkpoint.
    """
    from lm_core.manifest import load_tensors

    content = load_tensors(path)
    state = content.get("model") if isinstance(content, dict) else None
    prefix = "policy_model."
    if not isinstance(state, dict) or not any(name.startswith(prefix) for name in state):
        raise CheckpointError(f"{path} is no SPIN checkpoint: it has no model with {prefix}* weights")
    return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
