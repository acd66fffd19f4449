"""A locked folder for the memories of one process; waiting for the lock has a timeout.

``parent/NAME`` is kept and can be opened again. Without a name, a new scratch folder is created and removed on
``close``, so any number of runs can share one parent. Scratch folders of killed processes are removed.
"""

import contextlib
import os
import shutil
import uuid
from pathlib import Path

from filelock import FileLock, Timeout

_SCRATCH = "scratch-"
_LOCK_FILE = ".lock"
_OWNER_FILE = "owner"
# Folders locked by this process: a second lock in the same process would wait for itself.
_held: set[Path] = set()


class MemoryDirectory:
    """The folder, locked from construction until ``close``.

    Args:
        parent: parent folder, created if needed.
        name: name of a folder that is kept; None for a scratch folder.
        timeout: seconds to wait for another process that has locked the folder.

    Raises:
        TimeoutError: another process still has the lock after ``timeout`` seconds.
        RuntimeError: this process itself has the lock.
        ValueError: ``name`` is not a plain folder name.
    """

    def __init__(self, parent: str | Path, name: str | None = None, *, timeout: float = 10.0) -> None:
        if name is not None and (name in ("", ".", "..") or Path(name).name != name or name.startswith(_SCRATCH)):
            raise ValueError(f"name must be a plain folder name that does not begin with {_SCRATCH!r}, got {name!r}")
        if timeout < 0:
            raise ValueError(f"timeout must be at least 0 seconds, got {timeout}")
        parent = Path(parent).expanduser()
        if parent.exists() and not parent.is_dir():
            raise ValueError(f"knn_memories_directory must be a folder, got the file {parent}")
        parent.mkdir(parents=True, exist_ok=True)
        self.is_scratch = name is None
        self.path = (parent / (f"{_SCRATCH}{os.getpid()}-{uuid.uuid4().hex[:12]}" if name is None else name)).resolve()
        if self.path in _held:
            raise RuntimeError(f"this process already uses the memories in {self.path}; close them first")
        self.path.mkdir(exist_ok=True)
        self._lock: FileLock | None = FileLock(self.path / _LOCK_FILE)
        try:
            self._lock.acquire(timeout=timeout)
        except Timeout as error:
            self._lock = None
            owner = "unknown"
            with contextlib.suppress(OSError):
                owner = (self.path / _OWNER_FILE).read_text(encoding="utf-8").strip() or owner
            raise TimeoutError(
                f"another process ({owner}) still uses the memories in {self.path} after {timeout:g} seconds; "
                "wait for it to end or choose another name"
            ) from error
        _held.add(self.path)
        (self.path / _OWNER_FILE).write_text(f"process {os.getpid()}\n", encoding="utf-8")
        if self.is_scratch:
            _remove_abandoned(parent)

    def close(self) -> None:
        """Releases the folder; a scratch folder is removed."""
        if self._lock is None:
            return
        lock, self._lock = self._lock, None
        _held.discard(self.path)
        if self.is_scratch and os.name != "nt":
            shutil.rmtree(self.path, ignore_errors=True)
        lock.release()
        if self.is_scratch:
            shutil.rmtree(self.path, ignore_errors=True)


def _remove_abandoned(parent: Path) -> None:
    for folder in parent.glob(f"{_SCRATCH}*"):
        if folder.resolve() in _held or not (folder / _OWNER_FILE).exists():
            continue  # locked by this process, or just being created by another
        with contextlib.suppress(Timeout, OSError), FileLock(folder / _LOCK_FILE).acquire(timeout=0):
            shutil.rmtree(folder, ignore_errors=True)
