"""Reader of JSON lines, with line numbers in its errors.

Lines end at ``\\n`` or ``\\r\\n`` only. ``str.splitlines`` would also cut at U+2028, which JSON allows inside a string.
"""

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

_MODULES: dict[str, Any] = {".gz": gzip, ".bz2": bz2, ".xz": lzma}
COMPRESSED = tuple(_MODULES)


@contextmanager
def open_bytes(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Opens a file for reading bytes, decompressed according to its suffix.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a compressed file is damaged or truncated.
    """
    file = Path(path)
    module = _MODULES.get(file.suffix.lower())
    if module is None:
        with file.open("rb") as stream:
            yield stream
        return
    try:
        with module.open(file, "rb") as stream:
            yield stream
    except (gzip.BadGzipFile, EOFError, lzma.LZMAError) as error:
        raise ValueError(f"{file} is no whole {module.__name__} file: {error}") from error


def read_json_lines(
    path: str | os.PathLike[str], *, objects: bool = True, torn_end: bool = False
) -> Iterator[tuple[int, Any]]:
    """Number (from 1) and value of every line that is not blank.

    Args:
        path: a file, possibly compressed (``.gz``, ``.bz2``, ``.xz``).
        objects: requires every value to be a JSON object.
        torn_end: ignores a last line without a line end, left by a killed process or one that is still writing.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not JSON or not an object; the message has its number.
    """
    with open_bytes(path) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            if torn_end and not line.endswith(b"\n"):
                return
            try:
                value = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}, is not JSON: {error}") from error
            if objects and not isinstance(value, dict):
                raise ValueError(f"{path}, line {number}, must be a JSON object, got {type(value).__name__}")
            yield number, value
