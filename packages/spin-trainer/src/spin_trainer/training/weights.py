"""A policy's weights on disk: what a checkpoint keeps, and a folder that its own library opens again.

Where part of a model is frozen (LoRA), a checkpoint keeps the trained part alone, with a fingerprint of the rest. What
is stored is whole: weights that are spread over processes (FSDP) are gathered one at a time, so every process calls
these functions.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lm_core.checkpoints.atomic_io import new_directory, remove_directory
from lm_core.checkpoints.checkpoint import on_main_process
from lm_core.checkpoints.manifest import CheckpointError, write_json, write_manifest
from lm_core.checkpoints.pretrained import CONFIG_FILE, TOKENIZER_FOLDER, WEIGHTS_FILE, PretrainedMixin, write_model
from lm_core.checkpoints.weights import load_weights, read_weights, save_weights
from lm_core.distributed import rank
from lm_core.tokenizers import HuggingFaceTokenizer


def is_partly_frozen(model: nn.Module) -> bool:
    """Whether some parameters do not train."""
    return any(not parameter.requires_grad for parameter in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """A tensor, gathered if it is spread over processes; then every process calls this."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def stored_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, or of a partly frozen model the parameters that train; gathered weights on rank 0 only."""
    if is_partly_frozen(model):
        state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    else:
        state = model.state_dict()
    return gathered_weights(model, list(state)) if is_sharded(model) else state


def gathered_weights(model: nn.Module, names: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Whole weights of a model that is spread over processes, on the CPU of rank 0; other ranks get nothing.

    Args:
        model: every process has its part.
        names: those of the state dict that are wanted; None for all.
    """
    gathered: dict[int, Tensor] = {}  # by identity, so that tied weights stay tied
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if names is None or name in names:
            if id(tensor) not in gathered:
                value = whole(tensor.detach())
                gathered[id(tensor)] = value.cpu() if rank() == 0 else value.new_empty(0)
            found[name] = gathered[id(tensor)]
    return found if rank() == 0 else {}


@torch.no_grad()
def load_stored_weights(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Copies what ``stored_weights`` gave into ``model``, if every name and shape fits.

    Raises:
        CheckpointError: naming what does not fit.
    """
    frozen = is_partly_frozen(model)
    if not frozen and not is_sharded(model):
        load_weights(model, dict(state), where=where)
        return
    own: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not frozen:
        kept = model.state_dict().keys()
        own |= {name: buffer for name, buffer in model.named_buffers() if name in kept}
    wrong = sorted(set(own) ^ set(state))
    wrong += sorted(name for name in set(own) & set(state) if own[name].shape != state[name].shape)
    if wrong:
        raise CheckpointError(f"{where} does not fit the parameters that train, they differ in {wrong[:8]}")
    for name, tensor in own.items():
        tensor.copy_(_spread_like(tensor, state[name]))


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters are spread over processes."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def _spread_like(sharded: Any, value: Tensor) -> Tensor:
    """This process's part of a value that every process has, for a tensor that is spread; else the value."""
    if not hasattr(sharded, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(sharded.device), sharded.device_mesh, sharded.placements)


def read_stored_weights(folder: Path) -> dict[str, Tensor]:
    """The weights in a folder that ``write_stored_weights`` wrote."""
    return read_weights(folder / WEIGHTS_FILE)


def write_stored_weights(folder: Path, model: nn.Module) -> None:
    """Writes ``stored_weights`` into a new folder, whole or not at all; an older folder of this name goes."""
    state = stored_weights(model)

    def write() -> None:
        if folder.exists():
            remove_directory(folder)
        with new_directory(folder) as temporary:
            save_weights(temporary / WEIGHTS_FILE, state)
            write_manifest(temporary)

    on_main_process(write)


def export_policy(model: nn.Module, folder: Path, tokenizer: Any = None, *, overwrite: bool = False) -> None:
    """Writes a policy as its own library opens it: Hugging Face's or ours by ``from_pretrained``, others as weights.

    A peft model is written as its adapters.

    Raises:
        FileExistsError: the folder is there and ``overwrite`` is False.
    """
    gathered = gathered_weights(model) if is_sharded(model) else None

    def write() -> None:
        if folder.exists() and not overwrite:
            raise FileExistsError(f"{folder} exists; overwrite=True replaces it")
        if folder.exists():
            remove_directory(folder)
        with new_directory(folder) as temporary:
            _write_policy(temporary, model, gathered, tokenizer)

    on_main_process(write)


def _write_policy(folder: Path, model: nn.Module, gathered: dict[str, Tensor] | None, tokenizer: Any) -> None:
    native = getattr(model, "save_pretrained", None)
    ours = isinstance(model, PretrainedMixin)
    if isinstance(model, PretrainedMixin) and gathered is None:
        write_model(folder, model)
    elif isinstance(model, PretrainedMixin):
        write_json(folder / CONFIG_FILE, model.pretrained_config())
        save_weights(folder / WEIGHTS_FILE, gathered or {})
        model.write_assets(folder)
    elif callable(native):
        native(str(folder), **({} if gathered is None else {"state_dict": gathered}))
    else:
        save_weights(folder / WEIGHTS_FILE, model if gathered is None else gathered)
    if tokenizer is not None:
        # transformers looks for a tokenizer beside the model
        beside = callable(native) and not ours and isinstance(tokenizer, HuggingFaceTokenizer)
        tokenizer.save_pretrained(folder if beside else folder / TOKENIZER_FOLDER)
    if ours or not callable(native):
        write_manifest(folder)


@torch.no_grad()
def fingerprint_of_weights(model: nn.Module, *, trainable: bool | None = None) -> str:
    """SHA-256 over names, dtypes, shapes and values of a model's parameters, the same whether they are spread or not.

    Args:
        model: whose parameters and buffers.
        trainable: only parameters that train (True) or that do not (False).
    """
    digest = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if trainable is not None and tensor.requires_grad is not trainable:
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content = whole(tensor.detach()).cpu().contiguous().flatten()
        digest.update(content.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
