"""Manifests with checksums, and readers of JSON and tensor files that execute nothing.

``manifest.json`` holds the SHA-256 and the size of every file of a folder. Files with tensors are read with
``weights_only=True``, which rebuilds tensors, numbers, strings and containers and rejects everything else, so an
untrusted file cannot execute code.
"""

import hashlib
import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lm_core.checks import typed

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 1


class CheckpointError(ValueError):
    """Error of an unusable checkpoint: damaged, of another format, or of another model."""


def _digest(path: Path) -> str:
    digest = hashlib.sha256()  # Python 3.10 has no hashlib.file_digest
    with path.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def check_format(version: object, where: Path) -> None:
    """Raises ``CheckpointError`` for a format this version cannot read."""
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{where} has no format version of lm-core, got {version!r}")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{where} has format version {version}, this version of lm-core reads up to {FORMAT_VERSION}; upgrade it"
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: the file is missing, is not JSON, or holds anything other than an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def to_json(content: Mapping[str, Any]) -> str:
    """A JSON object as indented text."""
    return json.dumps(content, indent=2) + "\n"


def json_value(value: Any) -> Any:
    """``value`` in JSON types: sequences as lists, keys and values of other types as text."""
    if isinstance(value, Mapping):
        return {str(key): json_value(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set):
        return [json_value(entry) for entry in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object, indented."""
    path.write_text(to_json(content), encoding="utf-8")


def write_manifest(directory: Path, **entries: Any) -> None:
    """Writes ``manifest.json`` with all files below ``directory`` and further ``entries``."""
    files = {
        file.relative_to(directory).as_posix(): {"sha256": _digest(file), "size": file.stat().st_size}
        for file in sorted(directory.rglob("*"))
        if file.is_file() and file.name != MANIFEST_FILE
    }
    write_json(directory / MANIFEST_FILE, {"format_version": FORMAT_VERSION, **entries, "files": files})


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of ``directory``, without a check of its files.

    Raises:
        CheckpointError: it is missing, damaged, of a later format, or names files outside the folder.
    """
    path = directory / MANIFEST_FILE
    manifest = read_json(path)
    check_format(manifest.get("format_version"), path)
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        raise CheckpointError(f"{path} is damaged: it has no list of files")
    for name in files:
        parts = PurePosixPath(name).parts
        if not parts or ".." in parts or PurePosixPath(name).is_absolute() or "\\" in name or ":" in name:
            raise CheckpointError(f"{path} names {name!r}, which is not inside the folder")
    return manifest


@typed
def verify_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of ``directory`` after a check of the size and SHA-256 of every file in it.

    Raises:
        CheckpointError: a file is missing or differs; the message names it.
    """
    manifest = read_manifest(directory)
    for name, expected in manifest["files"].items():
        file = directory / name
        if not file.is_file():
            raise CheckpointError(f"{directory} is damaged: {name} is missing")
        size = file.stat().st_size
        if size != expected.get("size"):
            raise CheckpointError(f"{directory} is damaged: {name} has {size} bytes, not {expected.get('size')}")
        if _digest(file) != expected.get("sha256"):
            raise CheckpointError(f"{directory} is damaged: the content of {name} differs from what was written")
    return manifest


def plain(value: Any, where: str = "state") -> Any:
    """``value`` in types that ``weights_only`` reads: tensors, numbers, strings, None, lists, tuples, dicts.

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
    try:
        torch.save(plain(state, where), path)
    except RuntimeError as error:  # torch's writer wraps the system's error in a RuntimeError
        raise OSError(f"could not write {path}: {error}") from error


@typed
def load_tensors(path: str | Path, *, map_location: Any = "cpu") -> Any:
    """Reads nested containers of tensors and numbers; nothing in the file is executed.

    Args:
        path: a file of ``torch.save``, possibly untrusted.
        map_location: device of the tensors.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged, or holds objects other than tensors, numbers and containers.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
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
