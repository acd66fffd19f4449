"""Atomic directory and file writes (temporary sibling, fsync, rename), safe against a kill at any instant.

A folder is filled under a temporary name next to its final one, every file and folder in it is flushed to disk, and one
rename puts it in place; the parent is flushed too, because on POSIX a rename is stored in the parent's entries. Removal
runs in reverse: first a rename to a temporary name, then the deletion, so that no half-deleted folder has a real name.
Windows cannot flush a folder; there the rename alone must suffice.
"""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

TEMPORARY_PREFIX = ".tmp-"


def fsync_path(path: Path) -> None:
    """Flushes one file, or the entries of one folder, to disk."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(directory: Path) -> None:
    """Flushes every file and folder below ``directory``, and ``directory`` itself."""
    for entry in sorted(directory.rglob("*"), reverse=True):
        fsync_path(entry)
    fsync_path(directory)


def temporary_sibling(path: Path) -> Path:
    """A fresh name next to ``path`` that ``remove_leftovers`` recognises."""
    return path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{os.getpid()}-{uuid.uuid4().hex[:8]}")


@contextlib.contextmanager
def new_directory(target: Path, last: str = "manifest.json") -> Iterator[Path]:
    """Yields an empty temporary folder that becomes ``target`` when the block ends without an error.

    An error leaves neither a new ``target`` nor the temporary folder. An empty folder that is there already (also the
    current one, a mount point, or one that a link points to) stays the same folder and is filled entry by entry.

    Args:
        target: folder to make, which does not exist or is empty; "~" is the home folder.
        last: name of the entry that is put into an existing folder last, since it vouches for the others.
    """
    target = real_path(target)
    exists = target.is_dir()
    temporary = temporary_sibling(target / last if exists else target)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    temporary.mkdir()
    try:
        yield temporary
        share_as_umask_allows(*(entry for entry in temporary.rglob("*") if entry.is_file()))
        fsync_tree(temporary)
        if exists:
            if others := [entry.name for entry in target.iterdir() if entry != temporary]:
                raise FileExistsError(f"{target} must be new or empty, it has {sorted(others)[:5]}")
            for entry in sorted(temporary.iterdir(), key=lambda entry: entry.name == last):
                entry.rename(target / entry.name)
            temporary.rmdir()
        else:
            temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_path(target if exists else target.parent)


def real_path(path: str | os.PathLike[str]) -> Path:
    """``path`` as a person means it: "~" is the home folder, and a link is what it points to."""
    return Path(os.path.realpath(Path(path).expanduser()))


def share_as_umask_allows(*files: Path) -> None:
    """Gives files the permissions of any new file; safetensors writes files that only their owner can read."""
    for file in files:
        if file.stat().st_mode & 0o077 == 0:
            probe = temporary_sibling(file)
            probe.touch()
            file.chmod(probe.stat().st_mode & 0o777)
            probe.unlink()


def remove_directory(directory: Path) -> None:
    """Deletes a folder; a kill midway leaves at most a folder of a temporary name."""
    doomed = temporary_sibling(directory)
    directory.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(parent: Path, name: str = "") -> list[Path]:
    """Deletes and returns temporary entries of killed writers; call it only while nothing writes to ``parent``.

    Args:
        parent: folder with the temporary entries.
        name: target whose leftovers are deleted; empty for all targets.
    """
    if not parent.is_dir():
        return []
    leftovers = sorted(parent.glob(f"{TEMPORARY_PREFIX}{name}*"))
    for leftover in leftovers:
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
    return leftovers


@contextlib.contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """Yields a temporary path; a file written there replaces ``target`` when the block ends without an error."""
    target = real_path(target)
    temporary = temporary_sibling(target)
    try:
        yield temporary
        fsync_path(temporary)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_path(target.parent)


def write_file(path: Path, content: str | bytes) -> None:
    """Writes or replaces a small file atomically: a reader sees the old content or the new one, never a part."""
    with new_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
