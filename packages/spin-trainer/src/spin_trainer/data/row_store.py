"""Crash-safe rows on disk: append-only JSON lines that are computed and written once.

A store is a folder with ``description.json`` (everything that the rows depend on) and a ``rows-R.jsonl`` per process.
Rows are appended and flushed to disk a batch at a time; opening a store removes a last line that a kill cut short.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from lm_core.checkpoints.atomic_io import fsync_path, write_file
from lm_core.checkpoints.manifest import to_json
from lm_core.data.jsonl import read_json_lines


def fingerprint_of(description: Mapping[str, Any]) -> str:
    """SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def name_of_function(function: Callable[..., Any] | None) -> str | None:
    """Module and name of a function, for a fingerprint; a partial's arguments are included."""
    if function is None:
        return None
    if isinstance(function, functools.partial):
        arguments = sorted(function.keywords.items())
        return f"{name_of_function(function.func)}{function.args!r}{arguments!r}"
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', type(function).__name__)}"


class RowStore:
    """Rows by index, for one description.

    Args:
        root: folder of stores; this one is the subfolder named by kind and fingerprint.
        kind: kind of rows, such as "answers".
        description: JSON values that the rows depend on.
        rank: rank of this process, which writes to its own file.

    Raises:
        ValueError: the folder holds rows of another description, or is damaged.
    """

    def __init__(self, root: Path, kind: str, description: Mapping[str, Any], *, rank: int = 0) -> None:
        self.fingerprint = fingerprint_of(description)
        self.folder = root / f"{kind}-{self.fingerprint[:16]}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._rows_file = self.folder / f"rows-{rank}.jsonl"
        record = self.folder / "description.json"
        if record.exists():
            try:
                recorded = json.loads(record.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{record} is damaged ({error}); delete the folder to make its rows again") from error
            if fingerprint_of(recorded) != self.fingerprint:
                raise ValueError(f"{self.folder} holds rows of other weights, prompts or settings; use another folder")
        elif rank == 0:
            write_file(record, to_json(dict(description)))
        self._cut_torn_line()
        self.rows: dict[int, dict[str, Any]] = {}
        self.refresh()

    def _cut_torn_line(self) -> None:
        if not self._rows_file.exists():
            return
        content = self._rows_file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with self._rows_file.open("r+b") as stream:
                stream.truncate(len(whole))
            fsync_path(self._rows_file)

    def refresh(self) -> None:
        """Reads the rows of all processes; a barrier must precede it."""
        for file in sorted(self.folder.glob("rows-*.jsonl")):
            # another process may be writing the last line
            for line, row in read_json_lines(file, torn_end=True):
                if not isinstance(row.get("row"), int):
                    raise ValueError(f"{file}, line {line}, is damaged: it has no row number; delete {self.folder}")
                self.rows[row["row"]] = row

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes the rows that are not stored yet and flushes them to disk."""
        new = [dict(row) for row in rows if row["row"] not in self.rows]
        if not new:
            return
        created = not self._rows_file.exists()
        with self._rows_file.open("ab") as stream:
            stream.write("".join(json.dumps(row, separators=(",", ":")) + "\n" for row in new).encode())
            stream.flush()
            os.fsync(stream.fileno())
        if created:
            fsync_path(self.folder)
        self.rows.update({int(row["row"]): row for row in new})
