"""Manifests with checksums, and a reader of JSON that names what is wrong with a file.

``manifest.json`` holds the SHA-256 and the size of every file of a folder, and the SHA-256 of its own entries.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from lm_core.checks import typed

MANIFEST_FILE = "manifest.json"
# 2: manifests have a checksum of their own, states of trainers are safetensors files. 1 is still read.
FORMAT_VERSION = 2
CHECKSUM = "checksum"
MOST_JSON_BYTES = 2**26


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
        if path.stat().st_size > MOST_JSON_BYTES:
            raise CheckpointError(f"{path} cannot be read: it has more than {MOST_JSON_BYTES} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except RecursionError:
        raise CheckpointError(f"{path} cannot be read: it is nested too deeply") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def to_json(content: Mapping[str, Any]) -> str:
    """A JSON object as indented text; numbers that JSON lacks (NaN, infinities) become null."""
    return json.dumps(json_value(content), indent=2, allow_nan=False) + "\n"


def json_value(value: Any) -> Any:
    """``value`` in JSON types: sequences as lists, NaN and infinities as None, other types as text."""
    if isinstance(value, Mapping):
        return {str(key): json_value(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set):
        return [json_value(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
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
    manifest = {"format_version": FORMAT_VERSION, **entries, "files": files}
    write_json(directory / MANIFEST_FILE, {**manifest, CHECKSUM: _checksum(manifest)})


def _checksum(manifest: Mapping[str, Any]) -> str:
    entries = {name: entry for name, entry in manifest.items() if name != CHECKSUM}
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of ``directory``, without a check of its files.

    Raises:
        CheckpointError: it is missing, damaged, of a later format, or names files outside the folder.
    """
    path = directory / MANIFEST_FILE
    manifest = read_json(path)
    check_format(manifest.get("format_version"), path)
    if (manifest["format_version"] > 1 or CHECKSUM in manifest) and manifest.get(CHECKSUM) != _checksum(manifest):
        raise CheckpointError(f"{path} is damaged: its entries differ from what was written")
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
