"""The folder of a training run: a lock against a second run, and a record of every start.

``checkpoints/`` has the checkpoints, ``metrics.jsonl`` the metrics, ``curves.png`` their plot, ``run.json`` command
line, seed, versions and device of the first start and of every resume, ``summary.json`` the results of a finished run.
The lock is the operating system's, so it ends with its process even after a crash.
"""

import contextlib
import datetime
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock, Timeout

from lm_core.checkpoints.atomic_io import remove_leftovers, write_file
from lm_core.checkpoints.checkpoint import list_checkpoints, on_main_process
from lm_core.checkpoints.manifest import CheckpointError, json_value, read_json, to_json
from lm_core.checkpoints.module_specs import version_of
from lm_core.checks import typed


@dataclass(frozen=True)
class Result:
    """One result of a run.

    Attributes:
        name: metric and data: "held-out bits/byte".
        after: value after training.
        before: value before training, or of the baseline; None where that has no meaning.
        better: direction of improvement.
    """

    name: str
    after: float
    before: float | None = None
    better: Literal["lower", "higher"] = "lower"


def write_summary(folder: str | Path, results: Sequence[Result], *, steps: int, seconds: float | None = None) -> Path:
    """Writes ``summary.json`` of a finished run atomically; the first result is the run's headline number.

    Args:
        folder: folder of the run.
        results: results, the most important first.
        steps: updates of the run.
        seconds: training time of this process; None if the run was already finished.

    Raises:
        ValueError: there are no results.
    """
    if not results:
        raise ValueError("results must hold at least one number, got none")
    path = Path(folder) / "summary.json"
    write_file(path, to_json({"results": [asdict(result) for result in results], "steps": steps, "seconds": seconds}))
    return path


class RunDirectory:
    """The folder of one run; its ``with`` block holds the lock.

    Every process makes one; only rank 0 locks and writes. Entering it deletes the partial files of a killed run.

    Args:
        path: the folder, created if needed.
        resume: "auto" resumes if the folder has a checkpoint, True requires one, False requires a folder without a run.
        seed: seed to record.
        device: device to record.
        settings: settings to record, converted to JSON.
        packages: distributions whose versions are recorded, in addition to python, torch, numpy and lm-core.

    Attributes:
        checkpoints: folder for ``save_checkpoint`` and ``load_checkpoint``.
        metrics_path: file for ``MetricsLog``.
        curves_path: file for ``plot_curves``.
        run_file: the record ``run.json``.
        resumes: True if the folder had a checkpoint on entry.

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
        self.path = Path(path).expanduser()
        self.checkpoints = self.path / "checkpoints"
        self.metrics_path = self.path / "metrics.jsonl"
        self.curves_path = self.path / "curves.png"
        self.run_file = self.path / "run.json"
        self.resume = resume
        self.resumes = False
        self.seed = seed
        self.device = torch.device(device)
        self.settings = dict(settings or {})
        self._packages = list(packages)
        self._lock: FileLock | None = None

    def __enter__(self) -> "RunDirectory":
        self.resumes = on_main_process(self._open)
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.release()

    def _open(self) -> bool:
        if self.path.exists() and not self.path.is_dir():
            raise FileExistsError(f"the run directory must be a folder, got the file {self.path}")
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.path / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise RuntimeError(
                f"another run is using {self.path}; wait for it to end or choose another folder"
            ) from error
        try:
            return self._start()
        except BaseException:
            self._lock.release()
            raise

    def _start(self) -> bool:
        remove_leftovers(self.path)
        remove_leftovers(self.checkpoints)
        exists = bool(list_checkpoints(self.checkpoints))
        if self.resume is True and not exists:
            raise FileNotFoundError(f"resume=True needs a checkpoint in {self.checkpoints}, there is none")
        if self.resume is False and (exists or self.run_file.exists()):
            raise FileExistsError(f"{self.path} has a run already; resume it (resume=True), or choose another folder")
        on_cuda = self.device.type == "cuda"
        hardware = torch.cuda.get_device_name(self.device) if on_cuda else platform.processor() or platform.machine()
        launch = {
            "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "argv": list(sys.argv),
            "seed": self.seed,
            "device": f"{self.device}: {hardware}",
            "world_size": int(os.environ.get("WORLD_SIZE", "1")),
            "threads": torch.get_num_threads(),
            "platform": platform.platform(),
            "versions": {
                "python": platform.python_version(),
                **{package: version_of(package) for package in ("torch", "numpy", "lm_core", *self._packages)},
            },
            "settings": json_value(self.settings),
        }
        record = {**launch, "resumed": []}
        if exists:
            with contextlib.suppress(CheckpointError):  # an unreadable record must not prevent a run
                record = read_json(self.run_file)
                record["resumed"] = [*record.get("resumed", []), launch]
        write_file(self.run_file, to_json(record))
        return exists
