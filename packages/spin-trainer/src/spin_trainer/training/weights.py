"""A policy's weights on disk: in checkpoints, and exported to folders that its own library opens.

Of a partly frozen model (LoRA) a checkpoint holds the trained parameters and a fingerprint of the others. Stored
weights are unsharded: FSDP's shards are gathered one tensor at a time, so every process must call these functions.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lm_core.checkpoints.atomic_io import new_directory, remove_directory, share_as_umask_allows
from lm_core.checkpoints.checkpoint import on_main_process
from lm_core.checkpoints.manifest import CheckpointError, write_json, write_manifest
from lm_core.checkpoints.native_files import write_dtype
from lm_core.checkpoints.pretrained import CONFIG_FILE, TOKENIZER_FOLDER, WEIGHTS_FILE, PretrainedMixin
from lm_core.checkpoints.tensor_files import hash_of
from lm_core.checkpoints.weights import load_weights, save_weights
from lm_core.distributed import rank
from lm_core.tokenizers import HuggingFaceTokenizer
from lm_core.training.fsdp import is_sharded, whole


def is_partly_frozen(model: nn.Module) -> bool:
    """True if some parameters do not require gradients."""
    return any(not parameter.requires_grad for parameter in model.parameters())


def stored_weights(
    model: nn.Module, *, frozen: bool = False, dtypes: Mapping[str, torch.dtype] | None = None
) -> dict[str, Tensor]:
    """The state dict; a sharded model is gathered on the CPU of rank 0 (other ranks get an empty dict).

    Args:
        model: the policy, sharded or not.
        frozen: whether to include the frozen weights of a partly frozen model.
        dtypes: dtypes by the names of parameters that are stored in another one than they have.
    """
    state = model.state_dict(keep_vars=True)
    if is_partly_frozen(model) and not frozen:
        state = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    sharded = is_sharded(model)
    values: dict[int, Tensor] = {}  # by identity, so that tied weights stay tied
    for name, tensor in state.items():
        if id(tensor) not in values:
            value = whole(tensor.detach())
            value = value.to((dtypes or {}).get(name, value.dtype))
            values[id(tensor)] = (value.cpu() if rank() == 0 else value.new_empty(0)) if sharded else value
    return {name: values[id(tensor)] for name, tensor in state.items()} if rank() == 0 or not sharded else {}


@torch.no_grad()
def load_stored_weights(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Loads the result of ``stored_weights`` into ``model``.

    Raises:
        CheckpointError: names or shapes do not match.
    """
    frozen = is_partly_frozen(model)
    if not frozen and not is_sharded(model):
        load_weights(model, dict(state), where=where)
        return
    tensors: dict[str, Any] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not frozen:
        persistent = model.state_dict().keys()
        tensors |= {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    wrong = sorted(set(tensors) ^ set(state))
    wrong += sorted(name for name in set(tensors) & set(state) if tensors[name].shape != state[name].shape)
    if wrong:
        raise CheckpointError(f"{where} does not fit the parameters that train, they differ in {wrong[:8]}")
    for name, tensor in tensors.items():
        value = state[name]
        if hasattr(tensor, "full_tensor"):
            from torch.distributed.tensor import distribute_tensor

            value = distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)
        tensor.copy_(value)


def replace_folder(
    folder: Path, fill: Callable[[Path], None], *, manifest: bool = True, overwrite: bool = True
) -> None:
    """Writes a folder with ``fill`` on the main process, atomically, replacing an older one of this name.

    Raises:
        FileExistsError: the folder exists and ``overwrite`` is False.
    """

    def write() -> None:
        if folder.exists() and not overwrite:
            raise FileExistsError(f"{folder} exists; overwrite=True replaces it")
        if folder.exists():
            remove_directory(folder)
        with new_directory(folder) as temporary:
            fill(temporary)
            if manifest:
                write_manifest(temporary)

    on_main_process(write)


def export_policy(
    model: nn.Module,
    folder: Path,
    tokenizer: Any = None,
    *,
    overwrite: bool = False,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> None:
    """Exports a policy for ``from_pretrained`` of its library (transformers, peft, ours); others as plain weights.

    A peft model is exported as its adapters.

    Args:
        model: the policy, sharded or not.
        folder: the new folder.
        tokenizer: tokenizer to store with it.
        overwrite: True replaces a folder of this name.
        dtypes: dtypes of weights that are stored in another one than they have.

    Raises:
        FileExistsError: the folder exists and ``overwrite`` is False.
    """
    changed = stored_weights(model, frozen=True, dtypes=dtypes) if dtypes or is_sharded(model) else None
    native = None if isinstance(model, PretrainedMixin) else getattr(model, "save_pretrained", None)

    def fill(folder: Path) -> None:
        if callable(native):
            _save_natively(model, folder, changed)
            if dtypes and (folder / CONFIG_FILE).is_file():
                write_dtype(folder / CONFIG_FILE, changed or {})
        else:
            save_weights(folder / WEIGHTS_FILE, model if changed is None else changed)
        if isinstance(model, PretrainedMixin):
            write_json(folder / CONFIG_FILE, model.pretrained_config())
            model.write_assets(folder)
        if tokenizer is not None:
            # transformers looks for a tokenizer next to the model
            together = callable(native) and isinstance(tokenizer, HuggingFaceTokenizer)
            tokenizer.save_pretrained(folder if together else folder / TOKENIZER_FOLDER)

    replace_folder(folder, fill, manifest=not callable(native), overwrite=overwrite)


def _save_natively(model: Any, folder: Path, state: Mapping[str, Tensor] | None) -> None:
    """Saves a model by its own ``save_pretrained``, with ``state`` in place of its weights; files are not private."""
    model.save_pretrained(str(folder), **({} if state is None else {"state_dict": dict(state)}))
    for file in folder.glob("*.safetensors"):
        share_as_umask_allows(file)


def write_native_files(model: nn.Module, folder: Path, state: Mapping[str, Tensor]) -> None:
    """Writes files into a checkpoint so that the policy's own library opens it: peft its adapter, transformers a model.

    The base of an adapter is not copied: the adapter names it, and the checkpoint has its fingerprint.

    Args:
        model: the policy.
        folder: folder of the checkpoint, with ``state`` as its weights.
        state: ``stored_weights`` of the policy.
    """
    config: Any = getattr(model, "config", None)
    if hasattr(model, "peft_config"):
        _save_natively(model, folder, state if is_sharded(model) else None)
    elif not is_partly_frozen(model) and callable(getattr(config, "save_pretrained", None)):
        config.save_pretrained(str(folder))
        write_dtype(folder / CONFIG_FILE, state)
        generation: Any = getattr(model, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(str(folder))


@torch.no_grad()
def fingerprint_of_weights(model: nn.Module, *, trainable: bool | None = None) -> str:
    """SHA-256 over names, dtypes, shapes and values of parameters and buffers, equal with and without sharding.

    Args:
        model: the policy, sharded or not.
        trainable: True takes only tensors that require gradients, False only those that do not, None all.
    """
    named = (*model.named_parameters(), *model.named_buffers())
    chosen = ((name, tensor) for name, tensor in named if trainable is None or tensor.requires_grad is trainable)
    return hash_of((name, whole(tensor.detach())) for name, tensor in chosen)
