"""Checkpoints of training runs that survive a kill at any instant and resume exactly.

A checkpoint is a folder ``step-N``: ``config.json``, ``model.safetensors`` and ``tokenizer/`` (so it opens with
``from_pretrained``), ``trainer.safetensors`` (optimizer, schedule, data cursor), ``rng-R.safetensors`` for each
process, and ``manifest.json`` with the SHA-256 and size of each file; states of format 1 were files of ``torch.save``.
It is always a NEW folder: written under a temporary name, flushed to disk, renamed; only then are older ones removed. A
step that is saved again (after going back to an earlier one) becomes ``step-N-2``. "Newest" means written last,
according to the manifest's ``sequence``.

Loading checks the manifest. If the newest checkpoint is damaged, a warning names it and the one before is used.
Nothing in a file is executed: see ``lm_core.checkpoints.tensor_files``.
"""

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from lm_core.checkpoints.atomic_io import new_directory, real_path, remove_directory, remove_leftovers
from lm_core.checkpoints.manifest import (
    CheckpointError,
    read_json,
    read_manifest,
    verify_manifest,
    write_manifest,
)
from lm_core.checkpoints.pretrained import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    PretrainedMixin,
    check_config,
    check_tokenizer,
    download,
    write_model,
)
from lm_core.checkpoints.tensor_files import load_tensors, plain, save_tensors
from lm_core.checkpoints.weights import load_weights, read_weights, save_weights, unwrapped
from lm_core.checks import typed
from lm_core.distributed import broadcast_object, rank, world_size
from lm_core.rng import capture_rng
from lm_core.tokenizers import HUB_ID

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "PretrainedMixin",
    "checkpoint_folder",
    "latest_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "load_tensors",
    "load_weights",
    "read_weights",
    "remove_leftovers",
    "save_checkpoint",
    "save_weights",
]

