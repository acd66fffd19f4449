"""Rows of data from files, folders, globs, the hub or Python objects.

| source | rows |
|---|---|
| ``.jsonl`` | a row a line |
| ``.json`` | a list of rows, or a row a line |
| ``.csv``, ``.tsv`` | a row a line, values as text |
| ``.txt``, ``.md``, ``.rst``, ``.py``, no suffix | one row a file (or a line), ``{"text": ...}`` |
| ``.parquet``, ``.arrow``, a folder of ``save_to_disk`` | the table's rows (extra ``datasets``) |
| ``"bytes:PATH"`` | one row of raw bytes |
| a folder, a glob, a list of ``Path`` | all their files, sorted |
| ``"org/name"``, ``"org/name:config"`` | a data set of the hub (extra ``datasets``) |
| a Hugging Face ``Dataset``, a sequence, an iterable | its entries, unchanged |
| a mapping of columns (lists of one length), a pandas or polars frame, a pyarrow table | its rows |

Text formats may be compressed (``.gz``, ``.bz2``, ``.xz``) and are UTF-8, or UTF-16 with a byte order mark. A file of
another format is rejected with a way to convert it; in a folder it is skipped, and a warning counts and names the
skipped files.
"""

import glob
import itertools
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lm_core.data.jsonl import parsed_json, read_json_lines
from lm_core.data.text_files import COMPRESSED, decoded_text, is_hidden, lines_of, open_bytes, table_rows

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
TABLE_SUFFIXES = (".csv", ".tsv")
JSON_SUFFIXES = (".jsonl", ".json")
DATASET_SUFFIXES = (".parquet", ".arrow")
SUFFIXES = (*TEXT_SUFFIXES, *JSON_SUFFIXES, *TABLE_SUFFIXES, *DATASET_SUFFIXES)
RAW = "bytes:"

TextRows = Literal["file", "line"]


class WholeFile(dict[str, Any]):
    """Row of a whole file, ``{"text": ...}``: it has no columns to choose from."""


_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?")
_SAVED = ("dataset_info.json", "dataset_dict.json")
# common formats that are not read, and how to convert them
_CONVERSIONS = {
    ".zst": "zstd -d FILE",
    ".zip": "unzip FILE -d FOLDER",
    ".tar": "tar xf FILE",
    ".pdf": "pdftotext FILE FILE.txt",
    ".docx": "pandoc FILE -o FILE.txt",
    ".html": "pandoc FILE -t plain -o FILE.txt",
    ".epub": "pandoc FILE -t plain -o FILE.txt",
    ".xlsx": "pandas.read_excel(FILE).to_json(FILE.jsonl, orient='records', lines=True)",
    ".yaml": "python -c 'import sys,json,yaml; json.dump(yaml.safe_load(sys.stdin), sys.stdout)' < FILE > FILE.json",
    ".npy": "numpy.load(FILE).tolist(), passed as token ids",
}


def load_rows(source: Any, *, text_rows: TextRows = "file", split: str = "train", name: str = "source") -> list[Any]:
    """All rows of ``source``, in order.

    Args:
        source: any source in the module's table.
        text_rows: "file" makes a text file one row, "line" makes each line a row (without blank lines).
        split: split of a data set that has several.
        name: the argument's name in errors.

    Raises:
        FileNotFoundError: there is no such file, folder or data set.
        ValueError: a format is not supported, a line is damaged, or there is no readable file.
        TypeError: ``source`` is none of the listed kinds.
        ImportError: a format needs the extra ``datasets``.
    """
    return [row for _, row in iterate_rows(source, text_rows=text_rows, split=split, name=name)]


