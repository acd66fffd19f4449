"""The folder of a training run: one run at a time in it, and a record of how it was started.

``checkpoints/`` has the checkpoints, ``metrics.jsonl`` the rows, ``curves.png`` the picture, ``run.json`` command line,
seed, versions and device of the first start and of every resume, ``summary.json`` what a finished run came to. A lock
of the operating system keeps a second run out; it is gone with its process, however that ended.
"""

import datetime
import importlib.metadata
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch
from filelock import FileLock, Timeout

import lm_core
from lm_core.checkpoints.atomic_io import remove_leftovers, write_file
from lm_core.checkpoints.checkpoint import list_checkpoints, on_main_process
from lm_core.checkpoints.manifest import CheckpointError, read_json, to_json
from lm_core.checks import typed


@dataclass(frozen=True)
class Result:
    """One number that a run came to.

    Attributes:
        name: what, and on what: "held-out bits/byte".
        after: the number.
        before: the same before training, or of the baseline; None where that has no meaning.
        better: which way it should go.
    """

    name: str
    after: float
    before: float | None = None
    better: Literal["lower", "higher"] = "lower"


def write_summary(folder: str | Path, results: Sequence[Result], *, steps: int, seconds: float | None = None) -> Path:
    """Writes ``summary.json`` of a finished run, whole or not at all; the first result is the run's key number.

    Args:
        folder: of the run.
        results: at least one, the most important first.
        steps: updates of the run.
        seconds: that this process worked; None where the run was found finished.

    Raises:
        ValueError: there is no result.
    """
    if not results:
        raise ValueError("results must hold at least one number, got none")
    path = Path(folder) / "summary.json"
    write_file(path, to_json({"results": [asdict(one) for one in results], "steps": steps, "seconds": seconds}))
    return path


def _versions(packages: Sequence[str]) -> dict[str, str | None]:
    versions: dict[str, str | None] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "lm_core": lm_core.__version__,
    }
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device}: {torch.cuda.get_device_name(device)}"
    return f"{device}: {platform.processor() or platform.machine()}"


class RunDirectory:
    """The folder of one run; use it in a ``with`` block, which holds the lock.

    Every process makes one; only rank 0 locks and writes. Entering it deletes what a killed run left half-written.

    Args:
        path: made if needed.
        resume: "auto" goes on if the folder has a checkpoint, True demands one, False demands a folder without a run.
        seed: recorded.
        device: recorded.
        settings: recorded; anything JSON can hold.
        packages: distributions whose versions are recorded, besides python, torch, numpy and lm-core.

    Raises (on entering):
        RuntimeError: another run is using the folder.
        FileNotFoundError: ``resume=True`` and there is no checkpoint.
        FileExistsError: ``resume=False`` and the folder has a run, or the path is a file.
    """

    @typed
    def __init__(
        self,
        path: str | Path,
        *,
        resume: bool | Literal["auto"] = "auto",
        seed: int | None = None,
        device: torch.device | str = "cpu",
        settings: Mapping[str, Any] | None = None,
        packages: Sequence[str] = (),
    ) -> None:
        self.path = Path(path)
        self.resume = resume
        self.resumes = False
        self.seed, self.device, self.settings = seed, torch.device(device), dict(settings or {})
        self._packages = list(packages)
        self._lock: FileLock | None = None

    @property
    def checkpoints(self) -> Path:
        """Folder for ``save_checkpoint`` and ``load_checkpoint``."""
        return self.path / "checkpoints"

    @property
    def metrics_path(self) -> Path:
        """File for ``MetricsLog``."""
        return self.path / "metrics.jsonl"

    @property
    def curves_path(self) -> Path:
        """File for ``plot_curves``."""
        return self.path / "curves.png"

    @property
    def run_file(self) -> Path:
        """The record ``run.json``."""
        return self.path / "run.json"

    def __enter__(self) -> "RunDirectory":
        self.resumes = on_main_process(self._open)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _open(self) -> bool:
        if self.path.exists() and not self.path.is_dir():
            raise FileExistsError(f"the run directory must be a folder, got the file {self.path}")
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise RuntimeError(
                f"another run is using {self.path}; wait for it to end or choose another folder"
            ) from error
        try:
            resumes = self._start()
        except BaseException:
            lock.release()
            raise
        self._lock = lock
        return resumes

    def _start(self) -> bool:
        remove_leftovers(self.path)
        remove_leftovers(self.checkpoints)
        exists = bool(list_checkpoints(self.checkpoints))
        if self.resume is True and not exists:
            raise FileNotFoundError(f"resume=True needs a checkpoint in {self.checkpoints}, there is none")
        if self.resume is False and (exists or self.run_file.exists()):
            raise FileExistsError(f"{self.path} has a run already; resume it (resume=True), or choose another folder")
        launch = self._launch()
        earlier = self._earlier()
        record = {**launch, "resumed": []} if not exists or earlier is None else earlier
        if exists and earlier is not None:
            record["resumed"] = [*record.get("resumed", []), launch]
        write_file(self.run_file, to_json(record))
        return exists

    def _earlier(self) -> dict[str, Any] | None:
        if not self.run_file.exists():
            return None
        try:
            return read_json(self.run_file)
        except CheckpointError:  # a record is no reason to refuse a run
            return None

    def _launch(self) -> dict[str, Any]:
        return {
            "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "argv": list(sys.argv),
            "seed": self.seed,
            "device": _device_name(self.device),
            "world_size": int(os.environ.get("WORLD_SIZE", "1")),
            "threads": torch.get_num_threads(),
            "platform": platform.platform(),
            "versions": _versions(self._packages),
            "settings": {name: _json_value(value) for name, value in self.settings.items()},
        }


def _json_value(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _json_value(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set):
        return [_json_value(entry) for entry in value]
    return str(value)