TRAINER_STATE = "trainer"
_NAME = re.compile(r"step-(\d+)(?:-(\d+))?")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read by ``load_checkpoint``.

    Attributes:
        path: folder of the checkpoint.
        step: number of updates done when it was saved.
        config: content of ``config.json``; empty if the model had none.
        trainer_state: the ``trainer_state`` of ``save_checkpoint``.
        rng: this process's random states, for ``restore_rng``.
        model_state: the weights, on the CPU; None if they were loaded into a model.
    """

    path: Path
    step: int
    config: dict[str, Any]
    trainer_state: dict[str, Any]
    rng: dict[str, Any]
    model_state: dict[str, Tensor] | None


def on_main_process(work: Callable[[], Any]) -> Any:
    """Runs ``work`` on rank 0; every rank returns its result or raises, so that none waits forever for rank 0."""
    result: Any = None
    error: Exception | None = None
    if rank() == 0:
        try:
            result = work()
        except Exception as raised:
            error = raised
    result, failure = broadcast_object((result, None if error is None else f"{type(error).__name__}: {error}"))
    if error is not None:
        raise error
    if failure is not None:
        raise RuntimeError(f"rank 0 failed, so this process stops too: {failure}")
    return result


def list_checkpoints(directory: str | Path) -> list[Path]:
    """The checkpoint folders in ``directory``, intact or damaged, in the order they were written.

    Those without a readable manifest come last, since their age is unknown.
    """
    folder = Path(directory).expanduser()
    if not folder.is_dir():
        return []
    checkpoints = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    sequences = {path: _sequence(path) for path in checkpoints}
    return sorted(checkpoints, key=lambda path: (sequences[path] is None, sequences[path] or 0, _step_of(path)))


def _step_of(path: Path) -> tuple[int, int]:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1]), int(match[2] or 1)


def _sequence(path: Path) -> int | None:
    try:
        sequence = read_manifest(path).get("sequence")
    except CheckpointError:
        return None
    return sequence if type(sequence) is int else None


@typed
def save_checkpoint(
    directory: str | Path,
    step: int,
    *,
    model: nn.Module | Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    trainer_state: Mapping[str, Any] | None = None,
    rng: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    assets: Callable[[Path], None] | None = None,
    keep: int | None = 3,
) -> Path:
    """Writes a checkpoint and then removes the oldest ones. Every process calls it; rank 0 writes.

    Args:
        directory: folder of the run's checkpoints, created if needed; only one run at a time may write to it.
        step: number of updates done.
        model: the model, or its full state dict (gathered from shards; only rank 0's is used).
        config: configuration for ``from_pretrained``; by default the model's own if it is a ``PretrainedMixin``.
        trainer_state: nested dicts, lists and tuples of tensors and numbers: optimizer, schedule, data cursor.
        rng: this process's random states, by default ``capture_rng()``.
        tokenizer: tokenizer with ``save_pretrained``, stored in ``tokenizer/``.
        assets: writes further files into the new folder, such as an adapter in peft's form; called on rank 0.
        keep: number of checkpoints to keep, the new one included; None for all.

    Returns:
        The new folder.

    Raises:
        ValueError: ``step`` is negative or ``keep`` below 1.
        TypeError: a state holds something that could not be read back; the message names it.
        OSError: the disk is full or the folder cannot be written. Earlier checkpoints are untouched, and no part of
            the new one is left.
    """
    if step < 0:
        raise ValueError(f"step must not be negative, got {step}")
    if keep is not None and keep < 1:
        raise ValueError(f"keep must be at least 1 or None, got {keep}")
    check_tokenizer(tokenizer)
    # random states of all processes, which rank 0 writes
    local_rng = plain(capture_rng() if rng is None else rng, "rng")
    all_rng: list[Any] = [local_rng]
    if world_size() > 1:
        gathered: list[Any] | None = [None] * world_size() if rank() == 0 else None
        dist.gather_object(local_rng, gathered, dst=0)
        all_rng = gathered or []

    def write() -> Path:
        state = plain(trainer_state or {}, "trainer_state")
        target = _new_name(real_path(directory), step)
        try:
            with new_directory(target) as temporary:
                write_model(temporary, model, config=config, tokenizer=tokenizer)
                if assets is not None:
                    assets(temporary)
                save_tensors(temporary / f"{TRAINER_STATE}.safetensors", state, "trainer_state")
                for process, rank_rng in enumerate(all_rng):
                    save_tensors(temporary / f"rng-{process}.safetensors", rank_rng, "rng")
                sequence = 1 + max((_sequence(path) or 0 for path in list_checkpoints(directory)), default=0)
                write_manifest(temporary, step=step, world_size=len(all_rng), sequence=sequence)
        except OSError as error:
            raise OSError(
                f"the checkpoint {target} could not be written ({error}); earlier checkpoints are untouched"
            ) from error
        if keep is not None:
            _prune(Path(directory), target, keep)
        return target

    path: Path = on_main_process(write)
    return path


def _new_name(directory: Path, step: int) -> Path:
    attempt = 1
    while (path := directory / (f"step-{step}" if attempt == 1 else f"step-{step}-{attempt}")).exists():
        attempt += 1
    return path


def _prune(directory: Path, newest: Path, keep: int) -> None:
    others = [path for path in list_checkpoints(directory) if path != newest]
    # those without a readable manifest are removed first, although they are listed last
    others.sort(key=lambda path: _sequence(path) or -1)
    for path in others[: max(0, len(others) - (keep - 1))]:
        remove_directory(path)


def latest_checkpoint(directory: str | Path) -> Path | None:
    """The newest intact checkpoint, or None without any; a warning names each newer one that is damaged.

    Raises:
        CheckpointError: there are checkpoints, and all of them are damaged.
    """
    damages = []
    for path in reversed(list_checkpoints(directory)):
        try:
            verify_manifest(path)
        except CheckpointError as error:
            damages.append(f"{path.name}: {error}")
            continue
        for damage in damages:
            warnings.warn(f"skipped a damaged checkpoint, using {path.name} instead. {damage}", stacklevel=2)
        return path
    if damages:
        raise CheckpointError(f"every checkpoint in {directory} is damaged: {'; '.join(damages)}")
    return None


def checkpoint_folder(path: str | Path) -> Path:
    """The folder with a model: ``path`` itself, a run's newest intact checkpoint, or the snapshot of a hub model.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: all checkpoints of the run are damaged.
        ImportError: ``path`` is a hub name, and the extra ``hub`` is not installed.
    """
    folder = Path(path).expanduser()
    if isinstance(path, str) and HUB_ID.fullmatch(path) and not folder.exists():
        return download(path)
    if any((folder / name).is_file() for name in (CONFIG_FILE, "adapter_config.json")):
        return folder
    for place in (folder / "checkpoints", folder):
        newest = latest_checkpoint(place)
        if newest is not None:
            return newest
    raise FileNotFoundError(
        f"model must be a folder with a model, the folder of a run, or organisation/name, got {path}"
    )


@typed
def load_checkpoint(directory: str | Path, *, model: nn.Module | None = None, step: int | None = None) -> Checkpoint:
    """Reads the newest intact checkpoint, or a chosen one. Every process calls it and gets its own random states.

    Everything is read and checked before the model is changed.

    Args:
        directory: folder of a run's checkpoints, or one checkpoint ``step-N``.
        model: model to load the weights into, strictly; without it they are returned.
        step: step to read instead of the newest; a damaged checkpoint of it is an error.

    Raises:
        FileNotFoundError: there is no checkpoint, or none of this step.
        CheckpointError: it is damaged, was written by another number of processes, or does not fit the model; the
            message names files, classes and keys.
    """
    path: Path = on_main_process(lambda: _choose(Path(directory).expanduser(), step))
    manifest = read_manifest(path)
    files = manifest["files"]
    suffix = ".pt" if f"{TRAINER_STATE}.pt" in files else ".safetensors"
    for name in (WEIGHTS_FILE, f"{TRAINER_STATE}{suffix}"):
        if name not in files:
            raise CheckpointError(f"{path} is no checkpoint of a training run: its manifest does not name {name}")
    if manifest.get("world_size") != world_size():
        raise CheckpointError(
            f"{path} was written by {manifest.get('world_size')} processes and can only be resumed by as many, "
            f"got {world_size()}; from_pretrained loads its weights anywhere"
        )
    config = read_json(path / CONFIG_FILE) if CONFIG_FILE in files else {}
    model = None if model is None else unwrapped(model)
    if isinstance(model, PretrainedMixin) and config:
        check_config(type(model), config, path / CONFIG_FILE)
    trainer_state = load_tensors(path / f"{TRAINER_STATE}{suffix}")
    rng = load_tensors(path / f"rng-{rank()}{suffix}")
    state = read_weights(path / WEIGHTS_FILE)
    if model is not None:
        load_weights(model, state, where=str(path))
    return Checkpoint(
        path=path,
        step=int(manifest.get("step", _step_of(path)[0])),
        config=config,
        trainer_state=trainer_state,
        rng=rng,
        model_state=state if model is None else None,
    )


def _choose(directory: Path, step: int | None) -> Path:
    if _NAME.fullmatch(directory.name) and directory.is_dir():
        verify_manifest(directory)
        return directory
    if step is None:
        path = latest_checkpoint(directory)
        if path is None:
            raise FileNotFoundError(f"there is no checkpoint in {directory}")
        return path
    attempts = [path for path in list_checkpoints(directory) if _step_of(path)[0] == step]
    if not attempts:
        steps = sorted({_step_of(path)[0] for path in list_checkpoints(directory)})
        raise FileNotFoundError(f"there is no checkpoint of step {step} in {directory}, which has {steps}")
    verify_manifest(attempts[-1])
    return attempts[-1]