def iterate_rows(
    source: Any, *, text_rows: TextRows = "file", split: str = "train", name: str = "source"
) -> Iterator[tuple[str, Any]]:
    """Yields the location of each row ("pairs.jsonl, line 3,"), for error messages, and the row; see ``load_rows``.

    The existence of the source is checked at once, its rows are read lazily.
    """
    if isinstance(source, str | os.PathLike):
        text = os.fspath(source)
        path = Path(text).expanduser()
        if text.startswith(RAW):
            return _raw_row(_existing(Path(text.removeprefix(RAW)).expanduser(), name))
        if isinstance(source, str) and _HUB_NAME.fullmatch(text) and not _suffix(path) and not path.exists():
            return _numbered(_hub_dataset(text, split, name), text)
        if _is_saved_dataset(path):
            return _numbered(_one_split(_datasets(text).load_from_disk(str(path)), split, text), text)
        return (row for file in source_files(source, name) for row in _file_rows(file, text_rows))
    if isinstance(source, list | tuple) and source and all(isinstance(part, Path) for part in source):
        return (row for part in source for row in iterate_rows(part, text_rows=text_rows, split=split, name=name))
    if isinstance(getattr(source, "column_names", None), dict):
        raise ValueError(f"{name} must be one split of the dataset, got a dict of {sorted(source)}")
    for method in ("to_pylist", "to_dicts"):  # of a pyarrow table, of a polars frame
        if callable(getattr(source, method, None)):
            return _numbered(getattr(source, method)(), name)
    if hasattr(source, "iloc"):  # a pandas frame, whose missing values are NaN
        return _numbered(source.astype(object).where(source.notna(), None).to_dict("records"), name)
    if isinstance(source, Mapping):
        return _numbered(_rows_of_columns(source, name), name)
    return _numbered(source, name)


def _rows_of_columns(columns: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    lengths = {str(key): len(values) for key, values in columns.items() if isinstance(values, list | tuple)}
    if not columns or len(lengths) < len(columns) or len(set(lengths.values())) > 1:
        raise TypeError(
            f"{name} must be rows, or a mapping of columns that are lists of one length, got a mapping of "
            f"{sorted(map(str, columns))} with lists of the lengths {lengths}"
        )
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def source_files(source: str | os.PathLike[str], name: str = "source") -> list[Path]:
    """Sorted files of a path, a folder or a glob.

    Hidden files and those of unknown formats in a folder are skipped; a warning names the latter.

    Raises:
        FileNotFoundError: there are none.
        ValueError: a folder holds no file of a known format.
    """
    path = Path(os.fspath(source).removeprefix(RAW)).expanduser()
    if not path.exists() and any(character in str(path) for character in "*?["):
        matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        if not matches:
            raise FileNotFoundError(f"{name}: no file matches {path}")
        fixed = Path(*itertools.takewhile(lambda part: not any(mark in part for mark in "*?["), path.parts))
        files = [file for match in matches for file in (sorted(match.rglob("*")) if match.is_dir() else [match])]
        files = [file for file in dict.fromkeys(files) if file.is_file() and not is_hidden(file.relative_to(fixed))]
        # a pattern that asks for a suffix means it
        return files if path.suffix and "*" not in path.suffix else _known(files, path, name)
    _existing(path, name)
    if path.is_file():
        return [path]
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and not is_hidden(file.relative_to(path))]
    return _known(files, path, name)


def _known(files: list[Path], path: Path, name: str) -> list[Path]:
    """The files of known formats; a warning counts and names the others."""
    known = [file for file in files if _suffix(file) in SUFFIXES]
    if not known:
        raise ValueError(f"{name}: {path} holds no file ending in {', '.join(SUFFIXES)}")
    if len(known) < len(files):
        others = [str(file) for file in files if _suffix(file) not in SUFFIXES]
        others = [os.path.relpath(file, path) if path.is_dir() else file for file in others]
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        warnings.warn(f"{path}: {len(others)} file(s) passed over: {', '.join(others[:5])}{more}", stacklevel=3)
    return known


def _existing(path: Path, name: str) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"{name} path does not exist: {path}")
    return path


