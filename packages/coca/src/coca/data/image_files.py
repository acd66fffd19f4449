"""Images from files, with captions (``load_images``) or without (``ImageFiles``).

| source with captions | content |
|---|---|
| ``.csv``, ``.tsv``, ``.json``, ``.jsonl`` | columns ``image`` (path next to the table), ``caption``, maybe ``label`` |
| a folder | its ``captions`` (.csv, .tsv, .jsonl) or ``metadata`` (.csv, .jsonl), else images, each with a ``.txt`` |
| ``*.tar`` (webdataset) | members ``key.jpg`` with ``key.txt``, or ``key.json`` with a ``caption`` |
| a folder of tars, ``a-{000..127}.tar``, ``*.tar``, a list | all of them |

Several lines for one image, several lines in a ``.txt`` and a JSON list are several captions. Every image is decoded
once when the set is opened: an unreadable one is listed with its reason, and more of them than allowed is an error.
Hidden files are ignored; other files of a folder that are neither images nor texts are counted in a warning.
"""

import glob
import io
import json
import os
import re
import tarfile
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from coca.data.captioned_images import CaptionedImages, Pixels
from coca.model.preprocessing import ImagePreprocessing
from lm_core.data.rows import iterate_rows
from lm_core.data.text_files import decoded_text, is_hidden, lines_of

