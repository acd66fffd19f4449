"""What no file of this repository may contain."""

import re
from pathlib import Path

import pytest

TEXT_SUFFIXES = {"", ".cfg", ".json", ".md", ".py", ".sh", ".toml", ".txt", ".yaml", ".yml"}

# Folders of one machine, never of every machine (a path like /tmp in an example is fine).
MACHINE_PATH = re.compile(r"(?<![\w.$}~/-])/(?:home|root|opt|work|mnt|Users)/[\w.-]+")
# Joined here, so that this file does not contain what it looks for.
UNFINISHED = re.compile(
    r"\b(?:" + "|".join(["TO" + "DO", "FIX" + "ME", "XX" + "X", "raise NotImplemented" + "Error"]) + r")\b"
)


def offences(files: list[Path], pattern: re.Pattern[str]) -> list[str]:
    found = []
    for file in files:
        if file.suffix in TEXT_SUFFIXES:
            for number, line in enumerate(file.read_text("utf-8").splitlines(), start=1):
                found += [f"{file}:{number}: {match[0]}" for match in pattern.finditer(line)]
    return found


def test_no_file_names_a_path_of_one_machine(tracked_files: list[Path]) -> None:
    assert offences(tracked_files, MACHINE_PATH) == []


def test_nothing_is_left_unfinished(tracked_files: list[Path]) -> None:
    assert offences(tracked_files, UNFINISHED) == []


@pytest.mark.parametrize(
    ("line", "found"),
    [("see /ho" + "me/someone/data", True), ("see /tmp/data, https://example.org/home/x", False)],
)
def test_a_machine_path_would_be_seen(tmp_path: Path, line: str, found: bool) -> None:
    file = tmp_path / "notes.md"
    file.write_text(line)

    assert bool(offences([file], MACHINE_PATH)) is found


def test_no_module_is_a_drawer_for_everything(tracked_files: list[Path]) -> None:
    drawers = {"utils.py", "util.py", "helpers.py", "common.py", "misc.py"}
    assert [str(file) for file in tracked_files if file.name in drawers] == []


def test_the_top_level_has_no_other_folder(tracked_files: list[Path], root: Path) -> None:
    folders = {path.relative_to(root).parts[0] for path in tracked_files if path.parent != root}
    assert folders == {"packages", "core", "tests", ".github", ".ci"}
