"""Reader of JSON lines, with line numbers in its errors."""

import json
import os
from collections.abc import Iterator
from typing import Any

from lm_core.data.text_files import CONVERT, open_bytes, utf8_lines


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
        for number, line in enumerate(utf8_lines(stream, path), start=1):
            if not line.strip():
                continue
            if torn_end and not line.endswith(b"\n"):
                return
            value = parsed_json(line, f"{path}, line {number},")
            if objects and not isinstance(value, dict):
                raise ValueError(f"{path}, line {number}, must be a JSON object, got {type(value).__name__}")
            yield number, value


def parsed_json(content: str | bytes, where: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: ``content`` is not JSON, or nested too deeply; the message begins with ``where``.
    """
    try:
        return json.loads(content)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 ({error.reason}); {CONVERT}") from None
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    except RecursionError:
        raise ValueError(f"{where} is not read: its JSON is nested too deeply") from None
