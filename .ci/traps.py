"""Traps of the originals and the tests that guard them, read from each package's MIGRATING.md.

Its tables of differences state the original's behaviour, ours, and in a column "guarded by" the tests that keep it,
in backticks. The documentation's page of traps is made from these, and tests/test_traps.py asserts
that every test named there exists.
"""

import re
from dataclasses import dataclass
from pathlib import Path

GUARD_COLUMN = "guarded by"


@dataclass(frozen=True)
class Trap:
    """One row: the original's behaviour, ours, and the names of the tests that guard it."""

    cells: dict[str, str]
    guards: tuple[str, ...]


def cells_of(line: str) -> list[str]:
    """The cells of a Markdown table's line; a bar in backticks does not divide."""
    parts = re.split(r"\|(?=(?:[^`]*`[^`]*`)*[^`]*$)", line.strip().removeprefix("|").removesuffix("|"))
    return [part.strip().replace("\\|", "|") for part in parts]


def traps_of(page: str) -> list[Trap]:
    """Every row of a table that has a column "guarded by"."""
    traps, header = [], None
    for line in page.splitlines():
        if not line.startswith("|"):
            header = None
        elif header is None:
            header = cells_of(line)
        elif GUARD_COLUMN in header and not set(line) <= set("|-: "):
            row = dict(zip(header, cells_of(line), strict=True))
            guards = tuple(re.findall(r"`(test_\w+)`", row.pop(GUARD_COLUMN)))
            traps.append(Trap(row, guards))
    return traps


def tests_under(*folders: Path) -> dict[str, list[Path]]:
    """The files that define each test function."""
    defined: dict[str, list[Path]] = {}
    for folder in folders:
        for file in sorted(folder.glob("test_*.py")):
            for name in re.findall(r"^\s*(?:async )?def (test_\w+)", file.read_text("utf-8"), re.MULTILINE):
                defined.setdefault(name, []).append(file)
    return defined
