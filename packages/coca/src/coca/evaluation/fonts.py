"""A font of this machine that has the scripts of some texts: Pillow's own has Latin letters only."""

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

_FOLDERS = {
    "darwin": ("~/Library/Fonts", "/Library/Fonts", "/System/Library/Fonts"),
    "win32": (os.path.join(os.environ.get("WINDIR", "C:/Windows"), "Fonts"), "~/AppData/Local/Microsoft/Windows/Fonts"),
}
_UNIX_FOLDERS = ("~/.local/share/fonts", "~/.fonts", "/usr/local/share/fonts", "/usr/share/fonts")
# Families with many scripts, tried first; then every other font, without its bold, oblique and mono faces.
_PREFERRED = ("notosanscjk", "notosans", "dejavusans", "arialunicode", "wqy", "msgothic", "arial")
_OTHER_FACES = ("bold", "oblique", "italic", "mono", "condensed", "light", "serif", "thin", "black", "display")
_MOST_FILES = 400


def fonts_for(text: str, sizes: Sequence[int]) -> list[Any]:
    """Fonts of the given sizes that have every character of ``text``, or the most; a warning names the others."""
    from PIL import ImageFont

    characters = {character for character in text if character.isprintable() and not character.isspace()}
    best: Path | None = None
    missing = _missing(ImageFont.load_default(sizes[0]), characters)
    for path in _files() if missing else ():
        try:
            lacks = _missing(ImageFont.truetype(str(path), sizes[0]), characters)
        except (OSError, ValueError):  # a damaged font, or one of a form that FreeType does not read
            continue
        if len(lacks) < len(missing):
            best, missing = path, lacks
        if not missing:
            break
    if missing:
        named = " ".join(sorted(missing)[:20])
        warnings.warn(f"no font of this machine has {len(missing)} of the characters: {named}", stacklevel=2)
    if best is None:
        return [ImageFont.load_default(size) for size in sizes]
    return [ImageFont.truetype(str(best), size) for size in sizes]


def _missing(font: Any, characters: set[str]) -> set[str]:
    """Characters that the font draws as its sign for an unknown one."""
    unknown = bytes(font.getmask("\U0010ffff"))
    return {character for character in characters if bytes(font.getmask(character)) == unknown}


@cache
def _files() -> tuple[Path, ...]:
    """Font files of the system and of matplotlib, the most useful first."""
    found = [path for folder in _folders() for path in sorted(folder.rglob("*")) if path.suffix.lower() in _SUFFIXES]
    plain = [path for path in found if not any(face in path.stem.lower() for face in _OTHER_FACES)]

    def rank(path: Path) -> int:
        name = path.stem.lower().replace("-", "").replace("_", "")
        return next((index for index, family in enumerate(_PREFERRED) if name.startswith(family)), len(_PREFERRED))

    return tuple(sorted(plain, key=rank)[:_MOST_FILES])


_SUFFIXES = (".ttf", ".otf", ".ttc")


def _folders() -> Iterator[Path]:
    folders = [Path(name).expanduser() for name in _FOLDERS.get(sys.platform, _UNIX_FOLDERS)]
    yield from (folder for folder in folders if folder.is_dir())
    try:
        import matplotlib
    except ImportError:
        return
    yield Path(matplotlib.get_data_path()) / "fonts" / "ttf"  # DejaVu Sans, with Cyrillic, Greek, Arabic, ...
