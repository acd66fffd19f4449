"""The learned part of a composition as a folder: safetensors with the wiring and a hash in its metadata.

Loading is strict: an adapter of another wiring, or of models of other widths, is refused, and what differs is named.
One file holds everything, so that replacing it leaves the old adapter or the new one, whole.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lm_core.checkpoints.atomic_io import new_directory, new_file, share_as_umask_allows
from lm_core.checkpoints.manifest import MANIFEST_FILE, CheckpointError, verify_manifest
from lm_core.checkpoints.tensor_files import hash_of
from lm_core.checkpoints.weights import load_weights, read_weights, unwrapped

ADAPTER_FILE = "adapter.safetensors"
METADATA_KEY = "calm_pytorch"


def save_adapter(
    cross_attns: nn.Module,
    wiring: Mapping[str, Any],
    directory: str | Path,
    *,
    overwrite: bool,
    models: Mapping[str, Any],
) -> Path:
    """Writes the cross-attentions into a folder, atomically.

    Args:
        cross_attns: the learned part.
        wiring: ``CALM.wiring``.
        directory: a new or empty folder; with ``overwrite`` also one that holds an adapter.
        overwrite: whether an adapter may be replaced.
        models: names of the composed models, as JSON values.

    Raises:
        FileExistsError: there is something that may not be replaced.
        OSError: the folder cannot be written.
    """
    target = Path(directory).expanduser()
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"directory must be a folder, got the file {target}")
    occupied = target.is_dir() and any(target.iterdir())
    if occupied and not (overwrite and (target / ADAPTER_FILE).is_file()):
        raise FileExistsError(f"directory must be new or empty, or an adapter with overwrite=True, got {target}")
    # not state_dict(), for which FSDP would shard gathered weights again; there are no buffers
    named = unwrapped(cross_attns).named_parameters()
    # copies: FSDP frees the memory of gathered weights, which a view for hashing would hold
    state = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in named}
    stored = {"format_version": 2, **wiring, "models": dict(models)}
    metadata = {METADATA_KEY: json.dumps({**stored, "sha256": _digest(state, stored)})}
    if not occupied:
        with new_directory(target) as temporary:
            _write(state, temporary / ADAPTER_FILE, metadata)
            share_as_umask_allows(temporary / ADAPTER_FILE)
        return target
    with new_file(target / ADAPTER_FILE) as file:
        _write(state, file, metadata)
        share_as_umask_allows(file)
        (target / MANIFEST_FILE).unlink(missing_ok=True)  # of the first format, which would not fit the new file
    return target


def _write(state: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(state, file, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"could not write {file}: {error}") from error


def read_adapter(directory: str | Path) -> dict[str, Any]:
    """The wiring and the names of the models (``models``) of an adapter; ``{}`` names for one of the first format.

    Raises:
        FileNotFoundError: there is no adapter.
        CheckpointError: it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    folder = Path(directory).expanduser()
    file = folder / ADAPTER_FILE
    if not file.is_file():
        raise FileNotFoundError(f"directory must hold {ADAPTER_FILE}, got {folder}")
    if (folder / MANIFEST_FILE).is_file():
        verify_manifest(folder)
    try:
        with safe_open(file, framework="pt") as stream:
            stored = json.loads((stream.metadata() or {}).get(METADATA_KEY, "null"))
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(stored, dict):
        raise CheckpointError(f"{file} has no wiring of a composition in its metadata")
    return {"models": {}, **stored}


def load_adapter(cross_attns: nn.Module, wiring: Mapping[str, Any], directory: str | Path) -> None:
    """Loads the cross-attentions of a composition; they stay as they were if anything does not fit.

    Args:
        cross_attns: the learned part.
        wiring: ``CALM.wiring``.
        directory: the folder.

    Raises:
        FileNotFoundError: there is no adapter.
        CheckpointError: it is damaged, of another wiring, or keys or shapes differ; they are named.
    """
    stored = read_adapter(directory)
    differing = [
        f"{name} is {value}, but was {stored.get(name)}" for name, value in wiring.items() if value != stored.get(name)
    ]
    if differing:
        raise CheckpointError(f"{directory} is an adapter of another wiring: {'; '.join(differing)}")
    state = read_weights(Path(directory).expanduser() / ADAPTER_FILE)
    hashed = stored.pop("sha256", None)  # none in the first format, which has a manifest
    if hashed is not None and hashed != _digest(state, stored):
        raise CheckpointError(f"{Path(directory) / ADAPTER_FILE} is damaged: it has another hash")
    load_weights(unwrapped(cross_attns), state, where=str(directory))


def _digest(state: Mapping[str, Tensor], stored: Mapping[str, Any]) -> str:
    return hash_of(sorted(state.items()), json.dumps(stored, sort_keys=True))