# Pillow's formats that are decoded; not EPS, for which it starts Ghostscript. HEIF needs the plugin pillow-heif.
FORMATS = ("AVIF", "BMP", "GIF", "HEIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = {".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm"}
SUFFIXES |= {".png", ".ppm", ".tif", ".tiff", ".webp"}
TABLES = ("captions.csv", "captions.tsv", "captions.jsonl", "metadata.csv", "metadata.jsonl")
_TEXTS = {".csv", ".json", ".jsonl", ".md", ".tsv", ".txt"}
# Names of the columns where none is given; ``file_name`` and ``text`` are Hugging Face's, the last ones open_clip's.
_IMAGE_COLUMNS = ("image", "file_name", "filepath")
_CAPTION_COLUMNS = ("caption", "text", "title")
_PATTERN = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")


@dataclass(frozen=True)
class _Entry:
    name: str
    captions: tuple[str, ...]
    label: str | None
    data: Callable[[], bytes]


@dataclass(frozen=True)
class _Columns:
    image: Sequence[str]
    caption: Sequence[str]
    label: str


def load_images(
    source: str | Path | Sequence[str | Path],
    preprocessing: ImagePreprocessing,
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    label_column: str = "label",
    templates: Sequence[str] | None = None,
    max_unreadable: float = 0.05,
    progress: bool = False,
) -> CaptionedImages:
    """Images with captions from files.

    Args:
        source: folder, table, tar, pattern, or list of them; see the module docstring.
        preprocessing: size and channels of the pixels.
        image_column: column of a table with the path of an image; null takes image, file_name or filepath.
        caption_column: column of a table, or key of a JSON object, with a caption; null takes caption, text or title.
        label_column: column or key with the class of an image; if all images have one, held-out ones are classified.
        templates: templates of zero-shot classification, captions with one {} for the class name.
        max_unreadable: largest fraction of images that may be unreadable; they are named and counted.
        progress: shows a progress bar.

    Raises:
        FileNotFoundError: the source, or an image that it names, does not exist.
        ValueError: the source has no images, lacks a column or caption, is not UTF-8, or has too many unreadable
            images, by name.
        TypeError: ``templates`` is one string.
    """
    if isinstance(templates, str):
        raise TypeError(f"templates must be a list of strings, got the string {templates!r}")
    if not 0 <= max_unreadable < 1:
        raise ValueError(f"max_unreadable must be a part of the images in [0, 1), got {max_unreadable}")
    columns = _Columns(
        _IMAGE_COLUMNS if image_column is None else (image_column,),
        _CAPTION_COLUMNS if caption_column is None else (caption_column,),
        label_column,
    )
    entries = _merged(_entries(_sources(source), columns))
    if not entries:
        raise ValueError(f"source must hold at least one image with a caption, got none in {source}")
    # Decode every image once, to find those that cannot be read.
    good, checksums, unreadable = [], [], []
    for entry, checked in zip(entries, _checked(entries, preprocessing, progress), strict=True):
        if isinstance(checked, int):
            good.append(entry)
            checksums.append(checked)
        else:
            unreadable.append(f"{entry.name}: {checked}")
    if len(unreadable) > max_unreadable * len(entries):
        raise ValueError(
            f"{len(unreadable)} of {len(entries)} images in {source} cannot be read, more than max_unreadable = "
            f"{max_unreadable} allows: {'; '.join(unreadable[:8])}"
        )
    # Classes count only if every image has one.
    labels = [entry.label for entry in good if entry.label is not None]
    class_names = tuple(sorted(set(labels))) if len(labels) == len(good) else ()
    label_ids = {name: index for index, name in enumerate(class_names)}
    return CaptionedImages(
        names=tuple(entry.name for entry in good),
        captions=tuple(entry.captions for entry in good),
        read=lambda index: read_pixels(good[index].data, preprocessing),
        labels=tuple(label_ids[label] for label in labels) if class_names else None,
        class_names=class_names,
        templates=tuple(templates or ("{}",)),
        unreadable=tuple(unreadable),
        checksums=tuple(checksums),
    )


def _checked(entries: Sequence[_Entry], preprocessing: ImagePreprocessing, progress: bool) -> Iterator[int | Exception]:
    """The checksum of each image's pixels, or the reason why it cannot be read."""

    def check(entry: _Entry) -> int | Exception:
        try:
            return zlib.crc32(read_pixels(entry.data, preprocessing).tobytes())
        except (OSError, ValueError) as error:
            return error

    # threads, since Pillow decodes without Python's lock; a part at a time, to hold few results that wait
    with ThreadPoolExecutor() as pool, tqdm(total=len(entries), desc="check images", disable=not progress) as bar:
        for start in range(0, len(entries), 1024):
            for result in pool.map(check, entries[start : start + 1024]):
                bar.update()
                yield result


def read_pixels(read: Callable[[], bytes], preprocessing: ImagePreprocessing) -> Pixels:
    """Pixels of an image file, whose bytes ``read`` returns.

    Raises:
        OSError, ValueError: the file cannot be read or decoded.
    """
    from PIL import Image, UnidentifiedImageError

    content = io.BytesIO(read())
    try:
        with Image.open(content, formats=_formats()) as picture:
            return preprocessing.pixels(picture)
    except UnidentifiedImageError:
        raise ValueError("not an image in a format that is read") from None
    except OSError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds for damaged or too large files
        raise ValueError(f"cannot be decoded: {error}") from error


@cache
def _formats() -> tuple[str, ...]:
    from PIL import Image

    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


class ImageFiles:
    """Images of files and folders, read a batch at a time; unreadable ones are left out and listed.

    Args:
        sources: files, and folders whose images are taken in order of their paths.
        preprocessing: preprocessing of the images.

    Attributes:
        paths: all files.
        unreadable: "path: reason" of each file that could not be read so far.

    Raises:
        FileNotFoundError: a source does not exist.
        ValueError: a folder holds no image.
    """

    def __init__(self, sources: Sequence[str | Path], preprocessing: ImagePreprocessing) -> None:
        self.preprocessing = preprocessing
        self.paths: list[Path] = []
        self.unreadable: list[str] = []
        for source in (Path(source).expanduser() for source in sources):
            if not source.exists():
                raise FileNotFoundError(f"images must be files or folders of images, there is no {source}")
            chosen = _images_of(source) if source.is_dir() else [source]
            if not chosen:
                raise ValueError(f"images must be files or folders of images, got the folder {source} without any")
            self.paths += chosen
        if not self.paths:
            raise ValueError("images must name at least one file, got none")

    def batches(self, size: int) -> Iterator[tuple[list[str], Tensor]]:
        """Paths and normalised images ``(b, c, height, width)`` of up to ``size`` files at a time.

        Raises:
            ValueError: at the end, if no file could be read.
        """
        count = 0
        for start in range(0, len(self.paths), size):
            names, pixels = [], []
            for path in self.paths[start : start + size]:
                try:
                    pixels.append(read_pixels(path.read_bytes, self.preprocessing))
                    names.append(str(path))
                except (OSError, ValueError) as error:
                    self.unreadable.append(f"{path}: {error}")
            if names:
                yield names, self.preprocessing.normalised(np.stack(pixels))
            count += len(names)
        if not count:
            raise ValueError(f"none of {len(self.paths)} images could be read, the first: {self.unreadable[0]}")


def _files_of(folder: Path) -> list[Path]:
    """All files of a folder, sorted, without hidden ones."""
    return [path for path in sorted(folder.rglob("*")) if not is_hidden(path.relative_to(folder)) and path.is_file()]


def _images_of(folder: Path) -> list[Path]:
    """The images of a folder; a warning counts files that are neither images nor texts."""
    files = _files_of(folder)
    others = [path for path in files if path.suffix.lower() not in SUFFIXES | _TEXTS]
    _warn_of_others(folder, others)
    return [path for path in files if path.suffix.lower() in SUFFIXES]


def _warn_of_others(source: Path, paths: Sequence[Path]) -> None:
    """Warns of files in a folder, or members of a tar, that are not read: their number and the first names."""
    if paths:
        names = [(path.relative_to(source) if source in path.parents else path).as_posix() for path in paths[:5]]
        more = f" and {len(paths) - 5} more" if len(paths) > 5 else ""
        warnings.warn(f"{source}: {len(paths)} file(s) passed over: {', '.join(names)}{more}", stacklevel=2)


def _sources(source: str | Path | Sequence[str | Path]) -> list[Path]:
    """Paths of a source, its patterns expanded."""
    paths: list[Path] = []
    for part in [source] if isinstance(source, str | Path) else source:
        name = os.path.expanduser(part)
        for pattern in [name] if os.path.exists(name) else _expanded(name):
            is_glob = not os.path.exists(pattern) and any(character in pattern for character in "*?[")
            matches = sorted(glob.glob(pattern)) if is_glob else [pattern]
            if not matches:
                raise FileNotFoundError(f"source: no file matches {pattern}")
            paths += map(Path, matches)
    if not paths:
        raise ValueError("source must hold at least one path, got an empty list")
    return paths


def _expanded(pattern: str) -> list[str]:
    """A name for each number of ``{000..127}`` and each part of ``{a,b}``."""
    match = _PATTERN.search(pattern)
    if match is None:
        return [pattern]
    if match[3] is None:
        first, last = int(match[1]), int(match[2])
        options = [f"{number:0{len(match[1])}d}" for number in range(first, last + 1)]
    else:
        options = match[3].split(",")
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [name for option in options for name in _expanded(before + option + after)]


def _merged(entries: Iterator[_Entry]) -> list[_Entry]:
    """One entry for each image, with all its captions."""
    by_name: dict[str, _Entry] = {}
    for entry in entries:
        earlier = by_name.get(entry.name, replace(entry, captions=()))
        if earlier.label != entry.label:
            raise ValueError(f"{entry.name} must have one label, got {earlier.label!r} and {entry.label!r}")
        by_name[entry.name] = replace(entry, captions=earlier.captions + entry.captions)
    return list(by_name.values())


def _entries(sources: Sequence[Path], columns: _Columns) -> Iterator[_Entry]:
    """Entries of all sources; several sources distinguish their names by their paths below a common folder."""
    for source in sources:
        if not source.exists():
            raise FileNotFoundError(f"source must be a folder, a table or a tar, there is no {source}")
    root = os.path.commonpath([source.absolute().parent for source in sources])
    for source in sources:
        for entry in _entries_of(source, columns):
            if len(sources) > 1:
                entry = replace(entry, name=f"{source.absolute().relative_to(root).as_posix()}/{entry.name}")
            yield entry


def _entries_of(source: Path, columns: _Columns) -> Iterator[_Entry]:
    if source.is_dir():
        table = next((source / name for name in TABLES if (source / name).is_file()), None)
        if table is not None:
            return _table(table, columns)
        files = _files_of(source)
        tars = [path for path in files if path.suffix.lower() == ".tar"]
        if tars and not any(path.suffix.lower() in SUFFIXES for path in files):
            _warn_of_others(source, [path for path in files if path.suffix.lower() not in _TEXTS | {".tar"}])
            return _entries(tars, columns)
        return _folder(source)
    suffix = source.suffix.lower()
    if suffix in (".csv", ".tsv", ".json", ".jsonl"):
        return _table(source, columns)
    if suffix == ".tar":
        return _tar(source, columns)
    raise ValueError(f"source must be a folder, a .csv, .tsv, .json, .jsonl or .tar file, got {source}")


def _folder(folder: Path) -> Iterator[_Entry]:
    for path in _images_of(folder):
        text = path.with_suffix(".txt")
        if not text.is_file():
            raise ValueError(f"each image of a folder without a table must have a .txt next to it, {path} has none")
        yield _Entry(path.relative_to(folder).as_posix(), _lines(text.read_bytes(), str(text)), None, path.read_bytes)


def _table(table: Path, columns: _Columns) -> Iterator[_Entry]:
    for where, row in iterate_rows(table):
        if not isinstance(row, Mapping):
            raise ValueError(f"{where} must be a row with columns, got {type(row).__name__}")
        path = table.parent / str(_cell(row, columns.image, where))
        caption = _cell(row, columns.caption, where)
        if not path.is_file():
            raise FileNotFoundError(f"{where} names the image {path}, which is not there")
        yield _Entry(
            path.relative_to(table.parent).as_posix() if path.is_relative_to(table.parent) else str(path),
            _texts(caption, where),
            _label(row, columns),
            path.read_bytes,
        )


def _cell(row: Mapping[str, Any], names: Sequence[str], where: str) -> Any:
    """The value in the first of the columns ``names`` that the row has."""
    column = next((name for name in names if name in row), None)
    if column is None:
        raise ValueError(f"{where} must have {' or '.join(map(repr, names))}, got the columns {sorted(map(str, row))}")
    if row[column] is None or (isinstance(row[column], str) and not row[column].strip()):
        raise ValueError(f"{where} has an empty {column}")
    return row[column]


def _label(row: Mapping[str, Any], columns: _Columns) -> str | None:
    label = row.get(columns.label)
    return None if label in (None, "") else str(label)


def _tar(path: Path, columns: _Columns) -> Iterator[_Entry]:
    # suffix to member of each stem: "photos/cat.v2.jpg" has the stem "photos/cat.v2"
    stems: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.isfile() and not is_hidden(Path(os.path.normpath(member.name))):
                    stem, suffix = os.path.splitext(member.name)
                    stems.setdefault(stem, {})[suffix.lower()] = member
    except tarfile.TarError as error:
        raise ValueError(f"{path} cannot be read as an uncompressed tar: {error}") from error
    images = {stem: next((name for name in members if name in SUFFIXES), None) for stem, members in stems.items()}
    groups: dict[str, list[str]] = {}
    for stem in stems:
        groups.setdefault(_key(stem), []).append(stem)
    others = []
    for stem, image in images.items():
        if image is None:
            if all(images[other] is None for other in groups[_key(stem)]):
                # a sample whose picture, if it has one, is of a format that is not read
                others += [Path(member.name) for suffix, member in stems[stem].items() if suffix not in _TEXTS | {""}]
            continue
        texts = stems[stem]
        if not {".txt", ".json"} & set(texts):
            group = groups[_key(stem)]
            if any(images[other] and {".txt", ".json"} & set(stems[other]) for other in group):
                others.append(Path(stem + image))  # a further picture of a key that has its image with a caption
                continue
            texts = {suffix: member for other in group for suffix, member in stems[other].items()}
            if sum(images[other] is not None for other in group) > 1 or not {".txt", ".json"} & set(texts):
                raise ValueError(f"{path} must have a caption, {stem}.txt or {stem}.json, next to {stem}{image}")
        yield _Entry(stem + image, *_described(path, texts, columns), partial(_member, path, stems[stem][image]))
    _warn_of_others(path, others)


def _key(stem: str) -> str:
    """webdataset's key of a sample, which ends at the first dot: "cat.image.jpg" belongs to "cat.txt"."""
    folder, base = os.path.split(stem)
    return f"{folder}/{base.partition('.')[0]}"


def _described(
    path: Path, members: Mapping[str, tarfile.TarInfo], columns: _Columns
) -> tuple[tuple[str, ...], str | None]:
    """Captions and label of an image in a tar; a ``.txt`` is the caption, next to which ``.json`` is metadata."""
    content: Any = {}
    where = ""
    if ".json" in members:
        where = f"{path}, member {members['.json'].name},"
        try:
            content = json.loads(decoded_text(_member(path, members[".json"]), where))
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON: {error}") from error
    metadata = content if isinstance(content, Mapping) else {}
    if ".txt" in members:
        text = members[".txt"]
        return _lines(_member(path, text), f"{path}, member {text.name},"), _label(metadata, columns)
    if not isinstance(content, Mapping):
        raise ValueError(f"{where} must be a JSON object, got {type(content).__name__}")
    return _texts(_cell(content, columns.caption, where), where), _label(content, columns)


def _member(path: Path, member: tarfile.TarInfo) -> bytes:
    with path.open("rb") as stream:  # a member of an uncompressed tar is a piece of the file
        stream.seek(member.offset_data)
        return stream.read(member.size)


def _lines(content: bytes, where: str) -> tuple[str, ...]:
    lines = [line for line in lines_of(decoded_text(content, where)) if line.strip()]
    if not lines:
        raise ValueError(f"{where} has an empty caption")
    return _texts(lines, where)


def _texts(value: Any, where: str) -> tuple[str, ...]:
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"{where} must have a caption or a list of captions, got {value!r}")
    if any("\0" in text for text in texts):
        raise ValueError(f"{where} has zero bytes in its caption, as UTF-16 without a byte order mark: {value!r}")
    if any("\ud800" <= character <= "\udfff" for text in texts for character in text):
        raise ValueError(f"{where} has a lone surrogate in its caption, which is no character: {value!r}")
    return tuple(text.strip() for text in texts)
