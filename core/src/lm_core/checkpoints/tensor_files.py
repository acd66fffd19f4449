"""Nested containers of tensors and numbers as one file, without pickles, and a reader of other people's files.

A file of ``save_tensors`` is a safetensors file: the tensors, and in its metadata the JSON of the containers with a
SHA-256 of everything. Files of ``torch.save`` (earlier checkpoints, other people's weights) are read where that
executes nothing: plain zip archives, with ``weights_only=True``, by a torch whose unpickler keeps that promise.
"""

import hashlib
import json
import math
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lm_core.checkpoints.atomic_io import share_as_umask_allows
from lm_core.checkpoints.manifest import CheckpointError
from lm_core.checks import typed

# below it, weights_only=True corrupts memory on a crafted file (CVE-2026-24747)
SAFE_TORCH = (2, 10)
_ZIP = b"PK\x03\x04"
_PICKLES = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))


def plain(value: Any, where: str = "state") -> Any:
    """``value`` in types that ``save_tensors`` writes: tensors, numbers, strings, None, lists, tuples, dicts.

    numpy scalars become Python's; tensors are detached, and views are cloned so that only their own data is saved.

    Raises:
        TypeError: an entry has another type; the message names it.
    """
    if value is None or type(value) in (bool, int, float, str, torch.dtype):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Tensor):
        tensor = value.detach()
        owns_all = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        return tensor if owns_all else tensor.clone()
    if isinstance(value, Mapping):
        for key in value:
            if type(key) not in (str, int):
                raise TypeError(f"{where} must have strings or integers as keys, got {key!r}")
        return {key: plain(entry, f"{where}[{key!r}]") for key, entry in value.items()}
    if isinstance(value, list | tuple):
        entries = [plain(entry, f"{where}[{index}]") for index, entry in enumerate(value)]
        return entries if isinstance(value, list) else tuple(entries)
    raise TypeError(
        f"{where} must be a tensor, a number, a string, None or a container of these, got {type(value).__name__}"
    )


def save_tensors(path: Path, state: Any, where: str = "state") -> None:
    """Writes nested containers of tensors and numbers; ``where`` is the state's name in errors.

    Raises:
        TypeError: ``state`` holds an object that could not be read back.
        OSError: the disk is full or the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    structure = json.dumps(_encoded(plain(state, where), tensors, set()))
    try:
        save_file(
            tensors, path, metadata={"structure": structure, "sha256": hash_of(sorted(tensors.items()), structure)}
        )
    except SafetensorError as error:
        raise OSError(f"could not write {path}: {error}") from error
    share_as_umask_allows(path)


def _encoded(value: Any, tensors: dict[str, Tensor], memory: set[int]) -> Any:
    """``value`` as JSON that refers to ``tensors``, which are collected; no two share ``memory``."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensor = value.cpu().contiguous()
        tensors[name] = tensor.clone() if tensor.data_ptr() in memory else tensor
        memory.add(tensor.data_ptr())
        return {"$tensor": name}
    if isinstance(value, torch.dtype):
        return {"$dtype": str(value).removeprefix("torch.")}
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": str(value)}
    if isinstance(value, dict):
        return {"$dict": [[key, _encoded(entry, tensors, memory)] for key, entry in value.items()]}
    if isinstance(value, tuple):
        return {"$tuple": [_encoded(entry, tensors, memory) for entry in value]}
    return [_encoded(entry, tensors, memory) for entry in value] if isinstance(value, list) else value


def _decoded(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decoded(entry, tensors) for entry in value]
    if not isinstance(value, dict):
        return value
    ((tag, content),) = value.items()
    if tag == "$tensor":
        return tensors[content]
    if tag == "$dtype":
        return getattr(torch, content)
    if tag == "$float":
        return float(content)
    if tag == "$tuple":
        return tuple(_decoded(entry, tensors) for entry in content)
    return {key: _decoded(entry, tensors) for key, entry in content}


def hash_of(tensors: Iterable[tuple[str, Tensor]], text: str = "") -> str:
    """SHA-256 over ``text`` and over names, dtypes, shapes and values of tensors, in the order given."""
    digest = hashlib.sha256(text.encode())
    for name, value in tensors:
        tensor = value.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@typed
def load_tensors(path: str | Path, *, map_location: Any = "cpu") -> Any:
    """Reads nested containers of tensors and numbers; nothing in the file is executed.

    Args:
        path: a file of ``save_tensors`` or ``torch.save``, possibly untrusted.
        map_location: device of the tensors.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged, or holds objects other than tensors, numbers and containers.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    with file.open("rb") as stream:
        archive = stream.read(len(_ZIP)) == _ZIP
    return _load_archive(file, map_location) if archive else _load_safetensors(file, map_location)


def _load_safetensors(path: Path, map_location: Any) -> Any:
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as content:
            metadata = content.metadata() or {}
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
        structure = metadata["structure"]
        if metadata["sha256"] != hash_of(sorted(tensors.items()), structure):
            raise CheckpointError(f"{path} is damaged: its content differs from what was written")
        placed = {name: tensor.to(map_location) for name, tensor in tensors.items()}
        return _decoded(json.loads(structure), placed)
    except CheckpointError:
        raise
    except Exception as error:  # errors of many types on damaged bytes
        with path.open("rb") as stream:
            if stream.read(2) in _PICKLES:
                raise _pickle_error(path) from error
        raise CheckpointError(f"{path} is damaged or is no file of tensors: {error}") from error


def _pickle_error(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is a pickle, as torch.save wrote before version 1.6, which could run code; nothing was run. If it is "
        "yours, convert it: state = torch.load(path, weights_only=True), then safetensors.torch.save_file(state, path) "
        "or torch.save(state, path)"
    )


def check_archive(path: Path) -> None:
    """Rejects a file that ``torch.load`` should not be called for.

    Raises:
        CheckpointError: it is no plain zip archive of ``torch.save``, or this torch is not safe with one.
    """
    if torch_version() < SAFE_TORCH:
        raise CheckpointError(
            f"{path} is a file of torch.save, which torch {torch.__version__} cannot read safely (CVE-2026-24747); "
            "upgrade torch to 2.10 or later"
        )
    with path.open("rb") as stream:
        if stream.read(2) in _PICKLES:
            raise _pickle_error(path)
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.partition("/")[2] for name in archive.namelist()]
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or is no file of torch.save: {error}") from error
    if "data.pkl" not in names or "constants.pkl" in names or any(name.startswith("code/") for name in names):
        raise CheckpointError(f"{path} is no plain archive of torch.save; nothing was run")


def _load_archive(path: Path, map_location: Any) -> Any:
    check_archive(path)
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own message suggests weights_only=False, which would execute a malicious file
        match = re.search(r"unsupported (?:global|class|operand):? [\w. ]+", str(error), re.IGNORECASE)
        detail = f" ({match[0].strip()})" if match else ""
        raise CheckpointError(
            f"{path} holds more than tensors and numbers, or is damaged; "
            f"it was refused and nothing in it was run{detail}"
        ) from error
    except Exception as error:  # zip reader, unpickler and tensor code raise errors of many types on damaged bytes
        raise CheckpointError(f"{path} is damaged or is no file of torch.save: {error}") from error


def torch_version() -> tuple[int, int]:
    """Major and minor version of torch."""
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)
