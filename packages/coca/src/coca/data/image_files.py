"""Folders, tables and tars of images with captions.

| source | content |
|---|---|
| ``*.csv``, ``*.tsv``, ``*.jsonl`` | columns ``image`` (a path relative to the table), ``caption``, maybe ``label`` |
| a folder | its ``captions`` (.csv, .tsv, .jsonl) or ``metadata`` (.csv, .jsonl), else images, each with a ``.txt`` |
| ``*.tar`` (webdataset) | members ``key.jpg`` with ``key.txt``, or ``key.json`` with a ``caption`` |

Several lines for one image, several lines in a ``.txt`` and a JSON list are several captions. Every image is decoded
once when the set is opened: an unreadable one is listed with its reason, and more of them than allowed is an error.
"""

import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from coca.data.captioned_images import CaptionedImages, Pixels
from coca.model.preprocessing import ImagePreprocessing
from lm_core.data.rows import iterate_rows

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
TABLES = ("captions.csv", "captions.tsv", "captions.jsonl", "metadata.csv", "metadata.jsonl")


@dataclass(frozen=True)
class _Entry:
    name: str
    captions: tuple[str, ...]
    label: str | None
    data: Callable[[], bytes]


def load_images(
    source: str | Path,
    preprocessing: ImagePreprocessing,
    *,
    image_column: str = "image",
    caption_column: str = "caption",
    label_column: str = "label",
    templates: Sequence[str] | None = None,
    max_unreadable: float = 0.05,
    progress: bool = False,
) -> CaptionedImages:
    """Images with captions from files.

    Args:
        source: folder, table or tar; see the module docstring.
        preprocessing: size and channels of the pixels.
        image_column: column of a table with the path of an image.
        caption_column: column of a table, or key of a JSON object, with a caption.
        label_column: column or key with the class of an image; if all images have one, held-out ones are classified.
        templates: captions with one {} for a class name.
        max_unreadable: largest fraction of images that may be unreadable; they are named and counted.
        progress: shows a progress bar.

    Raises:
        FileNotFoundError: the source, or an image that it names, does not exist.
        ValueError: the source has no images, lacks a column or caption, or has too many unreadable images, by name.
        TypeError: ``templates`` is one string.
    """
    if isinstance(templates, str):
        raise TypeError(f"templates must be a list of strings, got the string {templates!r}")
    if not 0 <= max_unreadable < 1:
        raise ValueError(f"max_unreadable must be a part of the images in [0, 1), got {max_unreadable}")
    columns = {"image": image_column, "caption": caption_column, "label": label_column}
    entries = _merged(_entries(Path(source), columns))
    if not entries:
        raise ValueError(f"source must hold at least one image with a caption, got none in {source}")
    # Decode every image once, to find those that cannot be read.
    good, unreadable = [], []
    for entry in tqdm(entries, desc="check images", unit="image", disable=not progress):
        try:
            read_pixels(entry.data, preprocessing)
            good.append(entry)
        except (OSError, ValueError) as error:
            unreadable.append(f"{entry.name}: {error}")
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
    )


def read_pixels(read: Callable[[], bytes], preprocessing: ImagePreprocessing) -> Pixels:
    """Pixels of an image file, whose bytes ``read`` returns.

    Raises:
        OSError, ValueError: the file cannot be read or decoded.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(read())) as picture:
            return preprocessing.pixels(picture)
    # what Pillow raises for damaged files, and for those that would fill the memory
    except (UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(re.sub(r" <_io.BytesIO .*?>", "", str(error))) from error


def _merged(entries: Iterator[_Entry]) -> list[_Entry]:
    """One entry for each image, with all its captions."""
    by_name: dict[str, _Entry] = {}
    for entry in entries:
        earlier = by_name.get(entry.name, replace(entry, captions=()))
        if earlier.label != entry.label:
            raise ValueError(f"{entry.name} must have one label, got {earlier.label!r} and {entry.label!r}")
        by_name[entry.name] = replace(entry, captions=earlier.captions + entry.captions)
    return list(by_name.values())


def _entries(source: Path, columns: Mapping[str, str]) -> Iterator[_Entry]:
    if source.is_dir():
        table = next((source / name for name in TABLES if (source / name).is_file()), None)
        return _folder(source) if table is None else _table(table, columns)
    if not source.is_file():
        raise FileNotFoundError(f"source must be a folder, a table or a tar, there is no {source}")
    suffix = source.suffix.lower()
    if suffix in (".csv", ".tsv", ".jsonl"):
        return _table(source, columns)
    if suffix == ".tar":
        return _tar(source, columns)
    raise ValueError(f"source must be a folder, a .csv, .tsv, .jsonl or .tar file, got {source}")


def _folder(folder: Path) -> Iterator[_Entry]:
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in SUFFIXES or not path.is_file():
            continue
        text = path.with_suffix(".txt")
        if not text.is_file():
            raise ValueError(f"each image of a folder without a table must have a .txt next to it, {path} has none")
        name = path.relative_to(folder).as_posix()
        yield _Entry(name, _lines(text.read_text("utf-8"), str(text)), None, path.read_bytes)


def _table(table: Path, columns: Mapping[str, str]) -> Iterator[_Entry]:
    for where, row in iterate_rows(table):
        for column in (columns["image"], columns["caption"]):
            if not isinstance(row, Mapping) or row.get(column) in (None, ""):
                raise ValueError(f"{where} must have {column!r}, got the columns {sorted(map(str, row))}")
        path = table.parent / str(row[columns["image"]])
        if not path.is_file():
            raise FileNotFoundError(f"{where} names the image {path}, which is not there")
        label = row.get(columns["label"])
        yield _Entry(
            path.relative_to(table.parent).as_posix() if path.is_relative_to(table.parent) else str(path),
            _texts(row[columns["caption"]], where),
            None if label in (None, "") else str(label),
            path.read_bytes,
        )


def _tar(path: Path, columns: Mapping[str, str]) -> Iterator[_Entry]:
    groups: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.isfile():
                    folder, base = os.path.split(member.name)
                    key, _, suffix = base.partition(".")
                    groups.setdefault(f"{folder}/{key}".lstrip("/"), {})["." + suffix.lower()] = member
    except tarfile.TarError as error:
        raise ValueError(f"{path} cannot be read as an uncompressed tar: {error}") from error
    for key, members in groups.items():
        image = next((suffix for suffix in members if suffix in SUFFIXES), None)
        if image is None:
            continue
        label: str | None = None
        if ".json" in members:
            content = json.loads(_member(path, members[".json"]))
            captions = _texts(content.get(columns["caption"]), f"{key}.json")
            label = None if content.get(columns["label"]) is None else str(content[columns["label"]])
        elif ".txt" in members:
            captions = _lines(_member(path, members[".txt"]).decode("utf-8"), f"{key}.txt")
        else:
            raise ValueError(f"{path} must have a caption, {key}.txt or {key}.json, next to {key}{image}")
        yield _Entry(key + image, captions, label, partial(_member, path, members[image]))


def _member(path: Path, member: tarfile.TarInfo) -> bytes:
    with path.open("rb") as stream:  # a member of an uncompressed tar is a piece of the file
        stream.seek(member.offset_data)
        return stream.read(member.size)


def _lines(text: str, where: str) -> tuple[str, ...]:
    return _texts([line for line in text.splitlines() if line.strip()], where)


def _texts(value: Any, where: str) -> tuple[str, ...]:
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"{where} must have a caption or a list of captions, got {value!r}")
    return tuple(text.strip() for text in texts)
