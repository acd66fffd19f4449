"""Files of text and tables as people's tools write them: compression, encodings, hidden files, quotes.

Lines end at ``\\n`` or ``\\r\\n`` only. ``str.splitlines`` would also cut at U+2028, which JSON allows inside a string,
and at a form feed.
"""

import bz2
import codecs
import contextlib
import csv
import gzip
import io
import lzma
import os
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any, BinaryIO

_MODULES: dict[str, Any] = {".gz": gzip, ".bz2": bz2, ".xz": lzma}
COMPRESSED = tuple(_MODULES)
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
CONVERT = "convert it, for instance with iconv -f LATIN1 -t UTF-8"
# csv's default of 131,072 characters is shorter than some documents
_LONGEST_FIELD = 2**31 - 1


@contextlib.contextmanager
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


def is_hidden(path: PurePath) -> bool:
    """True for files that no person put there as data: names with a leading dot, ``__MACOSX``, ``__pycache__``.

    Args:
        path: path relative to the folder or archive that is read.
    """
    return any(part.startswith(".") or part in ("__MACOSX", "__pycache__") for part in path.parts)


def decoded_text(content: bytes, where: object) -> str:
    """Text of a file's bytes: UTF-8, or UTF-16 with a byte order mark. The mark itself is dropped.

    Args:
        content: bytes of the whole file.
        where: the file, for the error.

    Raises:
        ValueError: the bytes are neither.
    """
    encoding = "utf-16" if content.startswith(_UTF16_MARKS) else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        name = encoding.removesuffix("-sig").upper()
        raise ValueError(f"{where} is not {name} (byte {error.start}: {error.reason}); {CONVERT}") from None


def utf8_lines(stream: Any, where: object) -> Iterator[bytes]:
    """Lines of a file in UTF-8, converted if it begins with the byte order mark of UTF-16."""
    first = stream.readline()
    if first.startswith(_UTF16_MARKS):
        text = decoded_text(first + stream.read(), where)
        yield from io.BytesIO(text.encode())
    else:
        yield first
        yield from stream


def lines_of(text: str) -> list[str]:
    """Lines of a text, without their ends."""
    return [line.removesuffix("\r") for line in text.split("\n")]


def table_rows(file: Path, delimiter: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and fields by column name of each row of a ``.csv`` or ``.tsv`` file.

    Fields of a ``.csv`` are quoted as ``csv`` does it. A ``.tsv`` is taken line by line, so that a caption that begins
    with a quotation mark stands as it is; only where a program visibly quoted (the header, doubled quotes, line breaks
    inside a field) are quotes removed. A row that ends early has None in the missing columns.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a row has more fields than the header, its quotes are wrong, or the encoding is unknown; the message
            names file and line.
    """
    with open_bytes(file) as stream:
        text = decoded_text(stream.read(), file)
    lines = _tsv_lines(text, file) if delimiter == "\t" else _csv_lines(text, file)
    _, header = next(lines, (0, []))
    if len(set(header)) < len(header):
        raise ValueError(f"{file}, line 1, must name each column once, got {header}")
    for number, fields in lines:
        if len(fields) > len(header):
            raise ValueError(
                f"{file}, line {number}, has {len(fields)} fields, the header {len(header)}; a field that contains "
                f"{delimiter!r} needs quotation marks around it"
            )
        yield number, {**dict.fromkeys(header), **dict(zip(header, fields, strict=False))}


def _csv_lines(text: str, file: Path, delimiter: str = ",") -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    before = csv.field_size_limit(_LONGEST_FIELD)  # of the process, so it is restored before anything is yielded
    try:
        lines = [(reader.line_num, fields) for fields in reader if fields]
    except csv.Error as error:
        raise ValueError(f"{file}, line {reader.line_num}, is no CSV: {error}") from None
    finally:
        csv.field_size_limit(before)
    yield from lines


def _tsv_lines(text: str, file: Path) -> Iterator[tuple[int, list[str]]]:
    lines = [(number, line.split("\t")) for number, line in enumerate(lines_of(text), start=1) if line.strip()]
    if len({len(fields) for _, fields in lines}) > 1:
        # fields with line breaks, if the file is whole as CSV
        with contextlib.suppress(ValueError):
            rows = list(_csv_lines(text, file, "\t"))
            if len({len(fields) for _, fields in rows}) == 1:
                return iter(rows)
    quoted = bool(lines) and all(_is_quoted(field) for field in lines[0][1])
    return ((number, [_unquoted(field, always=quoted) for field in fields]) for number, fields in lines)


def _is_quoted(field: str) -> bool:
    return len(field) > 1 and field[0] == field[-1] == '"' and '"' not in field[1:-1].replace('""', "")


def _unquoted(field: str, *, always: bool) -> str:
    inner = field[1:-1]
    return inner.replace('""', '"') if _is_quoted(field) and (always or '""' in inner) else field