def _suffix(path: Path) -> str:
    """The suffix of a file without that of its compression."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSED else suffix


def _numbered(rows: Any, name: str) -> Iterator[tuple[str, Any]]:
    # torch data sets may lack __iter__
    if not isinstance(rows, Iterable) and hasattr(rows, "__getitem__") and hasattr(rows, "__len__"):
        return ((f"{name}[{index}]", rows[index]) for index in range(len(rows)))
    if not isinstance(rows, Iterable):
        raise TypeError(f"{name} must be a path, a dataset or an iterable of rows, got {type(rows).__name__}")
    return ((f"{name}[{index}]", row) for index, row in enumerate(rows))


def _file_rows(file: Path, text_rows: TextRows) -> Iterator[tuple[str, Any]]:
    suffix = _suffix(file)
    if suffix == ".jsonl":
        return _located(file, "line", read_json_lines(file, objects=False))
    if suffix == ".json":
        return _json_rows(file)
    if suffix in TABLE_SUFFIXES:
        return _located(file, "line", table_rows(file, "\t" if suffix == ".tsv" else ","))
    if suffix in DATASET_SUFFIXES:
        return _located(file, "row", enumerate(_dataset_file(file, suffix)))
    if suffix not in (*TEXT_SUFFIXES, ""):
        advice = _CONVERSIONS.get(suffix, "write it as .jsonl with a row a line").replace("FILE", file.name)
        raise ValueError(
            f"{file}: the format {suffix} is not read. Convert it ({advice}), or read its raw bytes with {RAW}{file}; "
            f"read are {', '.join(SUFFIXES)}"
        )
    return _text_rows(file, text_rows)


def _located(file: Path, unit: str, rows: Iterable[tuple[int, Any]]) -> Iterator[tuple[str, Any]]:
    return ((f"{file}, {unit} {number},", row) for number, row in rows)


def _raw_row(file: Path) -> Iterator[tuple[str, Any]]:
    with open_bytes(file) as stream:
        yield str(file), WholeFile(text=stream.read())


def _text_rows(file: Path, text_rows: TextRows) -> Iterator[tuple[str, Any]]:
    with open_bytes(file) as stream:
        text = decoded_text(stream.read(), file)
    if "\0" in text:
        raise ValueError(f"{file} holds zero bytes, so it is no text; read its raw bytes with {RAW}{file}")
    if text_rows == "file":
        yield str(file), WholeFile(text=text)
        return
    for number, line in enumerate(lines_of(text), start=1):
        if line.strip():
            yield f"{file}, line {number},", {"text": line}


def _json_rows(file: Path) -> Iterator[tuple[str, Any]]:
    with open_bytes(file) as stream:
        content = stream.read()
    try:
        rows = parsed_json(content, str(file))
    except ValueError:  # JSON lines under another name
        return _located(file, "line", read_json_lines(file, objects=False))
    return _located(file, "row", enumerate(rows if isinstance(rows, list) else [rows]))


def _datasets(path: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{path} is read by Hugging Face datasets: pip install datasets") from error
    return datasets


def _dataset_file(file: Path, suffix: str) -> Iterator[Any]:
    datasets = _datasets(str(file))
    if suffix == ".arrow":
        return iter(datasets.Dataset.from_file(str(file)))
    import pyarrow.parquet  # comes with datasets, whose own reader copies the file into a cache

    batches = pyarrow.parquet.ParquetFile(file).iter_batches()
    return (row for batch in batches for row in batch.to_pylist())


def _is_saved_dataset(path: Path) -> bool:
    return any((path / name).is_file() for name in _SAVED)


def _hub_dataset(repository: str, split: str, name: str) -> Any:
    missing = f"{name} path does not exist: {repository}"
    try:
        import datasets
    except ImportError as error:
        raise FileNotFoundError(f"{missing} (a data set of the hub needs pip install datasets)") from error
    path, _, config = repository.partition(":")
    try:
        return _one_split(datasets.load_dataset(path, config or None), split, repository)
    except OSError as error:  # raised by datasets for unknown names and without a network
        raise FileNotFoundError(f"{missing}; nor does the hub give it: {str(error).strip()}") from error


def _one_split(dataset: Any, split: str, name: str) -> Any:
    if not isinstance(dataset, Mapping):
        return dataset
    if split not in dataset:
        raise ValueError(f"{name} must have the split {split!r}, it has {sorted(dataset)}")
    return dataset[split]


def data_fingerprint(source: Any) -> Sequence[Any]:
    """Identity of a version of ``source`` without reading it: names, sizes and times of its files.

    Raises:
        ValueError: ``source`` is neither files nor a Hugging Face dataset.
    """
    if getattr(source, "_fingerprint", None):
        return ["dataset", source._fingerprint]
    sources = [Path(source)] if isinstance(source, str | os.PathLike) else source
    if not isinstance(sources, list | tuple) or not all(isinstance(part, Path) for part in sources):
        raise ValueError(f"cache_dir needs a path or a Hugging Face dataset as source, got {type(source).__name__}")
    files = [
        file
        for part in sources
        for file in (sorted(part.rglob("*")) if _is_saved_dataset(part) else source_files(part))
    ]
    return [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
