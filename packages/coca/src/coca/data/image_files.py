"""Images from files, with captions (``load_images``) or without (``ImageFiles``).

| source with captions | content |
|---|---|
| ``.csv``, ``.tsv``, ``.json``, ``.jsonl`` | columns ``image`` (path next to the table), ``caption``, maybe ``label`` |
| a folder | its ``captions`` (.csv, .tsv, .jsonl) or ``metadata`` (.csv, .jsonl), else images, each with a ``.txt`` |
| ``*.tar`` (webdataset) | members ``key.jpg`` with ``key.txt``, or ``key.json`` with a ``caption`` |
| ``*.tar.gz``, ``.tgz``, ``.tar.bz2``, ``.tar.xz`` | the same, unpacked for the time of the process |
| a folder of tars, ``a-{000..127}.tar``, ``*.tar``, a list | all of them |
| a folder of class folders without captions | captions by the templates, labels by the folders |
| ``.parquet``, ``.arrow``, a folder of ``save_to_disk``, ``org/name`` | an image data set (extra ``datasets``) |

Several lines for one image, several lines in a ``.txt`` and a JSON list are several captions. Every image is decoded
once when the set is opened: an unreadable one is listed with its reason, and more of them than allowed is an error.
Hidden files are ignored; other files of a folder that are neither images nor texts are counted in a warning.
"""

import atexit
import bz2
import glob
import gzip
import io
import json
import lzma
import os
import re
import shutil
import tarfile
import tempfile
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
from lm_core.tokenizers import HUB_ID

