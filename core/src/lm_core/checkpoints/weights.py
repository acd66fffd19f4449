"""A model's weights as one safetensors file: tied weights stored once, strict loading, errors that name keys.

Tied weights (an embedding that is also the output layer) have several names and one memory. The file keeps the first
name; loading restores the others in a model that ties them too, and reports them as missing in any other model.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lm_core.checkpoints.atomic_io import share_as_umask_allows
from lm_core.checkpoints.manifest import CheckpointError
from lm_core.checkpoints.tensor_files import load_tensors
from lm_core.checks import typed

_SHOWN = 8
Convert = Callable[[Any, dict[str, Tensor]], dict[str, Tensor]]
_layouts: dict[type[nn.Module], Convert] = {}


def register_layouts(kind: type[nn.Module], convert: Convert) -> None:
    """Makes ``load_state_file`` pass every state dict for a ``kind`` through ``convert(model, state)``.

    A model can thus read files of earlier formats without importing the code that converts them.
    """
    _layouts[kind] = convert


@typed
def read_state_file(path: str | Path) -> dict[str, Tensor]:
    """A state dict from one file, ``.safetensors`` or of ``torch.save``; nothing in it is executed.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is a folder, damaged, or holds anything other than named tensors.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        raise CheckpointError(f"{file} is a folder; open it with from_pretrained")
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    state = read_weights(file) if file.suffix == ".safetensors" else load_tensors(file)
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{file} must hold a state dict, got {type(state).__name__}")
    wrong = [f"{name} ({type(value).__name__})" for name, value in state.items() if not isinstance(value, Tensor)]
    if wrong or not state:
        raise CheckpointError(f"{file} must hold tensors by name, got {', '.join(wrong[:_SHOWN]) or 'nothing'}")
    return {str(name): value.detach() for name, value in state.items()}


def load_state_file(model: nn.Module, path: str | Path, *, convert: Convert | None = None) -> None:
    """Loads a state dict file into ``model``, cast to its dtypes; after an error the model is unchanged.

    Args:
        model: model to load the weights into.
        path: a file for ``read_state_file``.
        convert: ``convert(model, state)`` returns the state in the model's layout; by default the registered function.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged or does not fit; the message names the keys.
    """
    if Path(path).is_dir():
        raise CheckpointError(f"{path} is a folder; open it with {type(model).__name__}.from_pretrained")
    state = read_state_file(path)
    convert = convert or next((_layouts[kind] for kind in type(model).__mro__ if kind in _layouts), None)
    if convert is not None:
        state = convert(model, state)
    current = model.state_dict()
    state = {name: value.to(current[name].dtype) if name in current else value for name, value in state.items()}
    load_weights(model, state, where=str(path))


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``, ``DistributedDataParallel`` and ``DataParallel``."""
    while True:
        wrapped = getattr(model, "_orig_mod", None)  # of torch.compile
        if wrapped is None and isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            wrapped = model.module
        if not isinstance(wrapped, nn.Module):
            return model
        model = wrapped


def _tied(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Maps each name to the first name of the same memory."""
    first: dict[object, str] = {}
    names = {}
    for name, tensor in state.items():
        alone = tensor.numel() == 0 or tensor.is_meta
        memory = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), str(tensor.device))
        names[name] = name if alone else first.setdefault(memory, name)
    return names


def save_weights(path: Path, model: nn.Module | Mapping[str, Tensor]) -> None:
    """Writes a model's state dict, or one collected from shards, without copies of tied weights and names of wrappers.

    Raises:
        TypeError: the state dict holds anything other than tensors.
        OSError: the disk is full or the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    state = unwrapped(model).state_dict() if isinstance(model, nn.Module) else dict(model)
    if state and not isinstance(model, nn.Module) and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}  # of DistributedDataParallel
    state = {name.replace("_orig_mod.", ""): value for name, value in state.items()}  # compiled submodules
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"model state {name!r} must be a tensor, got {type(value).__name__}")
    tied = _tied(state)
    kept: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, value in state.items():
        if tied[name] != name:
            continue
        tensor = value.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in storages:
            tensor = tensor.clone()  # safetensors refuses tensors that overlap
        storages.add(tensor.untyped_storage().data_ptr())
        kept[name] = tensor
    try:
        save_file(kept, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"could not write {path}: {error}") from error
    share_as_umask_allows(path)


@typed
def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        CheckpointError: the file is missing, damaged, or of another kind.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors, nothing was loaded: {error}") from error


def _listed(title: str, entries: list[str]) -> list[str]:
    if not entries:
        return []
    more = f" and {len(entries) - _SHOWN} more" if len(entries) > _SHOWN else ""
    return [f"{title}: {', '.join(entries[:_SHOWN])}{more}"]


@typed
def load_weights(
    model: nn.Module, state: dict[str, Tensor], *, dtypes: Literal["equal", "stored"] = "equal", where: str = "state"
) -> None:
    """Copies ``state`` into ``model`` if every key and shape fits; otherwise the model is unchanged.

    Args:
        model: model to load the values into.
        state: tensors by name, as from ``read_weights``.
        dtypes: "equal" rejects a tensor of another dtype; "stored" changes the model to the stored dtypes.
        where: name of the source in errors.

    Raises:
        CheckpointError: keys are missing, unexpected or do not fit; the message names them.
    """
    model = unwrapped(model)
    upgrade = getattr(model, "upgrade_state", None)  # of a ``PretrainedMixin``
    if callable(upgrade):
        state = upgrade(state)
    # names without those of compiled submodules, as they are stored
    held = model.state_dict()
    names = {name.replace("_orig_mod.", ""): name for name in held}
    current = {name: held[inner] for name, inner in names.items() if isinstance(held[inner], Tensor)}
    # names that tied weights have in the model, of which the file needs only one
    tied = _tied(current)
    present: dict[str, str] = {}
    differing = []
    for name in state:
        if name not in current:
            continue
        twin = present.setdefault(tied[name], name)
        if twin != name and not torch.equal(state[twin], state[name]):
            differing.append(f"{name} and {twin}")
    missing = [name for name in current if tied[name] not in present]
    shapes, kinds = [], []
    for name in current.keys() & state.keys():
        if current[name].shape != state[name].shape:
            shapes.append(f"{name} (stored {tuple(state[name].shape)}, model {tuple(current[name].shape)})")
        elif dtypes == "equal" and current[name].dtype != state[name].dtype:
            kinds.append(f"{name} (stored {state[name].dtype}, model {current[name].dtype})")
    problems = [
        *_listed("missing keys", missing),
        *_listed("unexpected keys", [name for name in state if name not in current]),
        *_listed("shapes that differ", sorted(shapes)),
        *_listed("dtypes that differ", sorted(kinds)),
        *_listed("tied in the model but different in the file", differing),
    ]
    if problems:
        raise CheckpointError(f"{where} does not fit {type(model).__name__}: {'; '.join(problems)}")
    full = {name: state[name] if name in state else state[present[tied[name]]] for name in current}
    full = {names[name]: value for name, value in full.items()}
    if dtypes == "stored":
        _adopt_dtypes(model, full)
    model.load_state_dict(full, strict=False)  # checked above; extra state, which is not stored, may be missing


def _adopt_dtypes(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        if name in state and tensor.dtype != state[name].dtype:
            tensor.data = tensor.data.to(state[name].dtype)
