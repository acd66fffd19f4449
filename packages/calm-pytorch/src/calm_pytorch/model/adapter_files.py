"""The learned part of a composition as a folder: safetensors, the wiring in its metadata, a manifest.

Loading is strict: an adapter of another wiring, or of models of other widths, is refused, and what differs is named.
"""

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lm_core.checkpoints.atomic_io import new_directory, remove_directory
from lm_core.checkpoints.manifest import CheckpointError, verify_manifest, write_manifest
from lm_core.checkpoints.weights import load_weights, read_weights

ADAPTER_FILE = "adapter.safetensors"
METADATA_KEY = "calm_pytorch"


def save_adapter(cross_attns: nn.Module, wiring: dict[str, Any], directory: str | Path, *, overwrite: bool) -> Path:
    """Writes the cross-attentions into a folder, atomically.

    Args:
        cross_attns: the learned part.
        wiring: ``CALM.wiring``.
        directory: a new or empty folder; with ``overwrite`` also one that holds an adapter.
        overwrite: whether an adapter may be replaced.

    Raises:
        FileExistsError: there is something that may not be replaced.
        OSError: the folder cannot be written.
    """
    from safetensors.torch import save_file

    target = Path(directory)
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"directory must be a folder, got the file {target}")
    occupied = target.is_dir() and any(target.iterdir())
    if occupied and not (overwrite and (target / ADAPTER_FILE).is_file()):
        raise FileExistsError(f"directory must be new or empty, or an adapter with overwrite=True, got {target}")
    state: dict[str, Tensor] = {n: t.detach().cpu().contiguous() for n, t in cross_attns.state_dict().items()}
    if occupied:
        remove_directory(target)
    with new_directory(target) as temporary:
        metadata = {"format": "pt", METADATA_KEY: json.dumps({"format_version": 1, **wiring})}
        save_file(state, temporary / ADAPTER_FILE, metadata=metadata)
        write_manifest(temporary)
    return target


def load_adapter(cross_attns: nn.Module, wiring: dict[str, Any], directory: str | Path) -> None:
    """Loads the cross-attentions of a composition; they stay as they were if anything does not fit.

    Args:
        cross_attns: the learned part.
        wiring: ``CALM.wiring``.
        directory: the folder.

    Raises:
        FileNotFoundError: there is no adapter.
        CheckpointError: it is damaged, of another wiring, or keys or shapes differ; they are named.
    """
    from safetensors import SafetensorError, safe_open

    folder = Path(directory)
    file = folder / ADAPTER_FILE
    if not file.is_file():
        raise FileNotFoundError(f"directory must hold {ADAPTER_FILE}, got {folder}")
    verify_manifest(folder)
    try:
        with safe_open(file, framework="pt") as stream:
            stored = json.loads((stream.metadata() or {}).get(METADATA_KEY, "null"))
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(stored, dict):
        raise CheckpointError(f"{file} has no wiring of a composition in its metadata")
    differing = [
        f"{name} is {value}, but was {stored.get(name)}" for name, value in wiring.items() if value != stored.get(name)
    ]
    if differing:
        raise CheckpointError(f"{folder} is an adapter of another wiring: {'; '.join(differing)}")
    load_weights(cross_attns, read_weights(file), where=str(folder))