# Pillow's formats that are decoded; not EPS, for which it starts Ghostscript. HEIF needs the plugin pillow-heif.
FORMATS = ("AVIF", "BMP", "GIF", "HEIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = {".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm"}
SUFFIXES |= {".png", ".ppm", ".tif", ".tiff", ".webp"}
TABLES = ("captions.csv", "captions.tsv", "captions.jsonl", "metadata.csv", "metadata.jsonl")
_TEXTS = {".csv", ".json", ".jsonl", ".md", ".tsv", ".txt"}
# Names of the columns where none is given; ``file_name`` and ``text`` are Hugging Face's, the last ones open_clip's.
_IMAGE_COLUMNS = ("image", "file_name", "filepath")
_CAPTION_COLUMNS = ("caption", "text", "title")
_CLASS_TEMPLATES = ("a photo of a {}",)
_TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
_DATASETS = (".parquet", ".arrow")
_PATTERN = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")


@dataclass(frozen=True)
class _Entry:
    name: str
    captions: tuple[str, ...]
    label: str | None
    data: Callable[[], bytes]
    is_class: bool = False  # the caption is made of the class


@dataclass(frozen=True)
class _Reader:
    """Pixels by index; unlike a closure it can be sent to worker processes."""

    data: tuple[Callable[[], bytes], ...]
    preprocessing: ImagePreprocessing

    def __call__(self, index: int) -> Pixels:
        return read_pixels(self.data[index], self.preprocessing)


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
    entries = _merged(_entries(_sources(source), columns, tuple(templates or _CLASS_TEMPLATES)))
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
        read=_Reader(tuple(entry.data for entry in good), preprocessing),
        labels=tuple(label_ids[label] for label in labels) if class_names else None,
        class_names=class_names,
        templates=tuple(templates or (_CLASS_TEMPLATES if any(entry.is_class for entry in good) else ("{}",))),
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
    """Images of files, folders and tars, read a batch at a time; unreadable ones are left out and listed.

    Args:
        sources: files, folders and tars whose images are taken in order, and patterns as ``a-{000..127}.tar``.
        preprocessing: preprocessing of the images.

    Attributes:
        paths: names of all images.
        unreadable: "path: reason" of each file that could not be read so far.

    Raises:
        FileNotFoundError: a source does not exist.
        ValueError: a folder holds no image.
    """

    def __init__(self, sources: Sequence[str | Path], preprocessing: ImagePreprocessing) -> None:
        self.preprocessing = preprocessing
        self.paths: list[str] = []
        self.unreadable: list[str] = []
        self._data: list[Callable[[], bytes]] = []
        for source in _sources(sources) if sources else ():
            if not source.exists():
                raise FileNotFoundError(f"images must be files, folders or tars of images, there is no {source}")
            before = len(self.paths)
            for path in _tars_in(source):
                for name, data in _images_in_tar(path):
                    self.paths.append(f"{path}/{name}")
                    self._data.append(data)
            for path in _images_of(source) if source.is_dir() else [] if _is_tar(source) else [source]:
                self.paths.append(str(path))
                self._data.append(path.read_bytes)
            if len(self.paths) == before:
                raise ValueError(f"images must be files, folders or tars of images, got {source} without any")
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
            for path, data in zip(self.paths[start : start + size], self._data[start : start + size], strict=True):
                try:
                    pixels.append(read_pixels(data, self.preprocessing))
                    names.append(path)
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
    others = [path for path in files if path.suffix.lower() not in SUFFIXES | _TEXTS and not _is_tar(path)]
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


def _entries(sources: Sequence[Path], columns: _Columns, templates: Sequence[str]) -> Iterator[_Entry]:
    """Entries of all sources; several sources distinguish their names by their paths below a common folder."""
    for source in sources:
        if not source.exists() and not _is_hub_name(source):
            raise FileNotFoundError(f"source must be a folder, a table or a tar, there is no {source}")
    root = os.path.commonpath([source.absolute().parent for source in sources])
    for source in sources:
        for entry in _entries_of(source, columns, templates):
            if len(sources) > 1:
                entry = replace(entry, name=f"{source.absolute().relative_to(root).as_posix()}/{entry.name}")
            yield entry


def _entries_of(source: Path, columns: _Columns, templates: Sequence[str]) -> Iterator[_Entry]:
    saved = any((source / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))
    if saved or source.suffix.lower() in _DATASETS or not source.exists():
        return _dataset(source, columns)
    if source.is_dir():
        table = next((source / name for name in TABLES if (source / name).is_file()), None)
        if table is not None:
            return _table(table, columns)
        tars = _tars_in(source)
        if tars:
            return _entries(tars, columns, templates)
        return _folder(source, templates)
    suffix = source.suffix.lower()
    if suffix in (".csv", ".tsv", ".json", ".jsonl"):
        return _table(source, columns)
    if _is_tar(source):
        return _tar(source, columns)
    raise ValueError(f"source must be a folder, a .csv, .tsv, .json, .jsonl, .parquet or .tar file, got {source}")


def _is_tar(path: Path) -> bool:
    return path.name.lower().endswith(_TARS)


def _is_hub_name(path: Path) -> bool:
    return HUB_ID.fullmatch(path.as_posix()) is not None and not path.suffix


def _tars_in(source: Path) -> list[Path]:
    """The tar itself, or the tars of a folder that has no images next to them; a warning counts other files."""
    if not source.is_dir():
        return [source] if _is_tar(source) else []
    files = _files_of(source)
    tars = [path for path in files if _is_tar(path)]
    if not tars or any(path.suffix.lower() in SUFFIXES for path in files):
        return []
    _warn_of_others(source, [path for path in files if path.suffix.lower() not in _TEXTS and not _is_tar(path)])
    return tars


def _folder(folder: Path, templates: Sequence[str]) -> Iterator[_Entry]:
    paths = _images_of(folder)
    if all(len(path.relative_to(folder).parts) > 1 and not path.with_suffix(".txt").is_file() for path in paths):
        for path in paths:
            class_name = path.relative_to(folder).parts[0]
            captions = tuple(template.replace("{}", class_name.replace("_", " ")) for template in templates)
            yield _Entry(path.relative_to(folder).as_posix(), captions, class_name, path.read_bytes, is_class=True)
        return
    for path in paths:
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


def _dataset(source: Path, columns: _Columns) -> Iterator[_Entry]:
    """Entries of a data set of Hugging Face ``datasets``, whose images are read on access."""
    is_hub_name = not source.exists()
    try:
        import datasets
    except ImportError as error:
        if is_hub_name:
            raise FileNotFoundError(
                f"there is no {source} (a data set of the hub needs pip install datasets)"
            ) from error
        raise ImportError(f"{source} is read by Hugging Face datasets: pip install datasets") from error
    if is_hub_name:
        try:
            rows = datasets.load_dataset(source.as_posix())
        except OSError as error:  # raised by datasets for unknown names and without a network
            raise FileNotFoundError(f"there is no {source}, and the hub has no such data set: {error}") from error
    elif source.suffix.lower() == ".parquet":
        rows = datasets.Dataset.from_parquet(str(source))
    elif source.suffix.lower() == ".arrow":
        rows = datasets.Dataset.from_file(str(source))
    else:
        rows = datasets.load_from_disk(str(source))
    if isinstance(rows, Mapping):
        if "train" not in rows:
            raise ValueError(f"{source} must have the split 'train', it has {sorted(rows)}")
        rows = rows["train"]
    name = next((name for name in columns.image if name in rows.column_names), None)
    if name is None:
        raise ValueError(f"{source} must have {' or '.join(map(repr, columns.image))}, got {sorted(rows.column_names)}")
    feature = rows.features.get(columns.label)
    class_names = getattr(feature, "names", None)
    images = rows.select_columns([name]).cast_column(name, datasets.Image(decode=False))
    for index, row in enumerate(rows.remove_columns(name)):
        where = f"row {index} of {source},"
        caption = _cell(row, columns.caption, where)
        label = row.get(columns.label)
        if class_names and isinstance(label, int) and 0 <= label < len(class_names):
            row = {**row, columns.label: class_names[label]}
        data = partial(_image_of_row, images, index, name)
        yield _Entry(f"{source.name}/{index}", _texts(caption, where), _label(row, columns), data)


def _image_of_row(rows: Any, index: int, column: str) -> bytes:
    image = rows[index][column]
    if image is None:
        raise ValueError("an empty image")
    return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()


def _members(path: Path) -> Iterator[tarfile.TarInfo]:
    """Files of an uncompressed tar, without hidden ones.

    Raises:
        ValueError: the tar is damaged or ends too early.
    """
    size = path.stat().st_size
    if size % tarfile.BLOCKSIZE:
        raise ValueError(f"{path} cannot be read as a tar: {size} bytes are no whole number of blocks, it is truncated")
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.offset_data + member.size > size:
                    raise ValueError(f"{path} ends within the member {member.name}: it is truncated")
                if member.isfile() and not is_hidden(Path(os.path.normpath(member.name))):
                    yield member
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as a tar: {error}") from error


@cache
def _unpacked_folder() -> str:
    folder = tempfile.mkdtemp(prefix="coca-tars-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def _uncompressed(path: Path) -> Path:
    """The tar itself, or a copy without compression, in which members can be read at random; deleted at exit.

    Raises:
        ValueError: the compressed file is damaged.
    """
    name = path.name.lower()
    if name.endswith(".tar"):
        return path
    module = gzip if name.endswith("gz") else bz2 if name.endswith("bz2") else lzma
    descriptor, target = tempfile.mkstemp(suffix=".tar", dir=_unpacked_folder())
    try:
        with module.open(path, "rb") as packed, os.fdopen(descriptor, "wb") as unpacked:
            shutil.copyfileobj(packed, unpacked, 2**20)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"{path} cannot be decompressed: {error}") from error
    return Path(target)


def _images_in_tar(path: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Name and reader of each image."""
    tar = _uncompressed(path)
    for member in _members(tar):
        if os.path.splitext(member.name)[1].lower() in SUFFIXES:
            yield member.name, partial(_member, tar, member.offset_data, member.size)


def _tar(path: Path, columns: _Columns) -> Iterator[_Entry]:
    # suffix to member of each stem: "photos/cat.v2.jpg" has the stem "photos/cat.v2"
    stems: dict[str, dict[str, tarfile.TarInfo]] = {}
    tar = _uncompressed(path)
    for member in _members(tar):
        stem, suffix = os.path.splitext(member.name)
        stems.setdefault(stem, {})[suffix.lower()] = member
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
        picture = stems[stem][image]
        data = partial(_member, tar, picture.offset_data, picture.size)
        yield _Entry(stem + image, *_described(path, tar, texts, columns), data)
    _warn_of_others(path, others)


def _key(stem: str) -> str:
    """webdataset's key of a sample, which ends at the first dot: "cat.image.jpg" belongs to "cat.txt"."""
    folder, base = os.path.split(stem)
    return f"{folder}/{base.partition('.')[0]}"


def _described(
    path: Path, tar: Path, members: Mapping[str, tarfile.TarInfo], columns: _Columns
) -> tuple[tuple[str, ...], str | None]:
    """Captions and label of an image in ``tar``, which ``path`` names in errors.

    A ``.txt`` is the caption, next to which ``.json`` is metadata.
    """
    content: Any = {}
    where = ""
    if ".json" in members:
        where = f"{path}, member {members['.json'].name},"
        try:
            content = json.loads(decoded_text(_content(tar, members[".json"]), where))
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON: {error}") from error
    metadata = content if isinstance(content, Mapping) else {}
    if ".txt" in members:
        text = members[".txt"]
        return _lines(_content(tar, text), f"{path}, member {text.name},"), _label(metadata, columns)
    if not isinstance(content, Mapping):
        raise ValueError(f"{where} must be a JSON object, got {type(content).__name__}")
    return _texts(_cell(content, columns.caption, where), where), _label(content, columns)


def _content(path: Path, member: tarfile.TarInfo) -> bytes:
    return _member(path, member.offset_data, member.size)


def _member(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as stream:  # a member of an uncompressed tar is a piece of the file
        stream.seek(offset)
        return stream.read(size)


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
